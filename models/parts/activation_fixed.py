"""Activations without parameters, and the base class of activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cost import Ops
from models.parts.numeric import require
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


class Fixed(Activation):
    """A kind without options: its function and its counts say all."""

    function: ClassVar[Any]  # Tensor -> Tensor; a Callable would be taken for a method
    counts: ClassVar[Ops]

    def build(self) -> Callable[[Tensor], Tensor]:
        return type(self).function

    def ops(self) -> Ops:
        return self.counts


@dataclass(frozen=True)
class GELU(Fixed):
    """x Phi(x), exact.   Source: arXiv:1606.08415."""

    function = staticmethod(F.gelu)
    counts = Ops(multiplies=3, additions=1, exponentials=1)


@dataclass(frozen=True)
class GELUTanh(Fixed):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): GPT-2's gelu_new.   Source: arXiv:1606.08415.

    It differs from the exact one by up to 5e-4.
    """

    function = staticmethod(partial(F.gelu, approximate="tanh"))
    counts = Ops(multiplies=6, additions=2, exponentials=1)


@dataclass(frozen=True)
class SiLU(Fixed):
    """x sigmoid(x).   Source: arXiv:1702.03118."""

    function = staticmethod(F.silu)
    counts = Ops(multiplies=1, exponentials=1)


@dataclass(frozen=True)
class Mish(Fixed):
    """x tanh(log(1 + e^x)).   Source: arXiv:1908.08681."""

    function = staticmethod(F.mish)
    counts = Ops(multiplies=1, additions=1, exponentials=3)


@dataclass(frozen=True)
class HardSwish(Fixed):
    """x min(max(x + 3, 0), 6) / 6.   Source: arXiv:1905.02244."""

    function = staticmethod(F.hardswish)
    counts = Ops(multiplies=2, additions=3)


@dataclass(frozen=True)
class ReLU(Fixed):
    """max(x, 0).   Source: Nair and Hinton, ICML 2010."""

    function = staticmethod(F.relu)
    counts = Ops(additions=1)


@dataclass(frozen=True)
class ReLU6(Fixed):
    """min(max(x, 0), 6).   Source: arXiv:1704.04861."""

    function = staticmethod(F.relu6)
    counts = Ops(additions=2)


@dataclass(frozen=True)
class SquaredReLU(Fixed):
    """max(x, 0)^2.   Source: Primer, arXiv:2109.08668."""

    function = staticmethod(lambda x: F.relu(x).square())
    counts = Ops(multiplies=1, additions=1)


@dataclass(frozen=True)
class SELU(Fixed):
    """1.0507 x for x > 0, else 1.7581 (e^x - 1).   Source: arXiv:1706.02515."""

    function = staticmethod(F.selu)
    counts = Ops(multiplies=1, additions=2, exponentials=1)


@dataclass(frozen=True)
class Sigmoid(Fixed):
    """1 / (1 + e^-x)."""

    function = staticmethod(torch.sigmoid)
    counts = Ops(exponentials=1)


@dataclass(frozen=True)
class Tanh(Fixed):
    """tanh(x)."""

    function = staticmethod(torch.tanh)
    counts = Ops(exponentials=1)


@dataclass(frozen=True)
class SoftSign(Fixed):
    """x / (1 + |x|).   Source: Turian et al., 2009."""

    function = staticmethod(F.softsign)
    counts = Ops(additions=1, divisions=1)


@dataclass(frozen=True)
class Disco(Fixed):
    """x |x|: a square that keeps its sign."""

    function = staticmethod(lambda x: x * x.abs())
    counts = Ops(multiplies=1)


@dataclass(frozen=True)
class SquaredGELU(Fixed):
    """sign(x) gelu(x)^2."""

    function = staticmethod(lambda x: x.sign() * F.gelu(x).square())
    counts = Ops(multiplies=4, additions=1, exponentials=1)


@dataclass(frozen=True)
class NoActivation(Fixed):
    """x."""

    function = staticmethod(lambda x: x)
    counts = Ops()


