"""State-space mixers.   B batch, T time, D model, C channels (expand * D), N state size, R rank of the step size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.linear_scan import linear_scan
from models.cost import Ops, elementwise, product
from models.memory import At, Field, Mem
from models.parts.linear import Dense, Linear
from models.parts.mixer import Attention
from models.parts.norm import RMSNorm
from models.parts.numeric import wide
from models.roles import mark

if TYPE_CHECKING:
    from models.parts.block import BlockSpec

NORM = RMSNorm(eps=1e-6)
STEPS = (1e-3, 1e-1)  # step sizes at the start: from the first to the last channel, evenly in their logarithm


@dataclass(frozen=True)
class SSM(Attention):
    """h_t = exp(s_t A) h_{t-1} + s_t B_t u_t,  y_t = C_t h_t + D u_t,  out = W rmsnorm(y * silu(z)): a selective scan.

    [u, z] = W_in x; u goes through a causal convolution per channel and SiLU. Step size s = softplus(W_s r + b); r, B
    and C are linear in u and RMS-normed; A = -exp(A_log). Memory does not grow with the context: C x N numbers.
    Order comes from the recurrence: there is nothing that a position scheme could turn or score.
    Sources: Mamba, arXiv:2312.00752; the norms as in Jamba, arXiv:2403.19887, and Hymba, arXiv:2411.13676.

    expand: channels per model width
    conv: tokens that the convolution sees, its own included; 1 = its own only
    dt_rank: rank of the step size's matrix
    state: numbers remembered per channel
    bias: whether the convolution and the outer matrices have biases; none: as the family's `bias` says
    linear: kind of linear layer
    """

    expand: int | tuple[int, ...] = 2
    conv: int | tuple[int, ...] = 3
    dt_rank: int | tuple[int, ...] = 8
    state: int | tuple[int, ...] = 16
    bias: bool | None = None
    linear: Linear = field(default_factory=Dense)

    @classmethod
    def small(cls) -> SSM:
        """Fits the width that the conformance suite uses."""
        return cls(dt_rank=2, state=4)

    def width(self, d_model: int) -> int:
        return d_model

    def sizes(self, d: int) -> tuple[int, int, int, int]:
        """Channels, convolution, rank and state of a resolved layer."""
        return self.expand * d, self.conv, self.dt_rank, self.state  # type: ignore[operator,return-value]

    def build(self, block: BlockSpec) -> nn.Module:
        return SelectiveScan(self, block)

    def n_parameters(self, block: BlockSpec) -> int:
        d, bias, linear = block.d_model, block.bias_of(self), self.linear
        C, k, R, N = self.sizes(d)
        matrices = linear.n_parameters(d, 2 * C, bias) + linear.n_parameters(C, R + 2 * N, False)
        matrices += R * C + C + linear.n_parameters(C, d, bias)
        return matrices + C * k + (C if bias else 0) + C * N + C + R + 2 * N + C

    def ops(self, block: BlockSpec, T: int) -> Ops:
        d, bias, linear = block.d_model, block.bias_of(self), self.linear
        C, k, R, N = self.sizes(d)
        matrices = linear.ops(d, 2 * C, bias) + linear.ops(C, R + 2 * N, False) + linear.ops(C, d, bias)
        matrices += product(R, C, bias=True)
        conv = elementwise(C, multiplies=k, additions=k - 1 + bias)
        norms = NORM.ops(R, False) + 2 * NORM.ops(N, False) + NORM.ops(C, False)
        # s A, its exponential, (s u) B, a h + b, and the product with C; s, s u, D u, SiLU twice, the gate
        scan = elementwise(C * N, multiplies=4, additions=2, exponentials=1)
        rest = elementwise(C, multiplies=5, additions=4, exponentials=4, divisions=2)
        return matrices + conv + norms + scan + rest

    def refuses(self, block: BlockSpec) -> str | None:
        for name in ("expand", "conv", "dt_rank", "state"):
            if getattr(self, name) < 1:
                return f"{name}={getattr(self, name)} must be at least 1"
        return self.linear.refuses(block)


class SelectiveScan(nn.Module):
    roles = {"A_log": "scalar", "D": "gain", "conv": "scalar", "conv_bias": "bias"}

    def __init__(self, spec: SSM, block: BlockSpec) -> None:
        super().__init__()
        d, bias = block.d_model, block.bias_of(spec)
        self.C, self.k, self.R, self.N = C, k, R, N = spec.sizes(d)
        self.into = spec.linear.build(d, 2 * C, bias, "matrix")
        self.conv = nn.Parameter(torch.empty(C, k))
        self.conv_bias = nn.Parameter(torch.zeros(C)) if bias else None
        self.select = spec.linear.build(C, R + 2 * N, False, "matrix")
        self.norms = nn.ModuleList(NORM.build(n, False) for n in (R, N, N))
        self.step = mark(nn.Linear(R, C), weight="matrix", bias="scalar")
        self.step.initial = {"bias": log_spaced_steps}  # type: ignore[assignment]
        self.A_log = nn.Parameter(torch.empty(C, N))
        self.D = nn.Parameter(torch.ones(C))
        self.norm = NORM.build(C, False)
        self.out = spec.linear.build(C, d, bias, "residual")
        self.initial = {"A_log": count_up, "conv": uniform}

    def memory(self) -> dict[str, Field]:
        state = {"h": Field((self.C, self.N), per_token=False)}
        return {**state, "u": Field((self.k - 1, self.C), per_token=False)} if self.k > 1 else state

    def flops_per_token(self, T: int) -> float:
        """7 per channel and state number, of which 2 count as a matrix's already: A_log and the convolution are 2-D."""
        return 5.0 * self.C * self.N

    def prepare(self, at: At, cached: bool, dtype: torch.dtype) -> None:
        """Nothing is shared between layers."""

    def forward(self, x: Tensor, at: At, mem: Mem | None = None, shared: tuple = ()) -> tuple[Tensor, tuple]:
        u, z = self.into(x).chunk(2, -1)  # [B, T, C]
        u = F.silu(self.convolve(u, at, mem))
        parts = self.select(u).split((self.R, self.N, self.N), -1)
        r, b, c = (norm(part) for norm, part in zip(self.norms, parts, strict=True))
        u, s = wide(u), F.softplus(wide(self.step(r)))
        if at.n is not None:  # a pad takes a step of size 0: the state stands still
            s = s * real(at)[..., None]
        decay = torch.exp(s[..., None] * -wide(self.A_log).exp())  # [B, T, C, N]
        if at.doc is not None:
            decay = decay * same_document(at, 1)[..., None, None]
        h = linear_scan(decay, (s * u)[..., None] * wide(b)[:, :, None], mem.read(at, "h") if mem is not None else None)
        if mem is not None:
            mem.write(at, "h", h[:, -1])
        y = (h * wide(c)[:, :, None]).sum(-1) + wide(self.D) * u
        return self.out(self.norm((y * F.silu(wide(z))).to(z.dtype))), shared

    def convolve(self, u: Tensor, at: At, mem: Mem | None) -> Tensor:
        """sum_i w_i u_{t-i} per channel, over the token's own document."""
        B, T, C = u.shape
        k = self.k
        w = self.conv.to(u.dtype)
        past = mem.read(at, "u").to(u.dtype) if mem is not None and k > 1 else u.new_zeros(B, k - 1, C)
        seen = torch.cat([past, u], 1)  # [B, k - 1 + T, C]
        if mem is not None and k > 1:
            mem.write(at, "u", seen[:, T:] if at.n is None else last_real(seen, at.n, k - 1))
        y = u * w[:, -1]
        for i in range(1, k):
            tap = seen[:, k - 1 - i : k - 1 - i + T] * w[:, -1 - i]
            y = y + (tap if at.doc is None else tap * same_document(at, i)[..., None])
        return y if self.conv_bias is None else y + self.conv_bias.to(u.dtype)


