"""Softmaxes: kinds of weights for attention scores and for the head's logits (what they share: models/parts/rows.py).

x is a row of scores, m its maximum, n the number of keys that the query sees. b^x is computed as e^(x ln b).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cost import WIDTH, Ops, elementwise
from models.parts.consmax import ConSmax, ConSmaxQuantised, ConSmaxV2, SaturatingConSmax
from models.parts.curve import fill, inverse_softplus, straight
from models.parts.numeric import require, straight_through, wide
from models.parts.rows import (
    FLOOR,
    HIGHEST,
    ZEROS,
    Normalised,
    Rows,
    Softmax,
    check_base,
    clean,
    hide,
    normalised_ops,
    number,
)
from models.parts.sumless import (
    ExpPolyMax,
    GELUMax,
    PolyMax,
    ReLU2Max,
    ReLUMax,
    SigmoidMax,
    Softplus2Max,
    SoftplusMax,
    SoftShrinkMax,
    SquarePlusMax,
    VPolyMax,
)


@dataclass(frozen=True)
class PlainSoftmax(Softmax):
    """y_i = e^(x_i - m) / sum_j e^(x_j - m).   Source: arXiv:1706.03762."""

    fused = True

    def build(self, n_heads: int | None) -> nn.Module:
        return ByLogs(lambda z: z)

    def ops(self, n_keys: int) -> Ops:
        return normalised_ops(n_keys)


class ByLogs(Normalised):
    """Normalised weights from a function that gives their logarithm."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def logs(self, z: Tensor) -> Tensor:
        return self.function(z)


@dataclass(frozen=True)
class Softermax(Softmax):
    """y_i = 2^(x_i - m) / sum_j 2^(x_j - m).   Source: arXiv:2103.09301."""

    def build(self, n_heads: int | None) -> nn.Module:
        return ByLogs(lambda z: z * math.log(2))

    def ops(self, n_keys: int) -> Ops:
        return normalised_ops(n_keys)


@dataclass(frozen=True)
class SigSoftmax(Softmax):
    """y_i = b^x_i sigmoid(x_i) / sum_j b^x_j sigmoid(x_j).   Source: arXiv:1805.10829.

    base: b, above 1
    """

    base: float = math.e

    def __post_init__(self) -> None:
        check_base("sigsoftmax", self.base)

    def build(self, n_heads: int | None) -> nn.Module:
        scale = math.log(self.base)
        return ByLogs(lambda z: z * scale + F.logsigmoid(z))

    def ops(self, n_keys: int) -> Ops:
        return normalised_ops(n_keys) + elementwise(n_keys, multiplies=1, exponentials=1)


@dataclass(frozen=True)
class StableMax(Softmax):
    """y_i = s(x_i) / sum_j s(x_j), s(x) = x + 1 for x >= 0, else 1 / (1 - x).   Source: arXiv:2501.04697."""

    def build(self, n_heads: int | None) -> nn.Module:
        return ByLogs(lambda z: torch.log1p(F.relu(z)) - torch.log1p(F.relu(-z)))

    def ops(self, n_keys: int) -> Ops:
        per_key = elementwise(n_keys, additions=3, divisions=1, multiplies=1)
        return per_key + Ops(divisions=1, reductions=1)


