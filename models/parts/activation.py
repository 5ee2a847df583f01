"""Activations of the MLP, element by element.   Each kind's `build()` gives a callable on tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn import functional as F

from models.cost import Ops
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class Activation(Part):
    """A kind of activation: `build`, `n_parameters`, `ops` (of one element).

    `build()` gives a function [..., M] -> [..., M]; those with parameters, or that differ in training, are modules.
    """

    kinds: ClassVar[dict[str, type]]

    def build(self) -> Callable[[Tensor], Tensor]:
        raise NotImplementedError

    def n_parameters(self) -> int:
        return 0

    def ops(self) -> Ops:
        raise NotImplementedError

    def refuses(self, block: BlockSpec) -> str | None:
        return None


@dataclass(frozen=True)
class GELU(Activation):
    """x Phi(x), exact.   Source: arXiv:1606.08415."""

    def build(self) -> Callable[[Tensor], Tensor]:
        return F.gelu

    def ops(self) -> Ops:
        return Ops(multiplies=3, additions=1, exponentials=1)


@dataclass(frozen=True)
class GELUTanh(Activation):
    """GELU by its tanh formula, as GPT-2 has it ("gelu_new"); differs from the exact one by up to 5e-4."""

    def build(self) -> Callable[[Tensor], Tensor]:
        return partial(F.gelu, approximate="tanh")

    def ops(self) -> Ops:
        return Ops(multiplies=6, additions=2, exponentials=1)


@dataclass(frozen=True)
class SiLU(Activation):
    """x sigmoid(x)."""

    def build(self) -> Callable[[Tensor], Tensor]:
        return F.silu

    def ops(self) -> Ops:
        return Ops(multiplies=1, exponentials=1)


@dataclass(frozen=True)
class ReLU(Activation):
    """max(x, 0)."""

    def build(self) -> Callable[[Tensor], Tensor]:
        return F.relu

    def ops(self) -> Ops:
        return Ops(additions=1)


@dataclass(frozen=True)
class SquaredReLU(Activation):
    """max(x, 0)^2.   Source: Primer, arXiv:2109.08668."""

    def build(self) -> Callable[[Tensor], Tensor]:
        return lambda x: F.relu(x).square()

    def ops(self) -> Ops:
        return Ops(multiplies=1, additions=1)


Activation.kinds = {"gelu": GELU, "gelu_tanh": GELUTanh, "silu": SiLU, "relu": ReLU, "relu2": SquaredReLU}
