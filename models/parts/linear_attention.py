"""Attention without a softmax, whose memory is a sum over the keys and does not grow; and no mixing at all.

B batch, T time, D model, H heads, h head size, L tokens per chunk. Features phi(x) = elu(s x) + 1 are above 0; s is
learned, one number per layer, and starts at 1 / sqrt(h).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.linear_scan import linear_scan
from models.cost import Ops, elementwise
from models.memory import At, Field, Mem, visible
from models.parts.linear import Dense, Linear
from models.parts.mixer import Attention
from models.parts.numeric import wide
from models.parts.ssm import real, same_document

if TYPE_CHECKING:
    from models.parts.block import BlockSpec

CHUNK = 64  # tokens that meet as pairs; earlier ones have become a state
FLOOR = 1e-3  # of the diagonal kind's divisor, as in its original


@dataclass(frozen=True)
class Features(Attention):
    """What both kinds share.

    n_heads: heads, one number or one per layer
    head_dim: size of a head; none: d_model / n_heads
    bias: whether the matrices have biases; none: as the family's `bias` says
    linear: kind of linear layer
    """

    n_heads: int | tuple[int, ...] = 12
    head_dim: int | tuple[int, ...] | None = None
    bias: bool | None = None
    linear: Linear = field(default_factory=Dense)

    @classmethod
    def small(cls) -> Features:
        """Fits the width that the conformance suite uses."""
        return cls(n_heads=4)

    def width(self, d_model: int) -> int:
        return self.head_dim or d_model // self.n_heads  # type: ignore[operator,return-value]

    def sizes(self, d: int) -> tuple[int, int]:
        """Heads of a resolved layer, and the size of one."""
        return self.n_heads, self.width(d)  # type: ignore[return-value]

    def n_parameters(self, block: BlockSpec) -> int:
        d, bias = block.d_model, block.bias_of(self)
        H, h = self.sizes(d)
        return self.linear.n_parameters(d, 3 * H * h, bias) + self.linear.n_parameters(H * h, d, bias) + 1

    def common_ops(self, block: BlockSpec, T: int) -> Ops:
        """Matrices, features, and the sum of keys that divides."""
        d, bias = block.d_model, block.bias_of(self)
        H, h = self.sizes(d)
        matrices = self.linear.ops(d, 3 * H * h, bias) + self.linear.ops(H * h, d, bias)
        features = elementwise(2 * H * h, multiplies=1, additions=2, exponentials=1)
        divisor = elementwise(H * h, multiplies=2, additions=2) + Ops(divisions=H, additions=H, reductions=H)
        return matrices + features + divisor + block.position.ops(block, T)

    def refuses(self, block: BlockSpec) -> str | None:
        d, H = block.d_model, self.n_heads
        assert not isinstance(H, tuple) and not isinstance(self.head_dim, tuple)
        if H < 1:
            return f"n_heads={H} must be at least 1"
        if self.head_dim is None and d % H:
            return f"d_model={d} is not divisible by n_heads={H}; set attention.head_dim, or take a divisor"
        if self.head_dim is not None and self.head_dim < 1:
            return f"head_dim={self.head_dim} must be at least 1"
        return self.linear.refuses(block)


@dataclass(frozen=True)
class LinearAttention(Features):
    """y_t = S_t^T phi(q_t) / (z_t . phi(q_t) + eps),  S_t = sum of phi(k) v^T and z_t = sum of phi(k) to t, per head.

    Trained in chunks (pairs inside, a state between), decoded from S and z. A rotation turns features above the
    fraction line only, so that the divisor stays positive (RoFormer, arXiv:2104.09864, eq. 19).
    Source: arXiv:2006.16236.

    eps: added to the divisor, above 0
    """

    eps: float = 1e-6

    def build(self, block: BlockSpec) -> nn.Module:
        return OuterState(self, block)

    def rotated(self, block: BlockSpec) -> tuple[int, int]:
        H, h = self.sizes(block.d_model)
        return 2 * H, h

    def ops(self, block: BlockSpec, T: int) -> Ops:
        H, h = self.sizes(block.d_model)
        return self.common_ops(block, T) + elementwise(H * h * h, multiplies=2, additions=2)

    def refuses(self, block: BlockSpec) -> str | None:
        if not self.eps > 0:
            return f"eps={self.eps} must be above 0; 1e-6 is usual"
        return super().refuses(block)


@dataclass(frozen=True)
class Diagonal(Features):
    """y_t = phi(q_t) * S_t / max(phi(q_t) . z_t, 0.001),  S_t = sum of phi(k) * v and z_t = sum of phi(k), per head.

    Linear attention that remembers of each outer product its diagonal alone: channel i of a value is only ever read by
    channel i of a query. Source: ReaLLM-Forge (its `linear`).
    """

    def build(self, block: BlockSpec) -> nn.Module:
        return DiagonalState(self, block)

    def ops(self, block: BlockSpec, T: int) -> Ops:
        H, h = self.sizes(block.d_model)
        return self.common_ops(block, T) + elementwise(H * h, multiplies=2, additions=1)


@dataclass(frozen=True)
class NoMixing(Attention):
    """y = x: tokens do not meet in this layer; the branch adds what its norm has made of the stream."""

    def width(self, d_model: int) -> int:
        return d_model

    def build(self, block: BlockSpec) -> nn.Module:
        return IdentityMixer()

    def n_parameters(self, block: BlockSpec) -> int:
        return 0

    def ops(self, block: BlockSpec, T: int) -> Ops:
        return Ops()


class FeatureMixer(nn.Module):
    """Matrices and features of both kinds."""

    roles = {"scale": "scalar"}

    def __init__(self, spec: Features, block: BlockSpec) -> None:
        super().__init__()
        d, bias = block.d_model, block.bias_of(spec)
        self.H, self.h = H, h = spec.sizes(d)
        self.qkv = spec.linear.build(d, 3 * H * h, bias, "matrix")
        self.scale = nn.Parameter(torch.tensor(h**-0.5))
        self.initial = {"scale": h**-0.5}
        self.out = spec.linear.build(H * h, d, bias, "residual")

    def project(self, x: Tensor, at: At) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> phi(q), phi(k), v, each [B, T, H, h] in float32 at least; a pad's phi(k) is 0."""
        B, T, _ = x.shape
        q, k, v = wide(self.qkv(x)).view(B, T, 3, self.H, self.h).unbind(2)
        q, k = (F.elu(t * wide(self.scale)) + 1 for t in (q, k))
        return q, k if at.n is None else k * real(at)[..., None, None], v

    def prepare(self, at: At, cached: bool, dtype: torch.dtype) -> None:
        """Nothing is shared between layers."""