@dataclass(frozen=True)
class StrongerMax(Softmax):
    """y_i = a^(x_i / t) / (o + sum_j a^(x_j / t)) / divisor.   Source for o: Attention Is Off By One, E. Miller, 2023.

    o is the weight of one more key, whose score is 0 and whose value is the zero vector, whatever the row's maximum is.
    Without normalise: y_i = a^((x_i - g) / t) / divisor.

    base: a, above 1
    temperature: t, or where it starts, above 0
    learn_temperature: whether t is trained, by its logarithm
    obo: o, or where it starts, at least 0
    learn_obo: whether o is trained, by its logarithm
    obo_per_head: whether each head has its own o
    normalise: whether weights are divided by their sum
    max_guess: g, without normalise; none: the row's maximum
    divisor: a number above 0
    """

    base: float = math.e
    temperature: float = 1.0
    learn_temperature: bool = False
    obo: float = 0.0
    learn_obo: bool = False
    obo_per_head: bool = False
    normalise: bool = True
    max_guess: float | None = None
    divisor: float = 1.0

    cancels = ("obo", "learn_obo", "obo_per_head", "normalise", "max_guess", "divisor")

    def __post_init__(self) -> None:
        check_base("strongermax", self.base)
        require(self.temperature > 0, f"strongermax: temperature={self.temperature} must be above 0")
        require(self.divisor > 0, f"strongermax: divisor={self.divisor} must be above 0")
        require(self.obo >= 0, f"strongermax: obo={self.obo} must be at least 0")
        require(
            self.obo > 0 or not self.learn_obo, "strongermax: learn_obo trains the logarithm of obo; set obo above 0"
        )
        require(self.learn_obo or not self.obo_per_head, "strongermax: obo_per_head has an effect with learn_obo only")
        require(self.normalise or not self.obo, f"strongermax: obo={self.obo} has no sum to stand in without normalise")
        require(
            not self.normalise or self.max_guess is None,
            f"strongermax: max_guess={self.max_guess} has no effect with normalise, where it cancels",
        )

    def build(self, n_heads: int | None) -> nn.Module:
        return StrongerRows(self, n_heads)

    def n_parameters(self, n_heads: int | None) -> int:
        if n_heads is None:
            return int(self.learn_temperature)
        return self.learn_temperature + self.learn_obo * (n_heads if self.obo_per_head else 1)

    def ops(self, n_keys: int) -> Ops:
        total = elementwise(n_keys, multiplies=2, additions=1, exponentials=1)
        if self.normalise or self.max_guess is None:
            total += Ops(additions=n_keys, reductions=1)
        if self.normalise:
            total += Ops(additions=n_keys, divisions=1, reductions=1)
        if self.obo:
            total += Ops(additions=1, multiplies=1, exponentials=1)
        return total


class StrongerRows(Rows):
    log_temperature: Any
    log_obo: Any

    def __init__(self, spec: StrongerMax, n_heads: int | None) -> None:
        super().__init__()
        self.spec = spec
        self.roles: dict[str, str] = {}
        self.initial: dict[str, float] = {}
        number(self, "log_temperature", math.log(spec.temperature), spec.learn_temperature, ())
        obo = math.log(spec.obo) if spec.obo else None
        per_head = (n_heads, 1, 1) if spec.obo_per_head and n_heads else ()
        number(self, "log_obo", obo, spec.learn_obo and n_heads is not None, per_head)

    def logs(self, z: Tensor) -> Tensor:
        t = self.log_temperature
        scale = (-t).exp() if isinstance(t, Tensor) else math.exp(-t)
        return z * (math.log(self.spec.base) * scale)

    def forward(self, scores: Tensor, seen: Tensor | None = None) -> Tensor:
        z, visible = clean(scores, seen)
        if self.spec.normalise:
            logs = hide(self.logs(z), visible)
            weights = logs.softmax(-1)
            if self.log_obo is not None:
                # sum / (o + sum), by which softmax differs from what is wanted.
                weights = weights * torch.sigmoid(logs.logsumexp(-1, keepdim=True) - self.log_obo)
        else:
            guess: Any = self.spec.max_guess
            if guess is None:
                guess = hide(z, visible).amax(-1, keepdim=True).clamp(min=-1e9)
            weights = torch.where(visible, self.logs(z - guess), 0.0).clamp(max=HIGHEST).exp()
        return torch.where(visible, weights / self.spec.divisor, 0.0).to(scores.dtype)


