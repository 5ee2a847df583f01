"""Rules that stop poor trials early: asynchronous successive halving and median stopping.

Both work in pieces: a trial is trained to a share of its length, leaves a checkpoint, and goes on from it when its turn
comes. A worker is never held by a trial that waits.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipelines.lib.config import InputError
from pipelines.lib.search.rules.listed import (
    USED_UP,
    Settings,
    best_of_furthest,
    by_setting,
    check_draws,
    check_one_length,
    check_space,
    draw,
    first_draws,
    name,
    shown,
)
from pipelines.lib.search.trials import Ask, Done, Problem, Rule, Trial

ENDED = ("done", "failed")
Curve = tuple[str, int]  # a trial as a whole: the name of its settings, and its seed
Means = dict[float, dict[Curve, float]]  # share -> mean loss of each trial that reached it


@dataclass(frozen=True)
class Asha(Rule):
    """Asynchronous successive halving.   Source: Li et al. 2018, arXiv:1810.05934, algorithm 2.

    Rungs stand at shares 1, 1/eta, 1/eta**2, ... of the length. A free worker promotes the best trial that is among the
    best 1/eta of its rung and not yet promoted, from the highest rung that has one; if there is none it starts a new
    draw at the lowest rung. Nothing waits for a rung to fill, and a promotion goes on from the trial's checkpoint.
    A trial whose loss is not finite, or that failed, counts as the worst of its rung and is never promoted.
    When no draw is left and no rung has reached the end, the best trial of the highest rung goes on alone.
    The search's first seed is used; the others are for the finalists.

    eta: one trial in this many is promoted
    min_share: the lowest rung is the lowest share that is not below this
    draws: settings to draw (null: until the search's budget ends)
    finalists: best trials at the full length that are trained again with all other seeds, when the draws are done
    """

    # On simulated curves (tests/pipelines/search/simulation.py; 60 repetitions, 40 whole trials) these reach the final
    # best of random draws with 0.31 to 0.36 of its budget, whether curves cross little or much. eta 4 from 1/16 needs
    # 0.23 to 0.29 where they cross little, but 0.78 where large models take four times as long to learn as small ones.
    eta: int = 3
    min_share: float = 0.1
    draws: int | None = None
    finalists: int = 0

    def __post_init__(self) -> None:
        check_draws(self.draws)
        if self.eta < 2:
            raise ValueError(f"eta={self.eta}: at least one in 2 must be left behind; try 3")
        if not 0 < self.min_share < 1:
            raise ValueError(f"min_share={self.min_share} must lie between 0 and 1; try 0.1")
        if self.min_share > 1 / self.eta:
            raise ValueError(f"min_share={self.min_share} leaves one rung; at most 1/eta={1 / self.eta:.3g} leaves two")
        if self.finalists < 0:
            raise ValueError(f"finalists={self.finalists} is negative")
        if self.finalists and self.draws is None:
            raise ValueError("finalists are trained when the draws are done: give draws")

    @property
    def shares(self) -> list[float]:
        """Of the rungs, rising to 1."""
        shares = [1.0]
        while shares[0] / self.eta >= self.min_share * (1 - 1e-9):  # a share of 1/64 is not below a min_share of 1/64
            shares.insert(0, self.eta ** -len(shares))
        return shares

    def check(self, problem: Problem) -> None:
        check_one_length(problem, "asha")
        check_space(problem)
        if self.finalists and len(problem.seeds) == 1:
            raise InputError(
                f"finalists={self.finalists} are trained with the other seeds, and there is one; try seeds=3"
            )

    def opening(self, problem: Problem, most: int) -> Sequence[Settings]:
        return first_draws(problem, self.draws, most)

    def work(self, problem: Problem) -> float | None:
        """One in eta of each rung goes on to the next, so a few more where trials come in an unlucky order."""
        if self.draws is None:
            return None
        shares = self.shares
        steps = [shares[0], *(b - a for a, b in pairwise(shares))]
        climbed = sum(max(1.0, self.draws / self.eta**k) * step for k, step in enumerate(steps))
        return climbed + self.finalists * (len(problem.seeds) - 1)

    def next(self, problem: Problem, trials: Sequence[Trial]) -> Ask | Done | None:
        first = [t for t in trials if t.ask.seed == problem.seeds[0]]
        rungs = self.rungs(problem, first)
        for k in reversed(range(len(rungs) - 1)):
            ended = ranked(problem, rungs[k])
            for trial in ended[: len(ended) // self.eta]:
                if self.can_go_on(problem, trial, rungs[k + 1]):
                    return self.promotion(trial, k, len(ended))
        known = by_setting(problem, trials)
        settings = draw(problem, len(known), known) if self.draws is None or len(known) < self.draws else None
        if settings is not None:
            return Ask(settings, problem.seeds[0], self.shares[0], keep=True, why=f"draw {len(known)}")
        if any(t.status == "running" for t in first):
            return None
        return self.last_survivor(problem, rungs) or self.final(problem, rungs[-1], trials) or self.done(known)

    def rungs(self, problem: Problem, trials: Sequence[Trial]) -> list[dict[str, Trial]]:
        """The trials on each rung by the name of their settings, in the order of asking; refused ones are on none."""
        on: dict[float, dict[str, Trial]] = {share: {} for share in self.shares}
        for trial in trials:
            if trial.status != "refused" and trial.ask.share in on:
                on[trial.ask.share][name(problem, trial)] = trial
        return list(on.values())

    def can_go_on(self, problem: Problem, trial: Trial, above: Mapping[str, Trial]) -> bool:
        return math.isfinite(problem.objective.loss(trial)) and name(problem, trial) not in above

    def promotion(self, trial: Trial, k: int, of: int) -> Ask:
        share = self.shares[k + 1]
        why = f"promoted from {self.shares[k]:.3g} to {share:.3g} of the length, one of the best 1/{self.eta} of {of}"
        return Ask(trial.ask.settings, trial.ask.seed, share, keep=share < 1, why=why)

    def last_survivor(self, problem: Problem, rungs: list[dict[str, Trial]]) -> Ask | None:
        """Too few trials for the next rung: the best goes on, so that a search always ends with one at full length."""
        for k in reversed(range(len(rungs) - 1)):
            if any(math.isfinite(problem.objective.loss(t)) for t in rungs[k + 1].values()):
                return None
            for trial in ranked(problem, rungs[k]):
                if self.can_go_on(problem, trial, rungs[k + 1]):
                    ask = self.promotion(trial, k, 0)
                    why = f"promoted from {self.shares[k]:.3g} to {ask.share:.3g} of the length, the best that is left"
                    return Ask(ask.settings, ask.seed, ask.share, ask.keep, why=why)
        return None

    def final(self, problem: Problem, top: Mapping[str, Trial], trials: Sequence[Trial]) -> Ask | None:
        """The next run of a finalist with another seed."""
        whole = {(name(problem, t), t.ask.seed) for t in trials if t.ask.share == 1}
        for seed in problem.seeds[1:]:
            for trial in ranked(problem, top)[: self.finalists]:
                if math.isfinite(problem.objective.loss(trial)) and (name(problem, trial), seed) not in whole:
                    return Ask(trial.ask.settings, seed, why="a finalist with another seed")
        return None

    def done(self, known: Mapping[str, Any]) -> Done:
        if self.draws is not None and len(known) >= self.draws:
            return Done(f"all {self.draws} draws are promoted or left behind")
        return Done(f"{USED_UP}; all {len(known)} settings are promoted or left behind")

    def winner(self, problem: Problem, trials: Sequence[Trial]) -> Settings | None:
        """Before anything reached the full length: the best of those that got furthest."""
        best = best_of_furthest(problem, trials)
        return super().winner(problem, trials) or (best.ask.settings if best else None)

    def records(self, problem: Problem, trials: Sequence[Trial]) -> Any:
        """Every rung: its share, how many ended, diverged or failed there and were promoted, and its best loss."""
        rungs = self.rungs(problem, [t for t in trials if t.ask.seed == problem.seeds[0]])
        return {"rungs": [_counts(problem, *pair) for pair in zip(self.shares, rungs, [*rungs[1:], {}], strict=True)]}


@dataclass(frozen=True)
class Median(Rule):
    """Median stopping over random draws.   Source: Golovin et al. 2017 (Vizier), section 3.2.1.

    At every share at which trials report, a trial goes on unless its best loss so far is worse than the median, over
    the others that reached this share, of their mean loss from the grace on. Losses that are not finite do not enter
    the median and end their own trial. Vizier ends a trial for good; here it waits with its checkpoint, and goes on in
    the rare case that later trials raise the median above it, so that the rule stays a function of what is known.
    A setting's next seed starts when the one before has reached the full length.

    pieces: shares at which a trial reports, evenly spaced
    grace: no trial is stopped before this share
    others: other trials that must have reached a share before one is stopped there
    draws: settings to draw (null: until the search's budget ends)
    """

    pieces: int = 8
    grace: float = 0.25
    others: int = 3
    draws: int | None = None

    def __post_init__(self) -> None:
        check_draws(self.draws)
        if self.pieces < 2:
            raise ValueError(f"pieces={self.pieces}: nothing could be stopped; try 8")
        if not 0 <= self.grace < 1:
            raise ValueError(f"grace={self.grace} must be at least 0 and less than 1; try 0.25")
        if self.others < 1:
            raise ValueError(f"others={self.others}: a median needs at least 1; try 3")

    def check(self, problem: Problem) -> None:
        check_one_length(problem, "median")
        check_space(problem)

    def opening(self, problem: Problem, most: int) -> Sequence[Settings]:
        return first_draws(problem, self.draws, most)

    def work(self, problem: Problem) -> float | None:
        """As if none were stopped."""
        return None if self.draws is None else float(self.draws * len(problem.seeds))

    def next(self, problem: Problem, trials: Sequence[Trial]) -> Ask | Done | None:
        curves = self.curves(problem, trials)
        means = self.means(problem, curves)
        for which, pieces in curves.items():
            last = pieces[-1]
            if last.status == "done" and last.ask.share < 1 and not self.stops(problem, which, pieces, means):
                return self.piece(last.ask.settings, last.ask.seed, len(pieces), "not worse than the median")
        known = by_setting(problem, trials)
        for at, of in known.items():
            for before, seed in zip(problem.seeds, problem.seeds[1:], strict=False):
                if (at, seed) not in curves and (at, before) in curves and self.whole(curves[at, before]):
                    return self.piece(of[0].ask.settings, seed, 0, "the next seed")
        settings = draw(problem, len(known), known) if self.draws is None or len(known) < self.draws else None
        if settings is not None:
            return self.piece(settings, problem.seeds[0], 0, f"draw {len(known)}")
        if any(t.status == "running" for t in trials):
            return None
        used_up = self.draws is None or len(known) < self.draws
        return Done(USED_UP if used_up else f"all {self.draws} draws have ended or were stopped")

    def piece(self, settings: Settings, seed: int, index: int, why: str) -> Ask:
        share = (index + 1) / self.pieces
        return Ask(settings, seed, share, keep=share < 1, why=why)

    def whole(self, pieces: Sequence[Trial]) -> bool:
        return pieces[-1].status == "done" and pieces[-1].ask.share == 1

    def curves(self, problem: Problem, trials: Sequence[Trial]) -> dict[Curve, list[Trial]]:
        """(name of the settings, seed) -> its pieces by rising share; in the order of asking."""
        found: dict[Curve, list[Trial]] = {}
        for trial in trials:
            found.setdefault((name(problem, trial), trial.ask.seed), []).append(trial)
        return found

    def means(self, problem: Problem, curves: Mapping[Curve, Sequence[Trial]]) -> Means:
        """The mean loss from the grace until each share, of those that reached it with finite losses."""
        found: Means = {}
        for which, pieces in curves.items():
            losses: list[float] = []
            for trial in pieces:
                if trial.status == "done" and trial.ask.share >= self.grace:
                    losses.append(problem.objective.loss(trial))
                    if math.isfinite(mean := statistics.fmean(losses)):
                        found.setdefault(trial.ask.share, {})[which] = mean
        return found

    def median(self, share: float, means: Means, but: Curve | None = None) -> float | None:
        """Of the means at a share, without one trial's own; None where there are too few."""
        others = [mean for which, mean in means.get(share, {}).items() if which != but]
        return statistics.median(others) if len(others) >= self.others else None

    def stops(self, problem: Problem, which: Curve, pieces: Sequence[Trial], means: Means) -> bool:
        """Whether a trial waits at the share it has reached."""
        losses = [problem.objective.loss(t) for t in pieces]
        median = self.median(pieces[-1].ask.share, means, which)
        return math.isinf(losses[-1]) or (median is not None and min(losses) > median)

    def records(self, problem: Problem, trials: Sequence[Trial]) -> Any:
        """Every share: how many trials ended there, how many stay there, and the median of all means."""
        curves = self.curves(problem, trials)
        means = self.means(problem, curves)
        stay = [
            pieces[-1].ask.share
            for which, pieces in curves.items()
            if pieces[-1].status in ENDED and self.stops(problem, which, pieces, means)
        ]
        shares = [(i + 1) / self.pieces for i in range(self.pieces)]
        return {
            "shares": [
                {
                    "share": share,
                    "ended": sum(t.ask.share == share and t.status in ENDED for t in trials),
                    "stopped": stay.count(share) if share < 1 else 0,
                    "median": shown(problem, self.median(share, means)),
                }
                for share in shares
            ]
        }

    def winner(self, problem: Problem, trials: Sequence[Trial]) -> Settings | None:
        """Before anything reached the full length: the best of those that got furthest."""
        best = best_of_furthest(problem, trials)
        return super().winner(problem, trials) or (best.ask.settings if best else None)


def ranked(problem: Problem, rung: Mapping[str, Trial]) -> list[Trial]:
    """Those that ended on a rung, the best first; of equals the earlier one."""
    ended = [t for t in rung.values() if t.status in ENDED]
    return sorted(ended, key=lambda t: (problem.objective.loss(t), t.number))


def _counts(problem: Problem, share: float, rung: Mapping[str, Trial], above: Mapping[str, Trial]) -> dict[str, Any]:
    losses = [problem.objective.loss(t) for t in ranked(problem, rung)]
    return {
        "share": share,
        "ended": len(losses),
        "diverged_or_failed": sum(math.isinf(loss) for loss in losses),
        "promoted": len(above),
        "best": shown(problem, losses[0]) if losses else None,
    }
