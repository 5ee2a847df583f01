"""What a rule and the rest of a search say to each other: asks, trials, and the problem.

A rule is a function of what is known: `next(problem, trials)` gives the next piece of work, None to wait for running
ones, or Done. It keeps no state that it could not compute again from `trials`, so a search that was killed goes on
from its ledger with the same decisions, and a rule can be proven with simulated trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from models.spec import Part

if TYPE_CHECKING:
    from pipelines.lib.search.space import Space

Status = Literal["running", "done", "failed", "refused"]


@dataclass(frozen=True)
class Ask:
    """One piece of work: train these settings with this seed up to a share of their length.

    settings: dotted key -> plain value, laid over the search's recipe
    seed: of initialisation, data order and dropout; equal seeds make pairs
    share: of the trial's length, in (0, 1]; a piece goes on from the same trial's shorter piece, if there is one
    keep: whether to leave a checkpoint that a later piece can go on from
    source: number of the trial whose checkpoint and progress it takes over though its settings differ (PBT)
    why: what a person reads in the ledger, such as `round 2: model.n_layers 2 -> 3`
    """

    settings: Mapping[str, Any]
    seed: int
    share: float = 1.0
    keep: bool = False
    source: int | None = None
    why: str = ""


@dataclass(frozen=True)
class Trial:
    """An ask and what came of it.

    number: place in the order of asking, from 0
    id: hash of the resolved config without its seed; equal settings have equal ids however they were written
    status: `done` also when the loss diverged (then it is NaN); `failed`: given up after its retries; `refused`: the
        settings cannot be, with the reason in `error`
    metrics: figures at the end of the piece, such as val/bpb, val/nll, val/score, val/effective_rank
    cost: parameters, macs_per_token, memory_gb, step_time_s, energy_j, tokens, flops, seconds, and the counts of
        operations (models/cost.py); what was measured
    """

    number: int
    ask: Ask
    id: str = ""
    status: Status = "running"
    metrics: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Done:
    """The rule has nothing more to ask. reason: one line for people."""

    reason: str


@dataclass(frozen=True)
class Objective:
    """What is optimised.

    metric: a figure of the last validation
    mode: whether less or more of it is better
    """

    metric: str = "val/bpb"
    mode: Literal["min", "max"] = "min"

    def loss(self, trial: Trial) -> float:
        """The objective as something to minimise; infinity unless the trial is done with a finite value."""
        value = trial.metrics.get(self.metric, math.nan) if trial.status == "done" else math.nan
        value = value if self.mode == "min" else -value
        return value if math.isfinite(value) else math.inf


class Problem(Protocol):
    """What a rule may know of a search besides its trials."""

    space: Space
    seeds: tuple[int, ...]  # every setting is tried with each of these, in this order, unless the rule says otherwise
    objective: Objective
    seed: int  # of the rule's own draws

    def base(self, key: str) -> Any:
        """The plain value of a dotted key in the resolved recipe (a scalar, a list, or a part's name).

        Raises InputError for a key that is not there.
        """

    def tree(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The whole config with settings that are not refused, as plain data; a part is a mapping with `kind`."""

    def refuses(self, settings: Mapping[str, Any]) -> str | None:
        """Why these settings cannot be (the error's line), or None."""

    def identity(self, settings: Mapping[str, Any]) -> str:
        """`Trial.id` of settings that are not refused."""


class Rule(Part):
    """How a search chooses its trials. Every kind is a frozen dataclass."""

    looks_back: ClassVar[bool] = False  # whether it may take up any earlier checkpoint again (`Ask.source`)

    def next(self, problem: Problem, trials: Sequence[Trial]) -> Ask | Done | None:
        """The next piece of work; None: wait until a running trial ends; Done: nothing more, now or later.

        trials: in the order of asking; their number and status may grow between calls, nothing else changes.
        """
        raise NotImplementedError

    def check(self, problem: Problem) -> None:
        """Raise InputError for a space or a length that this rule cannot search. Called before anything starts."""

    def winner(self, problem: Problem, trials: Sequence[Trial]) -> Mapping[str, Any] | None:
        """The settings that the search would recommend now; None if nothing is known.

        Here: the lowest mean objective among the settings that were trained to the end with the most seeds.
        """
        done: dict[str, dict[int, Trial]] = {}
        for trial in trials:
            if trial.status == "done" and trial.ask.share == 1.0:
                done.setdefault(trial.id, {})[trial.ask.seed] = trial
        if not done:
            return None
        most = max(len(by_seed) for by_seed in done.values())
        means = {
            i: sum(problem.objective.loss(t) for t in by_seed.values()) / len(by_seed)
            for i, by_seed in done.items()
            if len(by_seed) == most
        }
        best = min(means, key=lambda i: means[i])
        return next(iter(done[best].values())).ask.settings if math.isfinite(means[best]) else None

    def records(self, problem: Problem, trials: Sequence[Trial]) -> Any:
        """Plain data for OUT/results.yaml, written anew after every trial: rounds, decisions. None: there are none."""
        return None

    def opening(self, problem: Problem, most: int) -> Sequence[Mapping[str, Any]]:
        """At most so many of the settings that it would try first, those that cannot be too: what a dry run shows."""
        raise NotImplementedError

    def work(self, problem: Problem) -> float | None:
        """How much it trains at most, in trials of full length; None where that is known at its end only."""
        return None

    def lines(self, problem: Problem, trials: Sequence[Trial]) -> list[str]:
        """The decisions so far in words, each with its uncertainty; only ever added to."""
        return []

    def unfinished(self, problem: Problem, trials: Sequence[Trial]) -> str:
        """What a budget has cut off, in words; empty if nothing."""
        return ""
