"""Per-token feed-forward networks.   D model width, M hidden width.

A network is a module `forward(x [B, T, D], at) -> [B, T, D]`; `at` says where the tokens stand, and a network with a
loss of its own (load balance) hands it to `at.add_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from models.memory import At
from models.parts.activation import GELU, Activation, SiLU
from models.parts.linear import Dense, Linear
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class MLP(Part):
    """A kind of MLP: `build(block)` gives a module [B, T, D] -> [B, T, D]."""

    kinds: ClassVar[dict[str, type]]

    def build(self, block: BlockSpec) -> nn.Module:
        raise NotImplementedError

    def n_parameters(self, block: BlockSpec) -> int:
        raise NotImplementedError

    def refuses(self, block: BlockSpec) -> str | None:
        return None


@dataclass(frozen=True)
class Plain(MLP):
    """y = W2 act(W1 x).

    hidden: hidden width, one or one per layer; none: 4 * d_model
    activation: what stands between the two matrices
    bias: whether the matrices have biases; none: as the family's `bias` says
    linear: kind of linear layer
    """

    hidden: int | tuple[int, ...] | None = None
    activation: Activation = field(default_factory=GELU)
    bias: bool | None = None
    linear: Linear = field(default_factory=Dense)

    @classmethod
    def small(cls) -> Plain:
        """Fits the width that the conformance suite uses."""
        return cls(hidden=24)

    def width(self, d: int) -> int:
        return self.hidden if isinstance(self.hidden, int) else 4 * d

    def build(self, block: BlockSpec) -> nn.Module:
        return PlainMLP(self, block)

    def n_parameters(self, block: BlockSpec) -> int:
        d, m, bias = block.d_model, self.width(block.d_model), block.bias_of(self)
        return self.linear.n_parameters(d, m, bias) + self.linear.n_parameters(m, d, bias)

    def refuses(self, block: BlockSpec) -> str | None:
        return _positive(self.width(block.d_model))


@dataclass(frozen=True)
class SwiGLU(MLP):
    """y = W3 (act(W1 x) * W2 x), with SiLU unless another activation is named.   Source: arXiv:2002.05202.

    hidden: hidden width, one or one per layer; none: 8/3 * d_model rounded up to a multiple of 64, which gives about
        as many parameters as a plain MLP of 4 * d_model
    activation: applied to the gate
    bias: whether the matrices have biases; none: as the family's `bias` says
    linear: kind of linear layer
    """

    hidden: int | tuple[int, ...] | None = None
    activation: Activation = field(default_factory=SiLU)
    bias: bool | None = None
    linear: Linear = field(default_factory=Dense)

    @classmethod
    def small(cls) -> SwiGLU:
        """Fits the width that the conformance suite uses."""
        return cls(hidden=24)

    def width(self, d: int) -> int:
        return self.hidden if isinstance(self.hidden, int) else -(-(8 * d) // (3 * 64)) * 64

    def build(self, block: BlockSpec) -> nn.Module:
        return GatedMLP(self, block)

    def n_parameters(self, block: BlockSpec) -> int:
        d, m, bias = block.d_model, self.width(block.d_model), block.bias_of(self)
        return self.linear.n_parameters(d, 2 * m, bias) + self.linear.n_parameters(m, d, bias)

    def refuses(self, block: BlockSpec) -> str | None:
        return _positive(self.width(block.d_model))


class PlainMLP(nn.Module):
    def __init__(self, spec: Plain, block: BlockSpec) -> None:
        super().__init__()
        d, m, bias = block.d_model, spec.width(block.d_model), block.bias_of(spec)
        self.up = spec.linear.build(d, m, bias, "matrix")
        self.down = spec.linear.build(m, d, bias, "residual")
        self.act: Callable[[Tensor], Tensor] = spec.activation.build()

    def forward(self, x: Tensor, at: At) -> Tensor:  # [B, T, D]
        return self.down(self.act(self.up(x)))


class GatedMLP(nn.Module):
    """One matrix holds gate and up, so that there is one product instead of two."""

    def __init__(self, spec: SwiGLU, block: BlockSpec) -> None:
        super().__init__()
        d, m, bias = block.d_model, spec.width(block.d_model), block.bias_of(spec)
        self.gate_up = spec.linear.build(d, 2 * m, bias, "matrix")
        self.down = spec.linear.build(m, d, bias, "residual")
        self.act: Callable[[Tensor], Tensor] = spec.activation.build()

    def forward(self, x: Tensor, at: At) -> Tensor:  # [B, T, D]
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.act(gate) * up)


def _positive(hidden: int) -> str | None:
    return None if hidden > 0 else f"hidden={hidden} must be above 0"


MLP.kinds = {"mlp": Plain, "swiglu": SwiGLU}