class OuterState(FeatureMixer):
    def __init__(self, spec: LinearAttention, block: BlockSpec) -> None:
        super().__init__(spec, block)
        self.eps = spec.eps
        self.rotation = block.position.rotation(self.h)

    def memory(self) -> dict[str, Field]:
        return {"s": Field((self.H, self.h, self.h), False), "z": Field((self.H, self.h), False)}

    def flops_per_token(self, T: int) -> float:
        """The recurrence's: a token goes into S and reads it, whatever the context."""
        return 4.0 * self.H * self.h**2

    def prepare(self, at: At, cached: bool, dtype: torch.dtype) -> None:
        assert at.tables is not None
        if self.rotation is not None and self.rotation.key not in at.tables:
            at.tables[self.rotation.key] = self.rotation.tables(at, dtype)

    def turn(self, x: Tensor, at: At) -> Tensor:
        if self.rotation is None:
            return x
        assert at.tables is not None
        return self.rotation(x, at.tables[self.rotation.key])

    def forward(self, x: Tensor, at: At, mem: Mem | None = None, shared: tuple = ()) -> tuple[Tensor, tuple]:
        q, k, v = self.project(x, at)
        state, total = (mem.read(at, "s"), mem.read(at, "z")) if mem is not None else (None, None)
        z = linear_scan(_keep(at, k), k, total)  # [B, T, H, h]
        with torch.autocast(x.device.type, enabled=False):
            y, state = chunkwise(self.turn(q, at), self.turn(k, at), v, state, at.doc)
        if mem is not None:
            mem.write(at, "s", state)
            mem.write(at, "z", z[:, -1])
        y = y / ((q * z).sum(-1, keepdim=True) + self.eps)
        return self.out(y.flatten(2).to(x.dtype)), shared

    def weights(self, x: Tensor, at: At) -> Tensor:
        """What each key's value counts, [B, H, T, S], in a call without memory; for inspection."""
        q, k, _ = self.project(x, at)
        z = linear_scan(_keep(at, k), k)
        scores = torch.einsum("bthi,bshi->bhts", self.turn(q, at), self.turn(k, at)) * visible(at, False)[:, None]
        return scores / ((q * z).sum(-1).transpose(1, 2)[..., None] + self.eps)