@dataclass(frozen=True)
class ELU(Activation):
    """x for x > 0, else alpha (e^x - 1).   Source: arXiv:1511.07289.

    alpha: the distance of the left limit below 0, above 0
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        require(self.alpha > 0, f"elu: alpha={self.alpha} must be above 0; 0 would be relu")

    def build(self) -> Callable[[Tensor], Tensor]:
        return partial(F.elu, alpha=self.alpha)

    def ops(self) -> Ops:
        return Ops(multiplies=1, additions=2, exponentials=1)


@dataclass(frozen=True)
class CELU(Activation):
    """x for x > 0, else alpha (e^(x / alpha) - 1): ELU with a continuous slope.   Source: arXiv:1704.07483.

    alpha: the distance of the left limit below 0, above 0
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        require(self.alpha > 0, f"celu: alpha={self.alpha} must be above 0; 0 would be relu")

    def build(self) -> Callable[[Tensor], Tensor]:
        return partial(F.celu, alpha=self.alpha)

    def ops(self) -> Ops:
        return Ops(multiplies=2, additions=2, exponentials=1)


@dataclass(frozen=True)
class LeakyReLU(Activation):
    """x for x > 0, else slope x.   Source: Maas et al., ICML 2013.

    slope: on the left
    """

    slope: float = 0.01

    def build(self) -> Callable[[Tensor], Tensor]:
        return partial(F.leaky_relu, negative_slope=self.slope)

    def ops(self) -> Ops:
        return Ops(multiplies=1, additions=1)


@dataclass(frozen=True)
class RReLU(Activation):
    """x for x > 0, else s x, with s drawn from [lower, upper] in training and their mean else.   Source: 1505.00853.

    lower: least slope on the left
    upper: greatest slope on the left
    """

    lower: float = 0.125
    upper: float = 1 / 3

    def __post_init__(self) -> None:
        require(
            0 <= self.lower <= self.upper <= 1,
            f"rrelu: lower={self.lower} and upper={self.upper} must lie in [0, 1], lower first",
        )

    def build(self) -> Callable[[Tensor], Tensor]:
        return nn.RReLU(self.lower, self.upper)

    def ops(self) -> Ops:
        return Ops(multiplies=1, additions=1)


@dataclass(frozen=True)
class Softplus(Activation):
    """log(1 + e^(beta x)) / beta.   Source: Dugas et al., NIPS 2000.

    beta: sharpness, above 0
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        require(self.beta > 0, f"softplus: beta={self.beta} must be above 0; 1 is usual")

    def build(self) -> Callable[[Tensor], Tensor]:
        return partial(F.softplus, beta=self.beta)

    def ops(self) -> Ops:
        return Ops(multiplies=2, additions=1, exponentials=2)


@dataclass(frozen=True)
class SoftShrink(Activation):
    """x - sign(x) threshold where |x| > threshold, else 0.   Source: Donoho, 1995.

    threshold: what is taken off, above 0. At the start a matrix of standard deviation 0.02 gives elements of about
        0.02 sqrt(d_model): below d_model = 160 few pass 0.5 and little is learned
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        require(self.threshold > 0, f"softshrink: threshold={self.threshold} must be above 0; 0 would be identity")

    @classmethod
    def small(cls) -> SoftShrink:
        """Elements of a narrow model pass it."""
        return cls(threshold=0.01)

    def build(self) -> Callable[[Tensor], Tensor]:
        return partial(F.softshrink, lambd=self.threshold)

    def ops(self) -> Ops:
        return Ops(additions=3)


@dataclass(frozen=True)
class PowerReLU(Activation):
    """max(x, 0)^power.   Source: Primer, arXiv:2109.08668, for the square.

    power: at least 1, or the slope at 0 is infinite
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        require(self.power >= 1, f"relu_power: power={self.power} must be at least 1, or the slope at 0 is infinite")

    def build(self) -> Callable[[Tensor], Tensor]:
        return lambda x: F.relu(x).pow(self.power)

    def ops(self) -> Ops:
        if self.power == int(self.power):
            return Ops(multiplies=self.power - 1, additions=1)
        return Ops(multiplies=1, additions=1, exponentials=2)
