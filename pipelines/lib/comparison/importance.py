"""Which settings matter: a forest's permutation importance on held-out variants, or main effects of a small design.

The seeds of a variant stay together, so that nothing is predicted from its own repetition. Where there are too few runs
to tell, that is the answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from pipelines.lib.comparison.variants import ABSENT, differing, number_axis, word
from pipelines.lib.statistics import holm, interval, paired

FOREST_VARIANTS = 20  # fewer are a small design
FOREST_PER_SETTING = 5  # variants for each setting that varies
FOLDS, REPEATS, TREES = 5, 10, 100
EXPLAINS = 0.1  # share of the variance on held-out variants below which a forest has learned nothing

Settings = Mapping[str, Any]
Values = Mapping[str, float]


@dataclass(frozen=True)
class Effect:
    """What one setting does.

    change: `a -> b` for a main effect, empty for a forest's importance
    size: change of the metric, or share of the held-out variance that goes when the setting is shuffled
    low, high: its interval;  p: adjusted over all effects (main effects only)
    shown: whether it stands out of its error;  n: seeds, contexts or folds behind the interval
    """

    key: str
    change: str
    size: float
    low: float
    high: float
    p: float
    shown: bool
    n: int


@dataclass(frozen=True)
class Importance:
    """kind: by which method, or `none` when it cannot be told;  text: how it was had, or why not."""

    kind: Literal["forest", "main effects", "none"]
    text: str
    effects: tuple[Effect, ...] = ()


def importance_of(variants: Sequence[tuple[Settings, Values]], keys: Sequence[str], level: float) -> Importance:
    """variants: (settings, seed -> finite value), fully trained ones only.  keys: the settings that vary."""
    if not keys or len(variants) < 2:
        return Importance("none", "There is no setting to weigh: it takes two fully trained variants that differ.")
    if len(variants) >= max(FOREST_VARIANTS, FOREST_PER_SETTING * len(keys)):
        return forest(variants, keys, level)
    return main_effects(variants, keys, level)


# ---- small designs ---------------------------------------------------------------------------------------------------


def main_effects(variants: Sequence[tuple[Settings, Values]], keys: Sequence[str], level: float) -> Importance:
    """Of each setting, between neighbouring values: mean over the pairs of variants that differ in nothing else.

    Over common seeds where there are two or more (each averaged over its pairs), else over the pairs.
    """
    raw = []
    for key in keys:
        for old, new in steps([s.get(key, ABSENT) for s, _ in variants]):
            pairs = matched(variants, key, old, new)
            seeds = sorted(set.intersection(*(set(a) & set(b) for a, b in pairs))) if pairs else []
            if len(seeds) >= 2:
                one = {s: float(np.mean([a[s] for a, _ in pairs])) for s in seeds}
                two = {s: float(np.mean([b[s] for _, b in pairs])) for s in seeds}
            elif len(pairs) >= 2:
                one = {str(i): float(np.mean(list(a.values()))) for i, (a, _) in enumerate(pairs)}
                two = {str(i): float(np.mean(list(b.values()))) for i, (_, b) in enumerate(pairs)}
            else:
                continue
            raw.append((key, f"{word(old)} → {word(new)}", paired(one, two, level), len(pairs)))
    if not raw:
        text = (
            f"Too few runs to tell: {len(variants)} variants, and no setting has either two seeds or two pairs of "
            "variants that differ in nothing else."
        )
        return Importance("none", text)
    adjusted = holm([d.p for _, _, d, _ in raw])
    effects = [
        Effect(key, change, d.mean, d.low, d.high, p, p < 1 - level, d.n)
        for (key, change, d, _), p in zip(raw, adjusted, strict=True)
    ]
    effects.sort(key=lambda e: -abs(e.size))
    text = (
        f"Main effects: the mean change of the metric between variants that differ in nothing else, with {level:.0%} "
        f"intervals, Holm-adjusted over {len(effects)} effects. A forest needs "
        f"{max(FOREST_VARIANTS, FOREST_PER_SETTING * len(keys))} variants; here are {len(variants)}."
    )
    untold = [key for key in keys if key not in {e.key for e in effects}]
    if untold:
        text += f" Too few runs to tell: {', '.join(untold)}."
    return Importance("main effects", text, tuple(effects))


def steps(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Which values of a setting to weigh against each other: neighbouring numbers; words against the usual one."""
    distinct = {repr(v) if v is not ABSENT else "": v for v in values if v is not ABSENT}
    if len(distinct) < 2:
        return []
    if number_axis(distinct.values()) is not None:
        return list(pairwise(sorted(distinct.values())))
    usual = Counter(repr(v) for v in values if v is not ABSENT).most_common(1)[0][0]
    return [(distinct[usual], v) for k, v in distinct.items() if k != usual]


