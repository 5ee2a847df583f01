"""ConSmax and its kin, b^(x - beta) / gamma: exponentials without a maximum and without a sum.

beta and gamma are learned. As output softmax they cancel, so that there they are constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.cost import Ops, elementwise
from models.parts.numeric import require, straight_through
from models.parts.rows import HIGHEST, Rows, Softmax, check_base, clean, count, number


class Constant(Softmax):
    """Options and costs of b^(x - beta) / gamma."""

    sums_to_one = False

    def ops(self, n_keys: int) -> Ops:
        per_key = bool(getattr(self, "per_key", False))
        return elementwise(n_keys, multiplies=1, additions=2, exponentials=1) + Ops(divisions=per_key)

    def _check(self, kind: str) -> None:
        options: Any = self
        check_base(kind, options.base)
        require(options.gamma > 0, f"{kind}: gamma={options.gamma} must be above 0; 100 is usual")


@dataclass(frozen=True)
class ConSmax(Constant):
    """y_i = b^(x_i - beta) / gamma, beta and gamma learned per layer: no maximum and no sum.   Source: 2402.10930.

    Exponents (x - beta) ln b above 80 count as 80, so that no score overflows.

    beta: where beta starts
    gamma: where gamma starts, above 0
    base: b, above 1
    per_key: whether weights are also divided by the number of keys that the query sees
    """

    beta: float = 2.5
    gamma: float = 100.0
    base: float = math.e
    per_key: bool = False

    cancels: ClassVar[tuple[str, ...]] = ("beta", "gamma", "per_key")

    def __post_init__(self) -> None:
        self._check("consmax")

    def build(self, n_heads: int | None) -> nn.Module:
        return ConstantRows(self, HIGHEST, None if n_heads is None else ())

    def n_parameters(self, n_heads: int | None) -> int:
        return 0 if n_heads is None else 2


@dataclass(frozen=True)
class ConSmaxV2(ConSmax):
    """y_i = b^(x_i - beta f) / (gamma g), f and g learned per head from 1.   Source: arXiv:2402.10930, per head."""

    def build(self, n_heads: int | None) -> nn.Module:
        return ConstantRows(self, HIGHEST, None if n_heads is None else (n_heads, 1, 1), factors=True)

    def n_parameters(self, n_heads: int | None) -> int:
        return 2 * (n_heads or 0)


@dataclass(frozen=True)
class ConSmaxQuantised(ConSmax):
    """y_i = b^(x_i - beta) / gamma with learned beta and gamma rounded to steps (straight-through).

    beta_step: beta is a multiple of it
    gamma_step: gamma is a multiple of it, at least one
    """

    beta_step: float = 0.01
    gamma_step: float = 0.1

    cancels: ClassVar[tuple[str, ...]] = ("beta", "gamma", "per_key", "beta_step", "gamma_step")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta_step", "gamma_step"):
            require(getattr(self, name) > 0, f"consmax_quantised: {name}={getattr(self, name)} must be above 0")

    def build(self, n_heads: int | None) -> nn.Module:
        steps = (self.beta_step, self.gamma_step)
        return ConstantRows(self, HIGHEST, None if n_heads is None else (), steps=steps)


@dataclass(frozen=True)
class SaturatingConSmax(Constant):
    """y_i = b^min(x_i - beta, s) / gamma: continuous, and flat from x = beta + s on.   Source: 2402.10930, clipped.

    beta: beta, or where it starts
    gamma: gamma, or where it starts, above 0
    saturation: s
    base: b, above 1
    learn_beta: whether beta is trained
    learn_gamma: whether gamma is trained
    per_key: whether weights are also divided by the number of keys that the query sees
    """

    beta: float = 2.5
    gamma: float = 100.0
    saturation: float = 11.0
    base: float = math.e
    learn_beta: bool = True
    learn_gamma: bool = True
    per_key: bool = False

    cancels = ("gamma", "learn_beta", "learn_gamma", "per_key")

    def __post_init__(self) -> None:
        self._check("saturatingconsmax")
        top = self.saturation * math.log(self.base)
        require(
            0 < top <= HIGHEST,
            f"saturatingconsmax: saturation={self.saturation} is an exponent of e of {top:g}, which must lie in "
            f"(0, {HIGHEST:g}], or float32 overflows",
        )

    @classmethod
    def small(cls) -> SaturatingConSmax:
        """Scores of a narrow model reach it."""
        return cls(beta=0.0, saturation=2.0)

    def build(self, n_heads: int | None) -> nn.Module:
        shape = None if n_heads is None else ()
        learn = (self.learn_beta, self.learn_gamma)
        return ConstantRows(self, self.saturation * math.log(self.base), shape, learn=learn)

    def n_parameters(self, n_heads: int | None) -> int:
        return 0 if n_heads is None else self.learn_beta + self.learn_gamma


class ConstantRows(Rows):
    """b^(x - beta) / gamma, exponents held below `highest`.

    shape: of the learned numbers; None (an output softmax, where they cancel): constants.
    factors: what is learned are factors of beta and gamma.  steps: what both are rounded to.
    """

    def __init__(
        self,
        spec: Any,
        highest: float,
        shape: tuple[int, ...] | None,
        factors: bool = False,
        steps: tuple[float, float] | None = None,
        learn: tuple[bool, bool] = (True, True),
    ) -> None:
        super().__init__()
        self.scale, self.highest, self.steps, self.per_key = math.log(spec.base), highest, steps, spec.per_key
        self.roles: dict[str, str] = {}
        self.initial: dict[str, float] = {}
        self.units = (spec.beta, spec.gamma) if factors else (1.0, 1.0)
        starts = (1.0, 1.0) if factors else (spec.beta, spec.gamma)
        for name, start, learned in zip(("beta", "gamma"), starts, learn, strict=True):
            number(self, name, start, learned and shape is not None, shape or ())

    def numbers(self) -> tuple[Any, Any]:
        """beta and gamma as they are used."""
        beta, gamma = (n * unit for n, unit in zip((self.beta, self.gamma), self.units, strict=True))
        if self.steps is not None and isinstance(beta, Tensor):
            rounded = [(x / step).round() * step for x, step in zip((beta, gamma), self.steps, strict=True)]
            beta = straight_through(rounded[0], beta)
            gamma = straight_through(rounded[1].clamp(min=self.steps[1]), gamma)
        return beta, gamma

    def logs(self, z: Tensor) -> Tensor:
        return ((z - self.numbers()[0]) * self.scale).clamp(max=self.highest)

    def forward(self, scores: Tensor, seen: Tensor | None = None) -> Tensor:
        z, visible = clean(scores, seen)
        weights = self.logs(z).exp() / self.numbers()[1]
        if self.per_key:
            weights = weights / count(visible)
        return torch.where(visible, weights, 0.0).to(scores.dtype)