@dataclass(frozen=True)
class PFLAMax(Softmax):
    """y_i = f(x_i) / (o + sum_j f(x_j)) / divisor, f a learned increasing curve of straight pieces, above 0.

    f starts on softplus, is constant left of the knots and goes on straight on the right. Heights are stored as
    increments (by softplus), so f keeps increasing. Without normalise: y_i = f(x_i) / divisor.

    knots: number of knots, at least 2
    span: knots stand equally spaced on [-span, span]
    normalise: whether weights are divided by o + their sum
    obo: o, at least 0
    divisor: a number above 0
    """

    knots: int = 30
    span: float = 10.0
    normalise: bool = True
    obo: float = 0.0
    divisor: float = 1.0

    cancels = ("normalise", "obo", "divisor")

    def __post_init__(self) -> None:
        require(self.knots >= 2, f"pfla: knots={self.knots} must be at least 2")
        require(self.span > 0, f"pfla: span={self.span} must be above 0")
        require(self.obo >= 0, f"pfla: obo={self.obo} must be at least 0")
        require(self.divisor > 0, f"pfla: divisor={self.divisor} must be above 0")
        require(self.normalise or not self.obo, f"pfla: obo={self.obo} has no sum to stand in without normalise")

    def build(self, n_heads: int | None) -> nn.Module:
        return CurveRows(self)

    def n_parameters(self, n_heads: int | None) -> int:
        return self.knots

    def ops(self, n_keys: int) -> Ops:
        """The piece of an equally spaced curve is a product; its height and slope are looked up."""
        total = elementwise(n_keys, multiplies=3, additions=2, table_bytes=2 * WIDTH / 8)
        return total + (Ops(additions=n_keys, divisions=1, reductions=1) if self.normalise else Ops())


class CurveRows(Rows):
    roles = {"rises": "scalar"}

    def __init__(self, spec: PFLAMax) -> None:
        super().__init__()
        self.spec = spec
        h = 2 * spec.span / (spec.knots - 1)
        heights = [math.log1p(math.exp(-spec.span + i * h)) for i in range(spec.knots)]
        rises = [heights[0], *(b - a for a, b in itertools.pairwise(heights))]
        raw = [inverse_softplus(rise) for rise in rises]
        self.rises = nn.Parameter(torch.tensor(raw))
        self.initial = {"rises": _Fill(raw)}

    def curve(self, z: Tensor) -> Tensor:
        heights = F.softplus(wide(self.rises)).cumsum(0) + FLOOR
        places = torch.linspace(
            -self.spec.span, self.spec.span, self.spec.knots, dtype=heights.dtype, device=heights.device
        )
        slope = (heights[-1] - heights[-2]) / (places[-1] - places[-2])
        return straight(z, places, heights, slope)

    def logs(self, z: Tensor) -> Tensor:
        return self.curve(z).log()

    def forward(self, scores: Tensor, seen: Tensor | None = None) -> Tensor:
        z, visible = clean(scores, seen)
        weights = torch.where(visible, self.curve(z), 0.0)
        if self.spec.normalise:
            total = weights.sum(-1, keepdim=True) + self.spec.obo
            weights = weights / torch.where(total > 0, total, 1.0)
        return (weights / self.spec.divisor).to(scores.dtype)


