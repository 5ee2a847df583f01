"""Activations of the MLP, element by element.   Each kind's `build()` gives a callable on tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from models.spec import Part


class Activation(Part):
    """A kind of activation."""

    kinds: ClassVar[dict[str, type]]

    def build(self) -> Callable[[Tensor], Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class GELU(Activation):
    """x Phi(x), exact.   Source: arXiv:1606.08415."""

    def build(self) -> Callable[[Tensor], Tensor]:
        return F.gelu


@dataclass(frozen=True)
class GELUTanh(Activation):
    """GELU by its tanh formula, as GPT-2 has it ("gelu_new"); differs from the exact one by up to 5e-4."""

    def build(self) -> Callable[[Tensor], Tensor]:
        return partial(F.gelu, approximate="tanh")


@dataclass(frozen=True)
class SiLU(Activation):
    """x sigmoid(x)."""

    def build(self) -> Callable[[Tensor], Tensor]:
        return F.silu


@dataclass(frozen=True)
class ReLU(Activation):
    """max(x, 0)."""

    def build(self) -> Callable[[Tensor], Tensor]:
        return F.relu


@dataclass(frozen=True)
class SquaredReLU(Activation):
    """max(x, 0)^2.   Source: Primer, arXiv:2109.08668."""

    def build(self) -> Callable[[Tensor], Tensor]:
        return lambda x: F.relu(x).square()


Activation.kinds = {"gelu": GELU, "gelu_tanh": GELUTanh, "silu": SiLU, "relu": ReLU, "relu2": SquaredReLU}
