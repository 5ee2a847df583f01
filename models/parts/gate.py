"""Output gates of attention: what a token lets through of what its heads have read.   H heads, v value size.

A gate is a module (x [B, T, D], y [B, T, H, v]) -> the shape of y; x is what the mixer read.
Source: arXiv:2505.06708.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from models.cost import Ops
from models.parts.linear import Linear
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class Gate(Part):
    """A kind of gate. `linear` and `bias` are the attention's own."""

    kinds: ClassVar[dict[str, type]]

    def width(self, n_heads: int, v_head_dim: int) -> int:
        """How many gates a token has."""
        return 0

    def build(self, block: BlockSpec, linear: Linear, bias: bool, n_heads: int, v_head_dim: int) -> nn.Module | None:
        n = self.width(n_heads, v_head_dim)
        return SigmoidGate(linear.build(block.d_model, n, bias, "matrix"), n_heads) if n else None

    def n_parameters(self, d_model: int, linear: Linear, bias: bool, n_heads: int, v_head_dim: int) -> int:
        n = self.width(n_heads, v_head_dim)
        return linear.n_parameters(d_model, n, bias) if n else 0

    def ops(self, d_model: int, linear: Linear, bias: bool, n_heads: int, v_head_dim: int) -> Ops:
        n = self.width(n_heads, v_head_dim)
        if not n:
            return Ops()
        sigmoids = Ops(exponentials=n, divisions=n, additions=n)
        return linear.ops(d_model, n, bias) + sigmoids + Ops(multiplies=n_heads * v_head_dim)


@dataclass(frozen=True)
class NoGate(Gate):
    """y."""


@dataclass(frozen=True)
class HeadGate(Gate):
    """sigmoid(W x)_h y_h: one gate per head."""

    def width(self, n_heads: int, v_head_dim: int) -> int:
        return n_heads


@dataclass(frozen=True)
class ElementwiseGate(Gate):
    """sigmoid(W x) * y: one gate per channel of every head."""

    def width(self, n_heads: int, v_head_dim: int) -> int:
        return n_heads * v_head_dim


class SigmoidGate(nn.Module):
    def __init__(self, linear: nn.Module, n_heads: int) -> None:
        super().__init__()
        self.linear, self.n_heads = linear, n_heads

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gates = self.linear(x).sigmoid()  # [B, T, H] or [B, T, H v]
        return y * gates.view(*gates.shape[:2], self.n_heads, -1)


Gate.kinds = {"none": NoGate, "head": HeadGate, "elementwise": ElementwiseGate}