def matched(variants: Sequence[tuple[Settings, Values]], key: str, old: Any, new: Any) -> list[tuple[Values, Values]]:
    """The values of variants with `old` and of those with `new` that differ from them in nothing else."""
    return [
        (va, vb)
        for a, va in variants
        if a.get(key, ABSENT) == old
        for b, vb in variants
        if b.get(key, ABSENT) == new and differing(a, b) == [key]
    ]


# ---- a forest --------------------------------------------------------------------------------------------------------


def forest(variants: Sequence[tuple[Settings, Values]], keys: Sequence[str], level: float) -> Importance:
    """Permutation importance of a random forest on variants that it has not seen.

    Each setting's columns are shuffled together. The size is the rise of the squared error as a share of the metric's
    variance; its interval is over the folds.   Source: Breiman, Machine Learning 45 (2001).
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import GroupKFold

    at = [(i, v) for i, (_, values) in enumerate(variants) for v in values.values()]
    groups, y = np.array([i for i, _ in at]), np.array([v for _, v in at])
    columns = [encode([variants[i][0].get(key, ABSENT) for i in groups]) for key in keys]
    x = np.concatenate(columns, axis=1)
    ends = np.cumsum([0, *(c.shape[1] for c in columns)])
    variance = float(y.var())
    if variance == 0:
        return Importance("none", "Every run has the same value: no setting does anything.")
    draw = np.random.default_rng(0)
    rises: list[list[float]] = [[] for _ in keys]
    error = 0.0
    for train, test in GroupKFold(FOLDS).split(x, y, groups):
        model = RandomForestRegressor(TREES, random_state=0, n_jobs=1).fit(x[train], y[train])
        base = np.square(model.predict(x[test]) - y[test])
        error += float(base.sum())
        shuffled = np.tile(x[test], (len(keys), REPEATS, 1, 1))  # [keys, repeats, runs, columns]
        for k in range(len(keys)):
            for r in range(REPEATS):
                part = slice(ends[k], ends[k + 1])
                shuffled[k, r, :, part] = x[test][draw.permutation(len(test)), part]
        guesses = model.predict(shuffled.reshape(-1, x.shape[1])).reshape(len(keys), -1, len(test))
        for rise, guess in zip(rises, guesses, strict=True):
            rise.append(float(np.square(guess - y[test]).mean() - base.mean()) / variance)
    explained = 1 - error / (variance * len(y))
    if explained < EXPLAINS:
        text = (
            f"It cannot be told: on variants that it has not seen, a random forest over {len(variants)} variants "
            f"predicts no better than their mean (it explains {explained:.0%} of the variance)."
        )
        return Importance("none", text)
    effects = []
    for key, rise in zip(keys, rises, strict=True):
        over = interval(rise, level)
        effects.append(Effect(key, "", over.mean, over.low, over.high, math.nan, over.low > 0, over.n))
    effects.sort(key=lambda e: -e.size)
    text = (
        f"Permutation importance of a random forest on held-out variants ({FOLDS} folds of {len(variants)} variants, "
        f"{len(y)} runs): the share of the variance that its prediction loses when a setting is shuffled, with "
        f"{level:.0%} intervals over the folds. On these variants it explains {explained:.0%} of the variance."
    )
    return Importance("forest", text, tuple(effects))


def encode(values: Sequence[Any]) -> np.ndarray:
    """One setting as columns [runs, n]: a number (its logarithm over wide ranges), or one column per word."""
    log = number_axis(values)
    if log is None:
        words = [word(v) for v in values]
        return np.array([[float(w == known) for known in dict.fromkeys(words)] for w in words])
    numbers = [float(v) for v in values if v is not ABSENT]
    middle = float(np.median(numbers))
    filled = np.array([[middle if v is ABSENT else float(v)] for v in values])
    return np.log10(filled) if log else filled
