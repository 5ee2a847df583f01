"""Softmaxes without a sum or a maximum over the row: each weight follows from its own score.

Their weights do not sum to one. Divided by a constant they grow with the number of keys; `per_key` divides them by the
number of keys that the query sees instead, which is right for packed documents, windows and every length. As output
softmax the weights are normalised, so that divisors have no effect there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cost import Ops
from models.parts.numeric import require
from models.parts.rows import FLOOR, ZEROS, Rows, Softmax, check_base, clean, count


@dataclass(frozen=True)
class Divided(Softmax):
    """Kinds that are a fixed function w of each score, divided by a constant.

    divisor: a number above 0; none: the kind's usual one, or 1 with per_key
    per_key: whether weights are also divided by the number of keys that the query sees
    """

    divisor: float | None = None
    per_key: bool = False

    sums_to_one = False
    cancels = ("divisor", "per_key")
    usual: ClassVar[float] = 256.0
    counts: ClassVar[Ops]  # of w at one score

    def __post_init__(self) -> None:
        require(self.divisor is None or self.divisor > 0, f"divisor={self.divisor} must be above 0")

    def weigh(self, z: Tensor) -> Tensor:
        """w, of finite z."""
        raise NotImplementedError

    def logs(self, z: Tensor) -> Tensor:
        """log w, where w below FLOOR counts as FLOOR."""
        return self.weigh(z).clamp(min=FLOOR).log()

    def build(self, n_heads: int | None) -> nn.Module:
        return DividedRows(self)

    def ops(self, n_keys: int) -> Ops:
        divide = Ops(multiplies=n_keys) if self.factor() != 1 or self.per_key else Ops()
        return n_keys * self.counts + divide + Ops(divisions=int(self.per_key))

    def factor(self) -> float:
        return self.divisor or (1.0 if self.per_key else self.usual)


class DividedRows(Rows):
    """y_i = w(x_i) / divisor, with per_key also over the number of keys that the query sees."""

    def __init__(self, spec: Divided) -> None:
        super().__init__()
        self.spec, self.divisor = spec, spec.factor()

    def logs(self, z: Tensor) -> Tensor:
        return self.spec.logs(z)

    def forward(self, scores: Tensor, seen: Tensor | None = None) -> Tensor:
        z, visible = clean(scores, seen)
        weights = self.spec.weigh(z) / self.divisor
        if self.spec.per_key:
            weights = weights / count(visible)
        return torch.where(visible, weights, 0.0).to(scores.dtype)


@dataclass(frozen=True)
class ReLUMax(Divided):
    """y_i = max(x_i, 0) / divisor (usually 256).   Source: arXiv:2309.08586 (ReLU attention divided by length)."""

    counts = Ops(additions=1)

    def weigh(self, z: Tensor) -> Tensor:
        return F.relu(z)

    def refuses_output(self) -> str | None:
        return ZEROS.format("tokens with a logit below 0")


@dataclass(frozen=True)
class ReLU2Max(ReLUMax):
    """y_i = max(x_i, 0)^2 / divisor (usually 256).   Source: squared ReLU attention, arXiv:2202.10447, 2309.08586."""

    counts = Ops(multiplies=1, additions=1)

    def weigh(self, z: Tensor) -> Tensor:
        return F.relu(z).square()


@dataclass(frozen=True)
class SigmoidMax(Divided):
    """y_i = sigmoid(x_i) / divisor (usually 256).   Source: sigmoid attention, arXiv:2409.04431."""

    counts = Ops(exponentials=1)

    def weigh(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def logs(self, z: Tensor) -> Tensor:
        return F.logsigmoid(z)


@dataclass(frozen=True)
class SoftplusMax(Divided):
    """y_i = log(1 + e^x_i) / divisor (usually 256)."""

    counts = Ops(additions=1, exponentials=2)

    def weigh(self, z: Tensor) -> Tensor:
        return -F.logsigmoid(-z)  # exact at every z; F.softplus is x from 20 on

    def logs(self, z: Tensor) -> Tensor:
        left = z - 0.5 * z.clamp(max=-15).exp()  # log(log(1 + e)) to the second order in e = e^z
        return torch.where(z < -15, left, self.weigh(z.clamp(min=-15)).log())


@dataclass(frozen=True)
class Softplus2Max(SoftplusMax):
    """y_i = log(1 + e^x_i)^2 / divisor (usually 256)."""

    counts = Ops(multiplies=1, additions=1, exponentials=2)

    def weigh(self, z: Tensor) -> Tensor:
        return F.logsigmoid(-z).square()

    def logs(self, z: Tensor) -> Tensor:
        left = z - 0.5 * z.clamp(max=-15).exp()
        return 2 * torch.where(z < -15, left, (-F.logsigmoid(-z.clamp(min=-15))).log())


@dataclass(frozen=True)
class SquarePlusMax(Divided):
    """y_i = (x_i + sqrt(x_i^2 + 4 log(2)^2)) / 2 / divisor (usually 100).   Source: squareplus, arXiv:2112.11687."""

    usual = 100.0
    counts = Ops(multiplies=2, additions=2, divisions=1)

    def weigh(self, z: Tensor) -> Tensor:
        four = 4 * math.log(2) ** 2
        long = z.abs() + (z.square() + four).sqrt()
        return torch.where(z < 0, four / 2 / long, long / 2)  # the sum itself would cancel on the left


@dataclass(frozen=True)
class SoftShrinkMax(Divided):
    """y_i = (x_i - sign(x_i) threshold where |x_i| > threshold, else 0) / divisor (usually 64); may be below 0.

    threshold: what is taken off, at least 0
    """

    threshold: float = 0.5

    usual = 64.0
    counts = Ops(additions=3)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.threshold >= 0, f"softshrink: threshold={self.threshold} must be at least 0")

    @classmethod
    def small(cls) -> SoftShrinkMax:
        """Scores of a narrow model pass it."""
        return cls(threshold=0.01)

    def weigh(self, z: Tensor) -> Tensor:
        return F.softshrink(z, self.threshold)

    def refuses_output(self) -> str | None:
        return "its weights are below 0 for scores below -threshold, and no probability is"


@dataclass(frozen=True)
class GELUMax(Divided):
    """y_i = gelu(x_i) / divisor (usually 64); may be below 0."""

    usual = 64.0
    counts = Ops(multiplies=3, additions=1, exponentials=1)

    def weigh(self, z: Tensor) -> Tensor:
        return F.gelu(z)

    def refuses_output(self) -> str | None:
        return "its weights are below 0 for scores below 0, and no probability is"


@dataclass(frozen=True)
class PolyMax(Divided):
    """y_i = w(x_i) / divisor (usually 1000): w = 0 below a, a line from 0 to y0 on [a, 0], x^power + y0 above 0.

    start: a, below 0
    height: y0, above 0
    power: from 1 to 4
    """

    start: float = -100.0
    height: float = 1.0
    power: float = 2.0

    usual = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.start < 0, f"start={self.start} must be below 0, where the power takes over")
        require(self.height > 0, f"height={self.height} must be above 0, or there is no line")
        _check_power(self.power)

    def ops(self, n_keys: int) -> Ops:
        products = 1 + self.power if self.power == int(self.power) else 2
        exponentials = 0 if self.power == int(self.power) else 2
        here = Ops(multiplies=products, additions=4, exponentials=exponentials)
        return n_keys * here + Ops(divisions=int(self.per_key))

    def line(self, z: Tensor) -> Tensor:
        return self.height - self.height / self.start * z

    def weigh(self, z: Tensor) -> Tensor:
        left = torch.where(z < self.start, 0.0, self.line(z))
        return torch.where(z > 0, F.relu(z).pow(self.power) + self.height, left)


@dataclass(frozen=True)
class VPolyMax(PolyMax):
    """y_i = w(x_i) / divisor (usually 1000): polymax with a line from 2 y0 to y0 on [a, 0], so it jumps at a and falls.

    start: a, below 0
    height: y0, above 0
    power: from 1 to 4
    """

    @classmethod
    def small(cls) -> VPolyMax:
        """Logits of a narrow model outgrow the weight that all others keep below 0."""
        return cls(height=0.02)

    def line(self, z: Tensor) -> Tensor:
        return self.height + self.height / self.start * z


@dataclass(frozen=True)
class ExpPolyMax(Divided):
    """y_i = w(x_i) / divisor (usually 1000): w = b^x below 0, else (x + s)^power + c.

    Value and slope are continuous at 0, from which s = (ln b / power)^(1 / (power - 1)) and c = 1 - s^power follow.

    base: b, above 1
    power: above 1, at most 4
    """

    base: float = math.e
    power: float = 2.0

    usual = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_base("exppolymax", self.base)
        _check_power(self.power)
        require(self.power > 1, "exppolymax: power=1 is a line, whose slope matches b^x for b = e only; 2 is usual")

    def ops(self, n_keys: int) -> Ops:
        products = 1 + self.power if self.power == int(self.power) else 3
        return n_keys * Ops(multiplies=products, additions=3, exponentials=1) + Ops(divisions=int(self.per_key))

    def weigh(self, z: Tensor) -> Tensor:
        log_base = math.log(self.base)
        shift = (log_base / self.power) ** (1 / (self.power - 1))
        right = (z.clamp(min=0) + shift).pow(self.power) + (1 - shift**self.power)
        return torch.where(z < 0, (z.clamp(max=0) * log_base).exp(), right)

    def logs(self, z: Tensor) -> Tensor:
        return torch.where(z < 0, z * math.log(self.base), self.weigh(z.clamp(min=0)).log())


def _check_power(power: float) -> None:
    require(1 <= power <= 4, f"power={power} must lie in [1, 4]: more overflows, less has an infinite slope at 0")
