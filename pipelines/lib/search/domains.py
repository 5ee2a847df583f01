"""What one key of a search may be: a finite choice, an interval, or steps from where it stands."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pipelines.lib.config import InputError

DEFAULT = "default"  # the value that leaves a key to the recipe


def same(a: Any, b: Any) -> bool:
    """Whether two plain values mean the same: 1 and 1.0 do, 1 and true do not; in lists and mappings likewise."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Options:
    """A finite choice.  values: plain values in the order written; `default` leaves the key to the recipe."""

    values: tuple[Any, ...]

    def sample(self, rng: random.Random) -> Any:
        return rng.choice(self.values)

    def neighbours(self, value: Any, times: int = 1) -> list[Any]:
        """Other values to go to from `value`, nearest first.

        Numbers: the next `times` each way in sorted order, a step up before a step down; `value` itself may lie between
        them. Anything else: all others as written. `default` is where a search begins, so it is not among them.
        """
        others = [v for v in self.values if not same(v, value) and not same(v, DEFAULT)]
        if not is_number(value) or not all(is_number(v) for v in others):
            return others
        up = sorted({v for v in others if v > value})
        down = sorted({v for v in others if v < value}, reverse=True)
        return [side[m] for m in range(times) for side in (up, down) if m < len(side)]

    def check(self, key: str) -> None:
        if not self.values:
            raise InputError(f"{key}: an empty list leaves nothing to choose")


@dataclass(frozen=True)
class Interval:
    """Any number from low to high, both included; even in its logarithm if `log`; whole numbers if `integer`."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __str__(self) -> str:
        kind = ("log_" if self.log else "") + ("integer" if self.integer else "uniform")
        return f"{{{kind}: [{self.low:g}, {self.high:g}]}}"

    def sample(self, rng: random.Random) -> float:
        """Fractions keep six digits, so that a trial's command stays readable."""
        if self.integer and not self.log:
            return rng.randint(int(self.low), int(self.high))
        if self.integer:  # every whole number owns [n, n + 1), so that both ends get their share
            n = math.floor(math.exp(rng.uniform(math.log(self.low), math.log(self.high + 1))))
            return min(max(n, int(self.low)), int(self.high))
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = rng.uniform(low, high)
        return min(max(float(f"{math.exp(value) if self.log else value:.6g}"), self.low), self.high)

    def neighbours(self, value: Any, times: int = 1) -> list[Any]:
        raise InputError(f"{self}: an interval has no next value; write a list, a range, or {{increment: ...}}")

    def check(self, key: str) -> None:
        if not (is_number(self.low) and is_number(self.high) and math.isfinite(self.low) and math.isfinite(self.high)):
            raise InputError(f"{key}: [{self.low}, {self.high}] must be two finite numbers")
        if not self.low < self.high:
            raise InputError(f"{key}: [{self.low}, {self.high}] must rise from the first to the second")
        if self.integer and not (isinstance(self.low, int) and isinstance(self.high, int)):
            raise InputError(f"{key}: [{self.low}, {self.high}] must be two whole numbers")
        if self.log and self.low <= 0:
            raise InputError(f"{key}: [{self.low}, {self.high}] must lie above 0, for it is even in the logarithm")


@dataclass(frozen=True)
class Steps:
    """Greedy's steps: v + m * increment, or v * increment ** m if `factor`, for m = ±1 .. ±times within [low, high]."""

    increment: float
    times: int = 1
    low: float | None = None
    high: float | None = None
    factor: bool = False

    def sample(self, rng: random.Random) -> Any:
        raise InputError(f"{self} says how to go on from a value; to draw one, write a list or {{uniform: [a, b]}}")

    def neighbours(self, value: Any, times: int = 1) -> list[Any]:
        """Other values to go to from `value`, nearest first, up before down; `times` is this domain's own.

        Whole numbers stay whole (rounded). Exact in decimals: 0.1 + 0.2 is 0.3.  Raises InputError for no number.
        """
        if not is_number(value):
            raise InputError(f"{value!r} is no number, so it cannot go {self.increment} further; list its values")
        steps: list[Any] = []
        for m in range(1, self.times + 1):
            for step in (self._at(value, m), self._at(value, -m)):
                within = (self.low is None or step >= self.low) and (self.high is None or step <= self.high)
                if within and step != value and step not in steps:
                    steps.append(step)
        return steps

    def _at(self, value: float, m: int) -> float:
        v, by = Decimal(str(value)), Decimal(str(self.increment))
        exact = v * by**m if self.factor else v + m * by
        if isinstance(value, int):
            return round(exact)
        step = float(exact)
        short = float(f"{step:.12g}")  # 0.001 / 3 * 3 is 0.001 again
        return short if math.isclose(short, step, rel_tol=1e-14) else step

    def check(self, key: str) -> None:
        word = "factor" if self.factor else "increment"
        if not is_number(self.increment) or not math.isfinite(self.increment) or self.increment <= 0:
            raise InputError(f"{key}: {word}={self.increment} must be a number above 0; both directions are tried")
        if self.factor and self.increment == 1:
            raise InputError(f"{key}: factor=1 leads nowhere; try 2")
        if not isinstance(self.times, int) or isinstance(self.times, bool) or self.times < 1:
            raise InputError(f"{key}: times={self.times} must be a whole number, at least 1")
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None and not is_number(bound):
                raise InputError(f"{key}: {name}={bound} is no number")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise InputError(f"{key}: low={self.low} is above high={self.high}")


Domain = Options | Interval | Steps


def decimals(start: float, end: float, step: float) -> tuple[Any, ...]:
    """start, start + step, ... up to and with `end` if it is on the grid; exact in decimals, whole where all three are.

    Raises InputError for a step that does not lead from start to end.
    """
    first, last, by = (Decimal(str(x)) for x in (start, end, step))
    count = (last - first) / by if by else Decimal(-1)
    if count < 0:
        raise InputError(f"step={step} does not lead from {start} to {end}")
    whole = all(isinstance(x, int) for x in (start, end, step))
    values = (first + i * by for i in range(int(count) + 1))
    return tuple(int(v) if whole else float(v) for v in values)


def merged(key: str, domains: Iterable[Domain]) -> Domain:
    """One domain that covers those of a key in several groups. Raises InputError for different kinds of domain."""
    first, *rest = domains
    for other in rest:
        if isinstance(first, Options) and isinstance(other, Options):
            first = Options(first.values + tuple(v for v in other.values if not any(same(v, w) for w in first.values)))
        elif (
            isinstance(first, Interval)
            and isinstance(other, Interval)
            and (first.log, first.integer) == (other.log, other.integer)
        ):
            first = Interval(min(first.low, other.low), max(first.high, other.high), first.log, first.integer)
        elif first != other:
            raise InputError(f"{key} has two kinds of domain in two groups, {first} and {other}; write one kind")
    return first
