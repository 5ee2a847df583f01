"""Population based training: members that copy better ones while they train, and change what they copy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from models.spec import near
from pipelines.lib.config import InputError
from pipelines.lib.search.domains import DEFAULT, Domain, Interval, Options, is_number, same
from pipelines.lib.search.rules.listed import (
    Settings,
    best_of_furthest,
    check_one_length,
    check_space,
    fresh,
    name,
    shown,
    stream,
)
from pipelines.lib.search.trials import Ask, Done, Problem, Rule, Trial

ATTEMPTS = 100  # changes tried until one is new and not refused
WHILE_TRAINING = "numbers under optim. and schedule., grad_clip, z_loss, and dropout"


@dataclass(frozen=True)
class Member:
    """What a member does in one piece.  source: the member whose checkpoint it takes over; None: its own."""

    settings: dict[str, Any]
    source: int | None = None


class Generation(NamedTuple):
    """One piece of a population: what each member does, and its trial if it was asked for; both by member number."""

    members: dict[int, Member]
    trials: dict[int, Trial]


@dataclass(frozen=True)
class Pbt(Rule):
    """Population based training.   Source: Jaderberg et al. 2017, arXiv:1711.09846.

    All members train a piece; then each of the worst takes over the checkpoint of one of the best (truncation
    selection) with settings that are changed a little or drawn anew, and all train the next piece. A member whose loss
    is not finite, or that failed, is always replaced. Generations are compared when they are complete, so decisions do
    not depend on how fast the workers are; every seed of the search trains a population of its own, and they fill each
    other's waiting time. What a checkpoint fixes (the architecture, the data plan) may differ between members: it is
    copied, never changed.

    population: members
    pieces: pieces that the length is cut into; between them members are compared
    quantile: the share of the members that is replaced, and the share that they copy from
    resample: probability that a changed setting is drawn anew from its domain
    factor: else it is multiplied or divided by this, or goes to the next in its list
    mutate: keys to change while training (none given: all that can be changed)
    """

    looks_back: ClassVar[bool] = True  # the copied member may have gone on before its copy begins

    population: int = 8
    pieces: int = 8
    quantile: float = 0.25
    resample: float = 0.25
    factor: float = 1.2
    mutate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.population < 2:
            raise ValueError(f"population={self.population}: one member has nobody to copy; try 8")
        if self.pieces < 2:
            raise ValueError(f"pieces={self.pieces}: nothing would ever be copied; try 8")
        if not 0 < self.quantile <= 0.5:
            raise ValueError(f"quantile={self.quantile} must be above 0 and at most 0.5; try 0.25")
        if not 0 <= self.resample <= 1:
            raise ValueError(f"resample={self.resample} is no probability; try 0.25")
        if not self.factor > 1:
            raise ValueError(f"factor={self.factor} must be above 1; try 1.2")

    def check(self, problem: Problem) -> None:
        check_one_length(problem, "pbt")
        check_space(problem)
        domains = problem.space.dimensions()
        for key in self.mutate:
            if key not in domains:
                raise InputError(f"rule.mutate: {key} does not vary in this space{near(key, domains)}")
            if not changes_while_training(key, domains[key]):
                raise InputError(f"rule.mutate: a checkpoint fixes {key}; what can change is {WHILE_TRAINING}")
        if not self.mutable(domains):
            raise InputError(f"vary: nothing here can change while training ({WHILE_TRAINING}); try `rule: asha`")

    def mutable(self, domains: Mapping[str, Domain]) -> dict[str, Domain]:
        """The keys that are changed, with their domains."""
        return {
            k: d for k, d in domains.items() if (k in self.mutate or not self.mutate) and changes_while_training(k, d)
        }

    def opening(self, problem: Problem, most: int) -> Sequence[Settings]:
        return [member.settings for member in self.first(problem, problem.seeds[0], set()).values()][:most]

    def work(self, problem: Problem) -> float:
        return float(self.population * len(problem.seeds))

    def next(self, problem: Problem, trials: Sequence[Trial]) -> Ask | Done | None:
        steps = []
        for seed in problem.seeds:
            step = self.of_seed(problem, [t for t in trials if t.ask.seed == seed], seed)
            if isinstance(step, Ask):
                return step
            steps.append(step)
        if None in steps:
            return None
        return Done("; ".join(f"seed {s}: {d.reason}" for s, d in zip(problem.seeds, steps, strict=True) if d))

    def of_seed(self, problem: Problem, trials: Sequence[Trial], seed: int) -> Ask | Done | None:
        """What the population of one seed does next."""
        generations = self.generations(problem, trials, seed)
        members, asked = generations[-1]
        if not members:
            return Done("no member has a finite loss")
        for i in members:
            if i not in asked:
                return self.piece(generations, i, seed)
        if any(t.status == "running" for t in asked.values()):
            return None
        return Done(f"{len(members)} members have trained to the end")

    def piece(self, generations: Sequence[Generation], i: int, seed: int) -> Ask:
        """The piece of member i in the last generation. It names what it goes on from, be it its own piece before."""
        share = len(generations) / self.pieces
        member = generations[-1].members[i]
        if len(generations) == 1:
            return Ask(member.settings, seed, share, keep=True, why=f"member {i} begins")
        before = generations[-2].trials[i if member.source is None else member.source]
        why = f"member {i} goes on"
        if member.source is not None:
            new = member.settings
            changes = [f"{k} {old} -> {new[k]}" for k, old in before.ask.settings.items() if old != new[k]]
            why = f"member {i} copies member {member.source}: {', '.join(changes)}"
        return Ask(member.settings, seed, share, keep=share < 1, source=before.number, why=why)

    def generations(self, problem: Problem, trials: Sequence[Trial], seed: int) -> list[Generation]:
        """All that are complete, and the one that follows.

        What its members do follows from the complete one before it, so nothing has to be remembered but the trials.
        """
        asked = {(name(problem, t), t.ask.share): t for t in trials}
        used: set[str] = set()
        members = self.first(problem, seed, used)
        found: list[Generation] = []
        while True:
            share = (len(found) + 1) / self.pieces
            at = {i: (problem.identity(m.settings), share) for i, m in members.items()}
            found.append(Generation(members, {i: asked[place] for i, place in at.items() if place in asked}))
            going = len(found[-1].trials) < len(members) or any(
                t.status == "running" for t in found[-1].trials.values()
            )
            if going or not members or share == 1:
                return found
            members = self.after(problem, found[-1], stream(problem.seed, "pbt", seed, len(found)), used)

    def first(self, problem: Problem, seed: int, used: set[str]) -> dict[int, Member]:
        """The members at the beginning: draws, all different. They differ from seed to seed."""
        members = {}
        for i in range(self.population):
            settings = fresh(problem, used, self.sampler(problem, seed, i))
            if settings is not None:
                members[i] = Member(settings)
                used.add(problem.identity(settings))
        return members

    def sampler(self, problem: Problem, seed: int, i: int) -> Callable[[int], dict[str, Any]]:
        return lambda attempt: problem.space.sample(stream(problem.seed, "pbt", seed, i, attempt))

    def after(self, problem: Problem, before: Generation, rng: random.Random, used: set[str]) -> dict[int, Member]:
        """The members of the next piece.  used: names of all settings so far, to which the new ones are added."""
        loss = {i: problem.objective.loss(t) for i, t in before.trials.items()}
        order = sorted(loss, key=lambda i: (loss[i], i))
        cut = max(1, int(self.quantile * len(order)))
        best = [i for i in order[:cut] if math.isfinite(loss[i])]
        lost = {i for i in order if math.isinf(loss[i])} | set(order[-cut:]) - set(best)
        following: dict[int, Member] = {}
        for i, member in before.members.items():
            source = rng.choice(best) if i in lost and best else i
            changed = self.changed(problem, before.members[source].settings, rng, used) if source != i else None
            if changed is not None:
                used.add(problem.identity(changed))
                following[i] = Member(changed, source)
            elif math.isfinite(loss[i]):
                following[i] = Member(member.settings)
        return following

    def changed(
        self, problem: Problem, settings: dict[str, Any], rng: random.Random, used: Collection[str]
    ) -> dict[str, Any] | None:
        """Settings near these ones that nobody has had; None if there are none."""
        domains = {k: d for k, d in self.mutable(problem.space.dimensions()).items() if k in settings}

        def sample(_: int) -> dict[str, Any]:
            return {**settings, **{k: self.near(settings[k], d, rng) for k, d in domains.items()}}

        return fresh(problem, used, sample, ATTEMPTS)

    def near(self, value: Any, domain: Domain, rng: random.Random) -> Any:
        """A value changed a little, or drawn anew."""
        anew = rng.random() < self.resample
        if isinstance(domain, Options):
            numbers = [v for v in domain.values if is_number(v)]  # `default` is no value to go to
            return rng.choice(numbers if anew else domain.neighbours(value, 1) or [value])
        assert isinstance(domain, Interval)
        if anew:
            return domain.sample(rng)
        up = rng.random() < 0.5
        moved = value * self.factor if up else value / self.factor
        if domain.integer:
            moved = max(value + 1, round(moved)) if up else min(value - 1, round(moved))
        return min(max(moved if domain.integer else float(f"{moved:.6g}"), domain.low), domain.high)

    def winner(self, problem: Problem, trials: Sequence[Trial]) -> Settings | None:
        """The last settings of the best member.

        They are what its training ended with. Its loss belongs to the whole of its lineage (see records): the settings
        alone, from the start, train another model.
        """
        best = best_of_furthest(problem, trials)
        return best.ask.settings if best else None

    def records(self, problem: Problem, trials: Sequence[Trial]) -> Any:
        """Every population's generations, and the lineage of the best trial: what to set at which share."""
        populations = []
        for seed in problem.seeds:
            found = self.generations(problem, [t for t in trials if t.ask.seed == seed], seed)
            rows = [
                {
                    "share": (g + 1) / self.pieces,
                    "members": [
                        {
                            "member": i,
                            "trial": asked[i].number,
                            "objective": shown(problem, problem.objective.loss(asked[i])),
                            "copies": member.source,
                        }
                        for i, member in members.items()
                        if i in asked
                    ],
                }
                for g, (members, asked) in enumerate(found)
            ]
            populations.append({"seed": seed, "generations": rows})
        best = best_of_furthest(problem, trials)
        line = [
            {"number": t.number, "until_share": t.ask.share, "settings": dict(t.ask.settings)}
            for t in (lineage(trials, best) if best else [])
        ]
        return {"populations": populations, "lineage_of_best": line}


def changes_while_training(key: str, domain: Domain) -> bool:
    """Whether a run may go on from a checkpoint with another value: what only scales updates, and dropout."""
    numbers = isinstance(domain, Interval)
    if isinstance(domain, Options):
        numbers = all(is_number(v) or same(v, DEFAULT) for v in domain.values)
    return numbers and (
        key.startswith(("optim.", "schedule.")) or key in ("grad_clip", "z_loss") or key.split(".")[-1] == "dropout"
    )


def lineage(trials: Sequence[Trial], trial: Trial) -> list[Trial]:
    """The pieces that made a trial's weights, the first one first."""
    by_number = {t.number: t for t in trials}
    line = [trial]
    while (source := line[0].ask.source) is not None:
        line.insert(0, by_number[source])
    return line
