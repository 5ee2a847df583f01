"""Rules that look at no result: sweep and grid try every point of a space, random draws from it.

What the other rules share stands here too: the name of a trial's settings, fresh draws, and the list of choices that
lead to each point of a space.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.lib.config import InputError
from pipelines.lib.search.domains import Domain, Interval, Options, Steps
from pipelines.lib.search.space import Space, paths
from pipelines.lib.search.trials import Ask, Done, Problem, Rule, Trial
from pipelines.lib.training import LENGTHS

ATTEMPTS = 1000  # draws after which a space counts as used up: one free point among 200 is missed once in 150 times

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Sweep(Rule):
    """Every point of the space with every seed, in the order written: the last key changes fastest, the seed slowest.

    A reader who stops early then has the whole map, drawn with fewer seeds. With the seeds changing fastest he would
    have one corner of it, in which the first keys never changed. (Random does the opposite: any beginning of a random
    sequence is a fair sample of the space, so each of its settings is finished before the next one starts.)
    Points that mean the same settings are tried once; a point that is refused is shown as such, with the reason.
    """

    def next(self, problem: Problem, trials: Sequence[Trial]) -> Ask | Done | None:
        points = _points(self, problem)
        asked = {(name(problem, t), t.ask.seed) for t in trials}
        refused = {name(problem, t) for t in trials if t.status == "refused"}
        for seed in problem.seeds:
            for i, (point, settings) in enumerate(points.items()):
                if (point, seed) not in asked and point not in refused:
                    return Ask(settings, seed, why=f"point {i + 1} of {len(points)}")
        return Done(f"all {len(points)} points were tried with {len(problem.seeds)} seeds")

    def check(self, problem: Problem) -> None:
        points = self.expand(problem.space)
        if not points:
            raise InputError("vary: there is nothing to sweep over")
        first = ""
        for settings in points:
            reason = problem.refuses(settings)
            if reason is None:
                return
            first = first or reason
        raise InputError(f"vary: every one of the {len(points)} points is refused; the first: {first}")

    def opening(self, problem: Problem, most: int) -> Sequence[Settings]:
        return list(self.expand(problem.space))

    def work(self, problem: Problem) -> float:
        points = {point for point, settings in _points(self, problem).items() if problem.refuses(settings) is None}
        return float(len(points) * len(problem.seeds))

    def expand(self, space: Space) -> list[dict[str, Any]]:
        """The settings to try, in order. Raises InputError with the key that has no end."""
        return space.points()

    def winner(self, problem: Problem, trials: Sequence[Trial]) -> Settings | None:
        """The lowest mean over the seeds that every point has been tried with.

        (In the middle of a pass, those with the most seeds would be the first points, whatever their loss.)
        """
        by_seed: dict[str, dict[int, Trial]] = {}
        for trial in trials:
            if trial.status in ("done", "failed"):
                by_seed.setdefault(name(problem, trial), {})[trial.ask.seed] = trial
        common = set.intersection(*(set(of) for of in by_seed.values())) if by_seed else set()
        if not common:
            return super().winner(problem, trials)
        total = {point: sum(problem.objective.loss(of[s]) for s in common) for point, of in by_seed.items()}
        best = min(total, key=lambda point: total[point])
        return by_seed[best][min(common)].ask.settings if math.isfinite(total[best]) else None


@dataclass(frozen=True)
class Grid(Sweep):
    """A sweep over a space that has intervals: each is cut into evenly spaced values, both its ends among them.

    points: values of each interval; even in the logarithm where the interval is logarithmic
    """

    points: int = 4

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"points={self.points}: a grid needs both ends of an interval; try 4")

    def expand(self, space: Space) -> list[dict[str, Any]]:
        found = {key(settings): settings for _, settings in ways(space, self.cut)}
        return list(found.values())  # once each: a condition may leave out what made two choices differ

    def cut(self, at: str, domain: Domain) -> list[Any]:
        """The values of a key's domain that are tried."""
        if isinstance(domain, Options):
            return list(domain.values)
        if not isinstance(domain, Interval):
            raise InputError(f"vary: {at}: {ONLY_GREEDY}")
        low, high = (math.log(domain.low), math.log(domain.high)) if domain.log else (domain.low, domain.high)
        inside = [low + (high - low) * i / (self.points - 1) for i in range(1, self.points - 1)]
        between = [float(f"{math.exp(x) if domain.log else x:.6g}") for x in inside]
        values = [domain.low, *between, domain.high]
        return list(dict.fromkeys(round(v) for v in values)) if domain.integer else values


@dataclass(frozen=True)
class Random(Rule):
    """Independent draws from the space, each with every seed before the next one starts.

    Draw i depends on the search's seed and i alone, so two searches of one seed share their beginnings. What is refused
    and what was drawn before is drawn again.

    draws: settings to draw (null: until the search's budget ends)
    """

    draws: int | None = None

    def __post_init__(self) -> None:
        check_draws(self.draws)

    def next(self, problem: Problem, trials: Sequence[Trial]) -> Ask | Done | None:
        known = by_setting(problem, trials)
        for of in known.values():
            left = [s for s in problem.seeds if s not in {t.ask.seed for t in of}]
            if left and not any(t.status == "refused" for t in of):
                return Ask(of[0].ask.settings, left[0], why=of[0].ask.why)
        if self.draws is not None and len(known) >= self.draws:
            return Done(f"all {self.draws} settings were drawn and tried with {len(problem.seeds)} seeds")
        settings = self.draw(problem, known)
        return Done(USED_UP) if settings is None else Ask(settings, problem.seeds[0], why=f"draw {len(known)}")

    def check(self, problem: Problem) -> None:
        check_space(problem)

    def draw(self, problem: Problem, known: Mapping[str, Sequence[Trial]]) -> dict[str, Any] | None:
        """The next settings; None when no new ones were found. known: the trials of each setting, in order."""
        return draw(problem, len(known), known)

    def opening(self, problem: Problem, most: int) -> Sequence[Settings]:
        return first_draws(problem, self.draws, most)

    def work(self, problem: Problem) -> float | None:
        return None if self.draws is None else float(self.draws * len(problem.seeds))


