"""Attention by softmax over scores, and the registry of all mixers (models/parts/mixer.py says what a mixer is).

B batch, T time, S keys, D model, H heads, K key heads, h head size, v value size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from kernels.qk_norm_rope import qk_norm_rope
from models.cost import Ops
from models.memory import At, Field, Mem
from models.parts.attend import Seen, attend, repeat_heads, what_is_seen
from models.parts.gate import Gate, NoGate
from models.parts.linear import Dense, Linear
from models.parts.linear_attention import Diagonal, LinearAttention, NoMixing
from models.parts.mixer import Attention
from models.parts.mla import MLA
from models.parts.qk_norm import NoQKNorm, QKNorm, unit_length
from models.parts.scores import Scores, scores_ops, scores_refuse
from models.parts.sink import NoSink, Sink
from models.parts.softmax import PlainSoftmax, Softmax
from models.parts.ssm import SSM
from models.spec import kind_of

if TYPE_CHECKING:
    from models.parts.block import BlockSpec

__all__ = ["Attention", "Causal", "CausalAttention", "Infinite", "Seen", "attend", "repeat_heads", "what_is_seen"]


@dataclass(frozen=True)
class Heads(Attention):
    """What `causal` and `infinite` share. Order: norm of q and k, positions, scores, soft-cap, mask and bias, softmax.

    n_heads: query heads, one number or one per layer
    n_kv_heads: key and value heads, up to n_heads; none: n_heads. Where they do not divide n_heads, the first
        n_heads mod n_kv_heads of them serve one query head more
    head_dim: size of a query's and key's head; none: d_model / n_heads
    v_head_dim: size of a value's head; none: head_dim
    window: a token sees itself and the window - 1 tokens before it; none: all
    softmax: what turns scores into weights; the plain one is fused
    qk_norm: norm of queries and keys, before positions
    v_norm: whether values have length 1, v / (|v| + 1e-6)
    softcap: c of c tanh(score / c); none: no cap
    sink: a share of the attention that goes to nothing (off-by-one softmax, flash_lobo)
    gate: what a token lets through of what its heads have read
    bias: whether the matrices have biases; none: as the family's `bias` says
    dropout: of attention weights; none: as the family's `dropout` says
    linear: kind of linear layer
    out_linear: kind of the last linear layer; none: as `linear` says
    """

    n_heads: int | tuple[int, ...] = 12
    n_kv_heads: int | tuple[int, ...] | None = None
    head_dim: int | tuple[int, ...] | None = None
    v_head_dim: int | tuple[int, ...] | None = None
    window: int | tuple[int | None, ...] | None = None
    softmax: Softmax | tuple[Softmax, ...] = field(default_factory=PlainSoftmax)
    qk_norm: QKNorm | tuple[QKNorm, ...] = field(default_factory=NoQKNorm)
    v_norm: bool | tuple[bool, ...] = False
    softcap: float | tuple[float | None, ...] | None = None
    sink: Sink | tuple[Sink, ...] = field(default_factory=NoSink)
    gate: Gate | tuple[Gate, ...] = field(default_factory=NoGate)
    bias: bool | None = None
    dropout: float | None = None
    linear: Linear = field(default_factory=Dense)
    out_linear: Linear | None = None

    @property
    def sums(self) -> bool:
        """Whether heads are added up before the last matrix."""
        return False

    def width(self, d_model: int) -> int:
        return self.head_dim or d_model // self.n_heads  # type: ignore[operator,return-value]

    def v_width(self, d_model: int) -> int:
        return self.v_head_dim or self.width(d_model)  # type: ignore[return-value]

    def heads(self) -> tuple[int, int]:
        """Query heads and key heads of a resolved layer."""
        H: int = self.n_heads  # type: ignore[assignment]
        K: int = self.n_kv_heads or H  # type: ignore[assignment]
        return H, K

    def rotated(self, block: BlockSpec) -> tuple[int, int]:
        return sum(self.heads()), self.width(block.d_model)

    def scored(self, block: BlockSpec) -> int:
        return self.heads()[0]

    def n_keys(self, T: int) -> int:
        return min(T, self.window or T)  # type: ignore[type-var,return-value]

    def widths(self, d_model: int) -> tuple[int, int, int]:
        """Rows of the matrix for queries and keys, of that for values, and columns of the last one."""
        (H, K), v = self.heads(), self.v_width(d_model)
        return (H + K) * self.width(d_model), K * v, v if self.sums else H * v

    def build(self, block: BlockSpec) -> nn.Module:
        return CausalAttention(self, block)

    def n_parameters(self, block: BlockSpec) -> int:
        d, bias, (H, _) = block.d_model, block.bias_of(self), self.heads()
        qk, v, merged = self.widths(d)
        total = self.linear.n_parameters(d, qk + v, bias)
        total += (self.out_linear or self.linear).n_parameters(merged, d, bias)
        total += self.qk_norm.n_parameters(self.width(d)) + self.softmax.n_parameters(H) + self.sink.n_parameters(H)  # type: ignore[union-attr]
        total += self.gate.n_parameters(d, self.linear, bias, H, self.v_width(d))  # type: ignore[union-attr]
        return total + (0 if block.position.shared else block.position.bias_parameters(block))

    def ops(self, block: BlockSpec, T: int) -> Ops:
        d, bias, (H, K), v = block.d_model, block.bias_of(self), self.heads(), self.v_width(block.d_model)
        qk, values, merged = self.widths(d)
        total = self.linear.ops(d, qk + values, bias) + (self.out_linear or self.linear).ops(merged, d, bias)
        total += self.qk_norm.ops(H + K, self.width(d)) + self.gate.ops(d, self.linear, bias, H, v)  # type: ignore[union-attr]
        if self.v_norm:
            total += K * Ops(multiplies=2 * v, additions=v, divisions=2, reductions=1)
        if self.sums:
            total += Ops(additions=(H - 1) * v)
        return total + block.position.ops(block, T) + scores_ops(self, block, H, self.width(d), v, T)

    def refuses(self, block: BlockSpec) -> str | None:
        d, H, K = block.d_model, self.n_heads, self.n_kv_heads
        assert not isinstance(H, tuple) and not isinstance(K, tuple)
        assert not isinstance(self.head_dim, tuple) and not isinstance(self.v_head_dim, tuple)
        if H < 1:
            return f"n_heads={H} must be at least 1"
        if self.head_dim is None and d % H:
            return (
                f"d_model={d} is not divisible by n_heads={H}; try {_near_multiples(d, H)}, or set attention.head_dim"
            )
        if self.head_dim is not None and self.head_dim < 1:
            return f"head_dim={self.head_dim} must be at least 1"
        if self.v_head_dim is not None and self.v_head_dim < 1:
            return f"v_head_dim={self.v_head_dim} must be at least 1"
        if K is not None and not 1 <= K <= H:
            return f"n_kv_heads={K} must lie in 1 .. n_heads={H}: a key head without a query is never read"
        for name in ("qk_norm", "linear", "out_linear"):
            part = getattr(self, name)
            if part is not None and (reason := part.refuses(block)):
                return f"{name}={kind_of(part)}: {reason}"
        return scores_refuse(self, block)


@dataclass(frozen=True)
class Causal(Heads):
    """softmax(q k^T / sqrt(h)) v over the tokens so far (MHA), with fewer key heads GQA, with one MQA.

    Sources: arXiv:1706.03762, arXiv:2305.13245 (GQA). Options in their order of action: norm of q and k, positions,
    scores, soft-cap, mask and score bias, softmax with sink, sum of values, gate.
    """

    @classmethod
    def small(cls) -> Causal:
        """Fits the width that the conformance suite uses."""
        return cls(n_heads=4, n_kv_heads=2)


@dataclass(frozen=True)
class Infinite(Heads):
    """Causal attention whose heads have sizes of their own, as many as one likes, added up or side by side.

    y = W sum_h y_h (merge: sum) or W (y_1, ..., y_H) (concat).   Source: ReaLLM-Forge. Its n_cproj, a sum of several
    last matrices of one vector, is left out: it equals one matrix, the sum of them.

    merge: sum adds the heads up before the last matrix, concat puts them side by side
    """

    head_dim: int | tuple[int, ...] | None = 64
    merge: Literal["sum", "concat"] = "sum"

    @property
    def sums(self) -> bool:
        return self.merge == "sum"

    @classmethod
    def small(cls) -> Infinite:
        """Fits the width that the conformance suite uses."""
        return cls(n_heads=5, n_kv_heads=2, head_dim=6, v_head_dim=7)


class CausalAttention(nn.Module):
    def __init__(self, spec: Heads, block: BlockSpec) -> None:
        super().__init__()
        d, bias = block.d_model, block.bias_of(spec)
        self.H, self.K = spec.heads()
        self.h, self.v = spec.width(d), spec.v_width(d)
        self.v_norm, self.sums = spec.v_norm, spec.sums
        qk, values, merged = self.widths = spec.widths(d)
        self.rotation = block.position.rotation(self.h)
        self.qkv = spec.linear.build(d, qk + values, bias, "matrix")
        self.out = (spec.out_linear or spec.linear).build(merged, d, bias, "residual")
        self.qk_norm = spec.qk_norm.build(self.h, block.seq_len)  # type: ignore[union-attr]
        self.scores = Scores(spec, block, self.H, 1.0 if spec.qk_norm.scales else None)  # type: ignore[union-attr]
        self.gate = spec.gate.build(block, spec.linear, bias, self.H, self.v)  # type: ignore[union-attr]

    @property
    def window(self) -> int | None:
        return self.scores.window

    def memory(self) -> dict[str, Field]:
        return {"k": Field((self.K, self.h)), "v": Field((self.K, self.v))}

    def flops_per_token(self, T: int) -> float:
        """Scores and weighted sum over min(T, window) keys, causality not subtracted (the convention of PaLM's MFU)."""
        return 2.0 * self.H * (self.h + self.v) * min(T, self.window or T)

    def prepare(self, at: At, cached: bool, dtype: torch.dtype) -> None:
        assert at.tables is not None
        self.scores.prepare(at, cached)
        if self.rotation is not None and self.rotation.key not in at.tables:
            at.tables[self.rotation.key] = self.rotation.tables(at, dtype)

    def forward(self, x: Tensor, at: At, mem: Mem | None = None, shared: tuple = ()) -> tuple[Tensor, tuple]:
        q, k, v = self.project(x, at)
        if mem is not None:
            k, v = mem.append(at, k=k, v=v)
        y = self.scores(q, k, v, at, mem is not None).transpose(1, 2)  # [B, T, H, v]
        if self.gate is not None:
            y = self.gate(x, y)
        return self.out(y.sum(2) if self.sums else y.flatten(2)), shared

    def project(self, x: Tensor, at: At) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> q [B, H, T, h], k [B, K, T, h], v [B, K, T, v], normed and turned."""
        assert at.tables is not None
        B, T, _ = x.shape
        H, K = self.H, self.K
        qk, v = self.qkv(x).split(self.widths[:2], -1)
        qk, v = qk.view(B, T, H + K, self.h), v.view(B, T, K, self.v)
        turn = (None, None) if self.rotation is None else at.tables[self.rotation.key]
        if self.qk_norm is not None:
            q, k = self.qk_norm(qk, H, *turn)
        elif self.rotation is not None:
            q, k = qk_norm_rope(qk, H, *turn)
        else:
            q, k = qk.split((H, K), 2)
        if self.v_norm:
            v = unit_length(v).to(v.dtype)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def weights(self, x: Tensor, at: At) -> Tensor:
        """The attention weights [B, H, T, S] of a call without memory, for inspection. at: with `prepare`d tables."""
        q, k, _ = self.project(x, at)
        return self.scores.weights(q, k, at)


def _near_multiples(value: int, of: int) -> str:
    low = value // of * of
    return f"{low} or {low + of}" if low else str(of)


Attention.kinds = {
    "causal": Causal,
    "infinite": Infinite,
    "mla": MLA,
    "linear": LinearAttention,
    "diagonal": Diagonal,
    "ssm": SSM,
    "identity": NoMixing,
}
