"""Norms of queries and keys, per head, before they are turned.   H query heads, K key heads, h head size.

A norm is a module (qk [B, T, H + K, h] with queries first, H, cos, sin) -> q [B, T, H, h], k [B, T, K, h], turned by
the tables of models/parts/rotation.py where they are given. Statistics are taken in float32 at least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from kernels.op import wide as wide_dtype
from kernels.qk_norm_rope import qk_norm_rope
from models.cost import Ops
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class QKNorm(Part):
    """A kind of norm of queries and keys.

    scales: whether it takes the place of the 1 / sqrt(h) that scores are multiplied by otherwise.
    """

    kinds: ClassVar[dict[str, type]]
    scales: ClassVar[bool] = False

    def build(self, head_dim: int, seq_len: int) -> nn.Module | None:
        return None

    def n_parameters(self, head_dim: int) -> int:
        return 0

    def ops(self, heads: int, head_dim: int) -> Ops:
        """Per token, `heads` of queries and keys together."""
        return Ops()

    def refuses(self, block: BlockSpec) -> str | None:
        return None


@dataclass(frozen=True)
class NoQKNorm(QKNorm):
    """Queries and keys as they are."""


@dataclass(frozen=True)
class L2QKNorm(QKNorm):
    """score = g (q / (|q| + eps)) (k / (|k| + eps)), so that scores lie in [-g, g].   Source: arXiv:2010.04245.

    g is one number per layer; it takes the place of 1 / sqrt(h) in every way of computing the scores. The norm stands
    before rotary positions, which leave lengths alone, so either order is the same.

    scale: where g starts: a number, `inv_sqrt` = 1 / sqrt(h) (nearly uniform attention: the paper of the hypersphere
        GPT), or `length` = log2(L^2 - L) with L = seq_len (arXiv:2010.04245; about 20 at 1024)
    learned: whether g is learned
    eps: keeps a zero vector finite, > 0
    """

    scale: Literal["inv_sqrt", "length"] | float = 10.0
    learned: bool = True
    eps: float = 1e-6
    scales: ClassVar[bool] = True

    def start(self, head_dim: int, seq_len: int) -> float:
        """Where g starts."""
        if self.scale == "inv_sqrt":
            return head_dim**-0.5
        return math.log2(seq_len**2 - seq_len) if self.scale == "length" else float(self.scale)

    def build(self, head_dim: int, seq_len: int) -> nn.Module | None:
        return UnitQK(self.start(head_dim, seq_len), self.learned, self.eps)

    def n_parameters(self, head_dim: int) -> int:
        return 1 if self.learned else 0

    def ops(self, heads: int, head_dim: int) -> Ops:
        per_head = Ops(multiplies=2 * head_dim + 1, additions=head_dim, divisions=2, reductions=1)
        return heads * per_head

    def refuses(self, block: BlockSpec) -> str | None:
        if self.scale == "length" and block.seq_len < 2:
            return f"scale=length is log2(L^2 - L), which seq_len={block.seq_len} has not"
        if isinstance(self.scale, float) and not self.scale > 0:
            return f"scale={self.scale} must be above 0; 10 is usual"
        return None if self.eps > 0 else f"eps={self.eps} must be above 0, or a zero vector gives NaN; 1e-6 is usual"


@dataclass(frozen=True)
class RMSQKNorm(QKNorm):
    """q / sqrt(mean(q^2) + eps) * gain_q, keys alike; scores / sqrt(h) as ever.   Source: Qwen3, arXiv:2505.09388.

    The gains are per channel, so the norm stands before rotary positions, as in Qwen3.

    eps: added to the mean square, > 0
    """

    eps: float = 1e-6

    def build(self, head_dim: int, seq_len: int) -> nn.Module | None:
        return RootMeanSquareQK(head_dim, self.eps)

    def n_parameters(self, head_dim: int) -> int:
        return 2 * head_dim

    def ops(self, heads: int, head_dim: int) -> Ops:
        per_head = Ops(multiplies=3 * head_dim + 1, additions=head_dim, divisions=2, reductions=1)
        return heads * per_head

    def refuses(self, block: BlockSpec) -> str | None:
        return None if self.eps > 0 else f"eps={self.eps} must be above 0, or a zero vector gives NaN; 1e-6 is usual"


class UnitQK(nn.Module):
    roles = {"g": "scalar"}

    def __init__(self, start: float, learned: bool, eps: float) -> None:
        super().__init__()
        self.start, self.eps = start, eps
        self.initial = {"g": start}
        self.g = nn.Parameter(torch.tensor(start)) if learned else None

    def forward(
        self, qk: Tensor, H: int, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        g = qk.new_full((1,), self.start, dtype=wide_dtype(qk.dtype)) if self.g is None else self.g
        return qk_norm_rope(qk, H, cos, sin, norm="l2", gain_q=g.expand(qk.shape[-1]), eps=self.eps)


class RootMeanSquareQK(nn.Module):
    roles = {"q": "gain", "k": "gain"}

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.q, self.k = nn.Parameter(torch.ones(head_dim)), nn.Parameter(torch.ones(head_dim))

    def forward(
        self, qk: Tensor, H: int, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return qk_norm_rope(qk, H, cos, sin, norm="rms", gain_q=self.q, gain_k=self.k, eps=self.eps)


def unit_length(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / (|x| + eps) over the last axis, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + eps)


QKNorm.kinds = {"none": NoQKNorm, "l2": L2QKNorm, "rms": RMSQKNorm}
