"""Norms over the last axis, of width D. Statistics are taken in float32 at least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cost import Ops, elementwise
from models.roles import mark
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class Norm(Part):
    """A kind of norm over width d: `build`, `n_parameters`, `ops` (of one token); bias is the family's default."""

    kinds: ClassVar[dict[str, type]]

    def build(self, d: int, bias: bool) -> nn.Module:
        raise NotImplementedError

    def n_parameters(self, d: int, bias: bool) -> int:
        raise NotImplementedError

    def ops(self, d: int, bias: bool) -> Ops:
        raise NotImplementedError

    def refuses(self, block: BlockSpec) -> str | None:
        return None


@dataclass(frozen=True)
class LayerNorm(Norm):
    """y = (x - mean) / sqrt(variance + eps) * gain + bias.   Source: arXiv:1607.06450.

    eps: added to the variance, > 0
    bias: whether there is a bias; none: as the family's `bias` says
    """

    eps: float = 1e-5
    bias: bool | None = None

    def build(self, d: int, bias: bool) -> nn.Module:
        bias = self.bias if self.bias is not None else bias
        norm = nn.LayerNorm(d, self.eps, bias=bias)
        return mark(norm, weight="gain", bias="bias") if bias else mark(norm, weight="gain")

    def n_parameters(self, d: int, bias: bool) -> int:
        return d * (2 if (self.bias if self.bias is not None else bias) else 1)

    def ops(self, d: int, bias: bool) -> Ops:
        shift = 1 if (self.bias if self.bias is not None else bias) else 0
        return elementwise(d, multiplies=3, additions=3 + shift) + Ops(divisions=2, reductions=2)

    def refuses(self, block: BlockSpec) -> str | None:
        return _eps(self.eps)


@dataclass(frozen=True)
class RMSNorm(Norm):
    """y = x / sqrt(mean(x^2) + eps) * gain.   Source: arXiv:1910.07467.

    eps: added to the mean square, > 0
    """

    eps: float = 1e-5

    def build(self, d: int, bias: bool) -> nn.Module:
        return RootMeanSquareNorm(d, self.eps)

    def n_parameters(self, d: int, bias: bool) -> int:
        return d

    def ops(self, d: int, bias: bool) -> Ops:
        return elementwise(d, multiplies=3, additions=1) + Ops(divisions=2, reductions=1)

    def refuses(self, block: BlockSpec) -> str | None:
        return _eps(self.eps)


class RootMeanSquareNorm(nn.Module):
    """RMSNorm; [..., D] -> [..., D] in x's dtype."""

    roles = {"weight": "gain"}

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def _eps(eps: float) -> str | None:
    return None if eps > 0 else f"eps={eps} must be above 0, or a zero vector gives NaN; 1e-5 is usual"


Norm.kinds = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