class _Fill:
    """Writes numbers into a parameter; pickles."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __call__(self, parameter: Tensor) -> None:
        fill(parameter, self.values)


@dataclass(frozen=True)
class ArgMax(Softmax):
    """y_i = 1 at the first greatest x_i, else 0; gradient of softmax (straight-through).   Source: arXiv:1308.3432."""

    def build(self, n_heads: int | None) -> nn.Module:
        return ArgMaxRows()

    def ops(self, n_keys: int) -> Ops:
        return Ops(additions=n_keys, reductions=1)

    def refuses_output(self) -> str | None:
        return ZEROS.format("tokens but one")


class ArgMaxRows(nn.Module):
    def forward(self, scores: Tensor, seen: Tensor | None = None) -> Tensor:
        z, visible = clean(scores, seen)
        z = hide(z, visible)
        hard = torch.zeros_like(z).scatter(-1, z.argmax(-1, keepdim=True), 1.0)
        return torch.where(visible, straight_through(hard, z.softmax(-1)), 0.0).to(scores.dtype)


class Sparse(Softmax):
    """Softmaxes with exact zeros; alpha is their entmax order."""

    alpha: ClassVar[float]

    def build(self, n_heads: int | None) -> nn.Module:
        return SparseRows(self.alpha)

    def ops(self, n_keys: int) -> Ops:
        """A sort, running sums, and the weights."""
        sort = n_keys * math.log2(max(n_keys, 2))
        return elementwise(n_keys, multiplies=3, additions=4, divisions=1) + Ops(additions=sort, reductions=3)

    def refuses_output(self) -> str | None:
        return (
            "it gives tokens the probability 0: their loss would be infinite and without gradient; use it in attention"
        )


@dataclass(frozen=True)
class SparseMax(Sparse):
    """y_i = max(x_i - t, 0) with t such that the row sums to one.   Source: arXiv:1602.02068."""

    alpha = 2.0


@dataclass(frozen=True)
class Entmax15(Sparse):
    """y_i = max(x_i / 2 - t, 0)^2 with t such that the row sums to one.   Source: arXiv:1905.05702."""

    alpha = 1.5


class SparseRows(nn.Module):
    """The threshold is found by sorting, without gradient; one Newton step makes it exact and gives its gradient."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.squared = alpha == 1.5

    def threshold(self, s: Tensor) -> Tensor:
        """s [..., S] with maximum 0 -> t [..., 1]."""
        ordered = s.clamp(min=-4.0).sort(-1, descending=True).values  # below -1 nothing gets weight
        k = torch.arange(1, s.shape[-1] + 1, device=s.device, dtype=s.dtype)
        mean = ordered.cumsum(-1) / k
        if self.squared:
            spread = ordered.square().cumsum(-1) - k * mean.square()
            t = mean - ((1 - spread) / k).clamp(min=0).sqrt()
        else:
            t = mean - 1 / k
        size = (t < ordered).sum(-1, keepdim=True).clamp(min=1)
        return t.gather(-1, size - 1)

    def forward(self, scores: Tensor, seen: Tensor | None = None) -> Tensor:
        z, visible = clean(scores, seen)
        z = hide(z / 2 if self.squared else z, visible)
        s = torch.where(visible, z - z.detach().amax(-1, keepdim=True), -4.0)
        t = self.threshold(s.detach())
        over = F.relu(s - t)
        f, slope = (over.square(), 2 * over) if self.squared else (over, (over > 0).to(over.dtype))
        step = (f.sum(-1, keepdim=True) - 1) / slope.detach().sum(-1, keepdim=True).clamp(min=1e-6)
        over = F.relu(s - (t + step))
        return torch.where(visible, over.square() if self.squared else over, 0.0).to(scores.dtype)


Softmax.kinds = {
    "softmax": PlainSoftmax,
    "softermax": Softermax,
    "sigsoftmax": SigSoftmax,
    "stablemax": StableMax,
    "strongermax": StrongerMax,
    "sparsemax": SparseMax,
    "entmax15": Entmax15,
    "ste_argmax": ArgMax,
    "pfla": PFLAMax,
    "consmax": ConSmax,
    "consmax_v2": ConSmaxV2,
    "consmax_quantised": ConSmaxQuantised,
    "saturatingconsmax": SaturatingConSmax,
    "polymax": PolyMax,
    "vpolymax": VPolyMax,
    "exppolymax": ExpPolyMax,
    "relumax": ReLUMax,
    "relu2max": ReLU2Max,
    "sigmoid": SigmoidMax,
    "softplus": SoftplusMax,
    "softplus2": Softplus2Max,
    "squareplus": SquarePlusMax,
    "softshrink": SoftShrinkMax,
    "gelumax": GELUMax,
}
