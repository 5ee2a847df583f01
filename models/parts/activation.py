"""Activations of the MLP, element by element.   Each kind's `build()` gives a callable on tensors.

Here stand those with parameters, and the registry; the others are in activation_fixed.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cost import WIDTH, Ops
from models.parts.activation_fixed import (
    CELU,
    ELU,
    GELU,
    SELU,
    Activation,
    Disco,
    GELUTanh,
    HardSwish,
    LeakyReLU,
    Mish,
    NoActivation,
    PowerReLU,
    ReLU,
    ReLU6,
    RReLU,
    Sigmoid,
    SiLU,
    Softplus,
    SoftShrink,
    SoftSign,
    SquaredGELU,
    SquaredReLU,
    Tanh,
)
from models.parts.curve import Curve, inverse_softplus
from models.parts.numeric import require


@dataclass(frozen=True)
class PReLU(Activation):
    """x for x > 0, else s x with one s learned per layer.   Source: arXiv:1502.01852.

    slope: where s starts
    """

    slope: float = 0.25

    def build(self) -> Callable[[Tensor], Tensor]:
        return Learned(lambda x, s: torch.where(x > 0, x, s * x), self.slope)

    def n_parameters(self) -> int:
        return 1

    def ops(self) -> Ops:
        return Ops(multiplies=1, additions=1)


@dataclass(frozen=True)
class ShiftedGELU(Activation):
    """gelu(x - s) with one s learned per layer.

    shift: where s starts
    """

    shift: float = 0.0

    def build(self) -> Callable[[Tensor], Tensor]:
        return Learned(lambda x, s: F.gelu(x - s), self.shift)

    def n_parameters(self) -> int:
        return 1

    def ops(self) -> Ops:
        return Ops(multiplies=3, additions=2, exponentials=1)


@dataclass(frozen=True)
class Snake(Activation):
    """x + sin(a x)^2 / a with one a > 0 learned per layer, by its logarithm.   Source: arXiv:2006.08195.

    frequency: where a starts, above 0
    """

    frequency: float = 1.0

    def __post_init__(self) -> None:
        require(self.frequency > 0, f"snake: frequency={self.frequency} must be above 0; 1 is usual")

    def build(self) -> Callable[[Tensor], Tensor]:
        return Learned(lambda x, s: x + (s.exp() * x).sin().square() * (-s).exp(), math.log(self.frequency))

    def n_parameters(self) -> int:
        return 1

    def ops(self) -> Ops:
        return Ops(multiplies=3, additions=1, exponentials=1)


@dataclass(frozen=True)
class XIELU(Activation):
    """p x^2 + b x for x > 0, else n (e^x - 1 - x) + b x, with p > 0 and n > b learned per layer.   Source: 2411.13010.

    start: where p and n start, above beta
    beta: b, the slope at 0
    """

    start: float = 0.8
    beta: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.beta < self.start, f"xielu: beta={self.beta} must lie in (0, start={self.start})")

    def build(self) -> Callable[[Tensor], Tensor]:
        beta = self.beta

        def curve(x: Tensor, p: Tensor, n: Tensor) -> Tensor:
            left = (beta + F.softplus(n)) * (torch.expm1(x.clamp(max=0)) - x)
            return torch.where(x > 0, F.softplus(p) * x.square(), left) + beta * x

        return Learned(curve, inverse_softplus(self.start), inverse_softplus(self.start - beta))

    def n_parameters(self) -> int:
        return 2

    def ops(self) -> Ops:
        return Ops(multiplies=3, additions=4, exponentials=1)


class Learned(nn.Module):
    """A function of x and one or two learned numbers."""

    def __init__(self, function: Callable[..., Tensor], *starts: float) -> None:
        super().__init__()
        self.function = function
        names = ("number", "other")[: len(starts)]
        self.names, self.roles = names, dict.fromkeys(names, "scalar")
        self.initial = dict(zip(names, starts, strict=True))
        for name, start in self.initial.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(start)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *[getattr(self, name).to(x.dtype) for name in self.names])


@dataclass(frozen=True)
class Pieces(Activation):
    """Straight pieces between learned knots, constant on the left, of slope 1 on the right; starts as `start`.

    Continuous everywhere, and the knots keep their order.

    knots: number of knots, at least 2
    span: knots start equally spaced on [-span, span]
    start: the curve that the knots start on
    """

    knots: int = 7
    span: float = 2.0
    start: Literal["gelu", "relu", "silu", "tanh"] = "gelu"

    form: ClassVar[Literal["one", "last", "spline"]] = "one"
    terms: ClassVar[int] = 1  # products per element

    def __post_init__(self) -> None:
        require(self.knots >= 2, f"knots={self.knots} must be at least 2")
        require(self.span > 0, f"span={self.span} must be above 0")
        require(self.knots <= self.span * 1000, f"knots={self.knots} stand closer than 0.002 on a span of {self.span}")

    def build(self) -> Callable[[Tensor], Tensor]:
        curve = STARTS[self.start]
        return Curve(self.knots, self.span, lambda x: curve(torch.tensor(x, device="cpu")).item(), self.form)

    def n_parameters(self) -> int:
        return 2 * self.knots

    def ops(self) -> Ops:
        """A binary search, the look-up of a piece's start and coefficients, and its polynomial."""
        search = math.ceil(math.log2(self.knots + 1))
        terms = self.terms
        return Ops(multiplies=terms, additions=search + 1 + terms, table_bytes=(2 + terms) * WIDTH / 8)


@dataclass(frozen=True)
class PFLA(Pieces):
    """Straight pieces between many learned knots, constant on the left, of slope 1 on the right; starts as `start`.

    Continuous everywhere, and the knots keep their order; more of them, over a wider span, than `piecewise`.
    """

    knots: int = 50
    span: float = 10.0


@dataclass(frozen=True)
class PFLAExtended(PFLA):
    """Straight pieces between learned knots, constant on the left, the last piece goes on; starts as `start`.

    Continuous everywhere, and the knots keep their order.
    """

    form = "last"


@dataclass(frozen=True)
class LearnedSpline(Pieces):
    """A natural cubic spline through learned knots, straight beyond them; starts as `start`.

    Value, slope and curvature are continuous, and the knots keep their order. With 30 knots on [-5, 5] it starts
    within 8e-5 of gelu everywhere.   Source: Press et al., Numerical Recipes, section 3.3.

    knots: number of knots, at least 3
    span: knots start equally spaced on [-span, span]
    start: the curve that the knots start on
    """

    knots: int = 30
    span: float = 5.0

    form = "spline"
    terms = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.knots >= 3, f"knots={self.knots} must be at least 3: a spline bends at inner knots")


STARTS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}

Activation.kinds = {
    "gelu": GELU,
    "gelu_tanh": GELUTanh,
    "silu": SiLU,
    "relu": ReLU,
    "relu2": SquaredReLU,
    "relu6": ReLU6,
    "relu_power": PowerReLU,
    "leaky_relu": LeakyReLU,
    "prelu": PReLU,
    "rrelu": RReLU,
    "elu": ELU,
    "celu": CELU,
    "selu": SELU,
    "mish": Mish,
    "hardswish": HardSwish,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "softplus": Softplus,
    "softsign": SoftSign,
    "softshrink": SoftShrink,
    "identity": NoActivation,
    "disco": Disco,
    "squared_gelu": SquaredGELU,
    "gelu_shifted": ShiftedGELU,
    "snake": Snake,
    "xielu": XIELU,
    "piecewise": Pieces,
    "pfla": PFLA,
    "pfla_le": PFLAExtended,
    "learned_spline": LearnedSpline,
}
