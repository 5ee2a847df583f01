"""Curves of a variant over tokens, FLOP and time: every seed, and their mean with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipelines.lib.comparison.collect import RunRecord, is_number
from pipelines.lib.statistics import interval

AXES = {"tokens": "tokens", "flops": "training FLOP", "seconds": "training time, s"}
POINTS = 150  # of one curve; more are averaged in groups of neighbours


@dataclass(frozen=True)
class Curve:
    """x: axis -> places, only axes that are known at every point;  y: NaN where a loss was no number.

    low, high: bounds of the mean over seeds; empty for a single seed's curve.
    """

    x: Mapping[str, Sequence[float]]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def seed_curve(run: RunRecord, key: str) -> Curve:
    """One run's figure over all axes that its folder has."""
    points = run.column(key)
    per_token = run.cost["flops"] / run.cost["tokens"] if run.cost.get("tokens") and "flops" in run.cost else None
    x: dict[str, list[float]] = {}
    for axis, column in (("tokens", "train/tokens"), ("seconds", "train/elapsed_s")):
        values = [row.get(column, math.nan) for row, _ in points]
        if values and all(is_number(v) and math.isfinite(v) for v in values):
            x[axis] = values
    if per_token is not None and "tokens" in x:
        x["flops"] = [t * per_token for t in x["tokens"]]
    return Curve(x, [v for _, v in points])


def mean_curve(runs: Sequence[RunRecord], key: str, level: float) -> Curve | None:
    """The mean over seeds at the steps that all of them have; None for fewer than two seeds or no such step."""
    if len(runs) < 2:
        return None
    by_step = [{int(row["step"]): i for i, (row, _) in enumerate(run.column(key))} for run in runs]
    common = [s for s in by_step[0] if all(s in steps for steps in by_step)]
    if not common:
        return None
    seeds = [seed_curve(run, key) for run in runs]
    index = [[steps[s] for s in common] for steps in by_step]
    axes = [axis for axis in AXES if all(axis in c.x for c in seeds)]
    pairs = list(zip(seeds, index, strict=True))
    x = {axis: [statistics.fmean(c.x[axis][at[i]] for c, at in pairs) for i in range(len(common))] for axis in axes}
    over = [interval([c.y[at[i]] for c, at in pairs], level) for i in range(len(common))]
    return Curve(x, [o.mean for o in over], [o.low for o in over], [o.high for o in over])


def thinned(curve: Curve) -> Curve:
    """At most POINTS points: means of groups of neighbours; a group with a NaN is NaN."""
    n = len(curve.y)
    if n <= POINTS:
        return curve
    edges = [round(i * n / POINTS) for i in range(POINTS + 1)]

    def mean(values: Sequence[float]) -> list[float]:
        return [statistics.fmean(values[a:b]) for a, b in pairwise(edges)] if values else []

    return Curve({k: mean(v) for k, v in curve.x.items()}, mean(curve.y), mean(curve.low), mean(curve.high))