ONLY_GREEDY = "an increment leads on from a value, as `rule: greedy` does; here write a list or {uniform: [low, high]}"
USED_UP = f"no new setting in {ATTEMPTS} draws: the space is used up"


def key(settings: Settings) -> str:
    """Settings as text; equal settings give equal texts, also when one of them was read from the ledger."""
    return json.dumps(settings, sort_keys=True)


def name(problem: Problem, trial: Trial) -> str:
    """What the settings of a trial are known by; those that cannot be built have no identity but their text."""
    if trial.id:
        return trial.id
    settings = trial.ask.settings
    return key(settings) if problem.refuses(settings) else problem.identity(settings)


def by_setting(problem: Problem, trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """The trials of each setting; both in the order of asking."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(name(problem, trial), []).append(trial)
    return found


def stream(*words: object) -> random.Random:
    """Random numbers that depend on these words alone, on every machine and version."""
    return random.Random("/".join(map(str, words)))


def fresh(
    problem: Problem, taken: Collection[str], sample: Callable[[int], dict[str, Any]], attempts: int = ATTEMPTS
) -> dict[str, Any] | None:
    """The first of sample(0), sample(1), ... that is not refused and has an identity that is not taken; None: none."""
    for attempt in range(attempts):
        settings = sample(attempt)
        if problem.refuses(settings) is None and problem.identity(settings) not in taken:
            return settings
    return None


def draw(problem: Problem, index: int, taken: Collection[str]) -> dict[str, Any] | None:
    """Draw number `index` of the space: the same for every rule, so that they compare on the same settings."""
    return fresh(problem, taken, lambda attempt: problem.space.sample(stream(problem.seed, index, attempt)))


def first_draws(problem: Problem, draws: int | None, most: int) -> list[Settings]:
    """The first draws of the space, at most so many."""
    taken: dict[str, Settings] = {}
    while len(taken) < min(most, most if draws is None else draws):
        settings = draw(problem, len(taken), taken)
        if settings is None:
            break
        taken[problem.identity(settings)] = settings
    return list(taken.values())


def check_draws(draws: int | None) -> None:
    if draws is not None and draws < 1:
        raise ValueError(f"draws={draws} is not positive; null draws until the search's budget ends")


def check_space(problem: Problem) -> None:
    """Raise InputError for a space that cannot be drawn from, or of which every draw is refused."""
    for at, domain in problem.space.dimensions().items():
        if isinstance(domain, Steps):
            raise InputError(f"vary: {at}: {ONLY_GREEDY}")
    reasons = []
    for attempt in range(100):
        reason = problem.refuses(problem.space.sample(stream(problem.seed, 0, attempt)))
        if reason is None:
            return
        reasons.append(reason)
    raise InputError(f"vary: each of {len(reasons)} draws from the space is refused; the first: {reasons[0]}")


def check_one_length(problem: Problem, rule: str) -> None:
    """Raise InputError where the length itself varies: such a rule compares trials at equal shares of one length."""
    if varied := sorted(problem.space.keys() & set(LENGTHS)):
        raise InputError(f"vary: {varied[0]}: {rule} compares at equal shares of one length; `rule: sweep` can vary it")


def best_of_furthest(problem: Problem, trials: Sequence[Trial]) -> Trial | None:
    """The trial of lowest loss among those that got furthest; None where none has a finite loss."""
    finite = [t for t in trials if math.isfinite(problem.objective.loss(t))]
    return min(finite, key=lambda t: (-t.ask.share, problem.objective.loss(t), t.number), default=None)


def shown(problem: Problem, loss: float | None) -> float | None:
    """A loss as people know it: the metric itself, whichever way it is optimised; None where it is not finite."""
    if loss is None or not math.isfinite(loss):
        return None
    return loss if problem.objective.mode == "min" else -loss


def ways(
    space: Space, values: Callable[[str, Domain], Sequence[Any]]
) -> Iterator[tuple[dict[str, tuple[Domain, Any]], dict[str, Any]]]:
    """Every way through a space, the last choice changing fastest.

    values: the values to try at a choice, never none.  Yields (key -> (its domain, the value), settings).
    """

    def way(choose: Callable[[str, Domain], Any]) -> tuple[dict[str, tuple[Domain, Any]], dict[str, Any]]:
        chosen: dict[str, tuple[Domain, Any]] = {}

        def note(at: str, domain: Domain) -> Any:
            chosen[at] = domain, choose(at, domain)
            return chosen[at][1]

        settings = space.draw(note)
        return chosen, settings

    return paths(way, values)


_last: list[tuple[Sweep, Problem, dict[str, dict[str, Any]]]] = []  # the last expansion: it takes a second per thousand


def _points(rule: Sweep, problem: Problem) -> dict[str, dict[str, Any]]:
    """name -> settings of every point, once each, in order."""
    if not (_last and _last[0][0] == rule and _last[0][1] is problem):
        points: dict[str, dict[str, Any]] = {}
        for settings in rule.expand(problem.space):
            points.setdefault(name(problem, Trial(-1, Ask(settings, 0))), settings)
        _last[:] = [(rule, problem, points)]
    return _last[0][2]
