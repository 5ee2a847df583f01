"""Means and differences with their uncertainty, many comparisons at once, and Pareto fronts.

What is not finite is never left out in silence: a mean over a NaN is NaN, and so are its bounds and its p value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t and its inverse; scipy.stats takes ten times as long to import


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds the true one at the level asked for.

    mean: of the n values (n = 0: NaN)
    low, high: bounds (n < 2: NaN)
    se: standard error of the mean (n < 2: NaN)
    n: number of values
    """

    mean: float
    low: float
    high: float
    se: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A mean difference b - a and how sure it is.

    mean: of the differences, or the difference of the means
    se: its standard error
    low, high: bounds at the level asked for
    p: two-sided, that a difference this large arises where there is none
    n: pairs, or values of both sides together
    dof: degrees of freedom of Student's t
    """

    mean: float
    se: float
    low: float
    high: float
    p: float
    n: int
    dof: float


def quantile(level: float, dof: float) -> float:
    """Half the width of a two-sided interval in standard errors.

    >>> round(quantile(0.95, 2), 3)
    4.303
    """
    return float(stdtrit(dof, (1 + level) / 2)) if dof > 0 else math.nan


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of independent values with Student's interval."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    known = n > 1 and math.isfinite(mean)
    se = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n) if known else math.nan
    half = quantile(level, n - 1) * se
    return Interval(mean, mean - half, mean + half, se, n)


def paired(a: Mapping[Any, float], b: Mapping[Any, float], level: float = 0.95) -> Difference:
    """b - a over the seeds that both have. What a seed does to both sides alike drops out."""
    seeds = [seed for seed in a if seed in b]
    found = interval([b[seed] - a[seed] for seed in seeds], level)
    return _difference(found.mean, found.se, len(seeds), len(seeds) - 1, level)


def welch(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Difference:
    """mean(b) - mean(a) of values that make no pairs; the spreads may differ.

    dof: by Welch and Satterthwaite.   Source: Welch, Biometrika 34 (1947).
    """
    one, two = interval(a), interval(b)
    se = math.hypot(one.se, two.se)
    if se > 0:
        dof = se**4 / (one.se**4 / (one.n - 1) + two.se**4 / (two.n - 1))
    else:
        dof = one.n + two.n - 2.0
    return _difference(two.mean - one.mean, se, one.n + two.n, dof, level)


def _difference(mean: float, se: float, n: int, dof: float, level: float) -> Difference:
    half = quantile(level, dof) * se
    if se > 0:
        p = float(2 * stdtr(dof, -abs(mean / se)))
    elif se == 0:
        p = 1.0 if mean == 0 else 0.0  # repeats to the last bit: the difference is what it is
    else:
        p = math.nan
    return Difference(mean, se, mean - half, mean + half, p, n, dof)


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted so that any false one among them stays as rare as one alone; NaNs stay and do not count.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    out = [math.nan] * len(ps)
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, ps[i] * (len(order) - rank)))
        out[i] = highest
    return out


def pareto(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Which points no other is as good as everywhere and better than somewhere; every coordinate is minimised.

    Equal points stand or fall together. A point with a NaN is on no front and pushes no other off it.
    """
    x = np.asarray(points, dtype=float)
    if not len(points):
        return []
    known = ~np.isnan(x).any(axis=1)
    front = []
    for point, is_known in zip(x, known, strict=True):
        beaten = (x[known] <= point).all(axis=1) & (x[known] < point).any(axis=1)
        front.append(bool(is_known and not beaten.any()))
    return front