class DiagonalState(FeatureMixer):
    def memory(self) -> dict[str, Field]:
        return {"s": Field((2, self.H, self.h), False)}

    def flops_per_token(self, T: int) -> float:
        return 4.0 * self.H * self.h

    def forward(self, x: Tensor, at: At, mem: Mem | None = None, shared: tuple = ()) -> tuple[Tensor, tuple]:
        q, k, v = self.project(x, at)
        both = torch.stack([k * v, k], 2)  # [B, T, 2, H, h]
        sums = linear_scan(_keep(at, both), both, mem.read(at, "s") if mem is not None else None)
        if mem is not None:
            mem.write(at, "s", sums[:, -1])
        s, z = sums.unbind(2)
        y = q * s / (q * z).sum(-1, keepdim=True).clamp(min=FLOOR)
        return self.out(y.flatten(2).to(x.dtype)), shared


class IdentityMixer(nn.Module):
    def memory(self) -> dict[str, Field]:
        return {}

    def flops_per_token(self, T: int) -> float:
        return 0.0

    def prepare(self, at: At, cached: bool, dtype: torch.dtype) -> None:
        """Nothing is shared between layers."""

    def forward(self, x: Tensor, at: At, mem: Mem | None = None, shared: tuple = ()) -> tuple[Tensor, tuple]:
        return x, shared


def _keep(at: At, like: Tensor) -> Tensor:
    """Coefficients of a sum along time: 1, and 0 where a document begins."""
    if at.doc is None:
        return torch.ones_like(like)
    same = same_document(at, 1).to(like.dtype)
    return same.view(*same.shape, *(1,) * (like.dim() - 2)).expand_as(like)


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, doc: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sum over s <= t of (q_t . k_s) v_s, and the state after the last token.

    q, k, v: [B, T, H, h].  state: [B, H, h, h], the sum of k v^T before; None: zeros.  doc: [B, T], ids of documents,
    each in one piece; a token sums over its own. Returns [B, T, H, h] and [B, H, h, h].
    """
    B, T, H, h = q.shape
    if T == 1:  # decoding
        new = k[:, 0, :, :, None] * v[:, 0, :, None]
        new = new if state is None else state + new
        return (q[:, 0, :, None] @ new).transpose(1, 2), new
    L = min(CHUNK, T)
    C, rest = -(-T // L), -T % L
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, rest)).view(B, C, L, H, h) for t in (q, k, v))
    scores = torch.einsum("bclhi,bcmhi->bchlm", q, k)
    pairs = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
    keys, keep = k, torch.ones(B, C, dtype=q.dtype, device=q.device)
    if doc is not None:
        d = torch.cat([doc, doc[:, -1:].expand(B, rest)], 1).view(B, C, L)
        last = d[..., -1]
        pairs = pairs & (d[..., :, None] == d[..., None, :])[:, :, None]
        keys = k * (d == last[..., None])[..., None, None]  # what the next chunk can still see of this one
        before = torch.cat([d[:, :1, 0], last[:, :-1]], 1)  # document at the end of the chunk before
        keep = (before == last).to(q.dtype)
        q = q * (d == before[..., None])[..., None, None]
    y = torch.einsum("bchlm,bcmhj->bclhj", scores * pairs, v)
    added = torch.einsum("bclhi,bclhj->bchij", keys, v)
    states = linear_scan(keep[..., None, None, None].expand_as(added), added, state)
    start = torch.zeros_like(added[:, :1]) if state is None else state[:, None].to(added.dtype)
    y = y + torch.einsum("bclhi,bchij->bclhj", q, torch.cat([start, states[:, :-1]], 1))
    return y.reshape(B, C * L, H, h)[:, :T], states[:, -1]
