"""Kolmogorov-Arnold networks: a learned curve for every pair of input and output.   D model width, n order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cost import Ops, elementwise
from models.memory import At
from models.parts.activation import Activation, SiLU
from models.parts.feedforward import MLP
from models.parts.linear import Dense, Linear
from models.parts.norm import LayerNorm

if TYPE_CHECKING:
    from models.parts.block import BlockSpec

NORM = LayerNorm(eps=1e-5, bias=True)


@dataclass(frozen=True)
class KAN(MLP):
    """y = act(layernorm(W0 act(x) + sum_k W_k P_k(tanh x) + b)), P_1..P_n the Legendre polynomials; layer upon layer.

    tanh brings each number into [-1, 1] by itself. P_0 = 1 for every input, so that its weights add up to the one
    vector b. The last layer has width D.   Sources: KAN, arXiv:2404.19756; Legendre form as in ReaLLM-Forge.

    order: n, the highest degree
    activation: act
    middle: widths between the layers, any number of them; none: a single layer D -> D
    linear: kind of linear layer
    """

    lists: ClassVar[tuple[str, ...]] = ("middle",)  # a list itself and not one value per layer

    order: int | tuple[int, ...] = 3
    activation: Activation = field(default_factory=SiLU)
    middle: tuple[int, ...] = ()
    linear: Linear = field(default_factory=Dense)

    @classmethod
    def small(cls) -> KAN:
        """Fits what the conformance suite uses; two layers, so that one stands behind another."""
        return cls(middle=(12,))

    def sizes(self, d: int) -> list[tuple[int, int]]:
        """Width in and out of each layer."""
        widths = [d, *self.middle, d]
        return list(pairwise(widths))

    def build(self, block: BlockSpec) -> nn.Module:
        return Curves(self, block)

    def n_parameters(self, block: BlockSpec) -> int:
        n: int = self.order  # type: ignore[assignment]
        total = 0
        for i, o in self.sizes(block.d_model):
            matrices = self.linear.n_parameters(i, o, False) + self.linear.n_parameters(n * i, o, True)
            total += matrices + NORM.n_parameters(o, True) + self.activation.n_parameters()
        return total

    def ops(self, block: BlockSpec) -> Ops:
        n: int = self.order  # type: ignore[assignment]
        total = Ops()
        for i, o in self.sizes(block.d_model):
            curves = elementwise(i, exponentials=1, multiplies=3 * (n - 1), additions=n - 1)
            matrices = self.linear.ops(i, o, False) + self.linear.ops(n * i, o, True) + Ops(additions=o)
            total += matrices + curves + (i + o) * self.activation.ops() + NORM.ops(o, True)
        return total

    def refuses(self, block: BlockSpec) -> str | None:
        if self.order < 1:  # type: ignore[operator]
            return f"order={self.order} must be at least 1: P_0 is a constant"
        if any(width < 1 for width in self.middle):
            return f"middle={list(self.middle)} must be widths of at least 1"
        return self.activation.refuses(block) or self.linear.refuses(block)


class Curves(nn.Module):
    def __init__(self, spec: KAN, block: BlockSpec) -> None:
        super().__init__()
        sizes = spec.sizes(block.d_model)
        last = len(sizes) - 1
        roles = ["residual" if k == last else "matrix" for k in range(len(sizes))]
        self.layers = nn.ModuleList(CurveLayer(spec, i, o, role) for (i, o), role in zip(sizes, roles, strict=True))

    def forward(self, x: Tensor, at: At) -> Tensor:  # [B, T, D]
        for layer in self.layers:
            x = layer(x)
        return x


class CurveLayer(nn.Module):
    def __init__(self, spec: KAN, d_in: int, d_out: int, role: str) -> None:
        super().__init__()
        self.order: int = spec.order  # type: ignore[assignment]
        self.base = spec.linear.build(d_in, d_out, False, role)
        self.curves = spec.linear.build(self.order * d_in, d_out, True, role)
        self.norm = NORM.build(d_out, True)
        self.act: Callable[[Tensor], Tensor] = spec.activation.build()

    def forward(self, x: Tensor) -> Tensor:
        curves = self.curves(torch.cat(legendre(F.tanh(x), self.order), -1))
        return self.act(self.norm(self.base(self.act(x)) + curves))


def legendre(x: Tensor, order: int) -> list[Tensor]:
    """P_1(x), ..., P_order(x) by (k + 1) P_{k+1} = (2 k + 1) x P_k - k P_{k-1}."""
    values = [torch.ones_like(x), x]
    for k in range(1, order):
        values.append(((2 * k + 1) * x * values[k] - k * values[k - 1]) / (k + 1))
    return values[1:]