def real(at: At) -> Tensor:
    """[B, T] True for tokens that are no pads."""
    assert at.n is not None
    return torch.arange(at.pos.shape[1], device=at.pos.device) < at.n[:, None]


def same_document(at: At, back: int) -> Tensor:
    """[B, T] True where the token `back` places before belongs to the same document, which stands in one piece."""
    assert at.doc is not None
    return F.pad(at.doc[:, back:] == at.doc[:, :-back], (min(back, at.doc.shape[1]), 0))


def last_real(seen: Tensor, n: Tensor, count: int) -> Tensor:
    """The `count` entries of seen [B, count + T, C] that end with each row's last real token."""
    index = n[:, None] + torch.arange(count, device=seen.device)
    return seen.gather(1, index[..., None].expand(-1, -1, seen.shape[-1]))


def uniform(conv: Tensor) -> None:
    """Within +-1 / sqrt(taps), PyTorch's own for a convolution per channel."""
    conv.uniform_(-(conv.shape[1] ** -0.5), conv.shape[1] ** -0.5)


def count_up(A_log: Tensor) -> None:
    """log(1), ..., log(N) in every channel (S4D-real)."""
    A_log.copy_(torch.arange(1, A_log.shape[1] + 1).log().expand_as(A_log))


def log_spaced_steps(bias: Tensor) -> None:
    """The inverse of softplus of step sizes from 0.001 to 0.1, one per channel (Mamba draws them at random)."""
    low, high = (math.log(step) for step in STEPS)
    steps = torch.linspace(low, high, bias.shape[0], dtype=torch.float64).exp()
    bias.copy_(steps.expm1().log())
