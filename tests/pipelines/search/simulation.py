"""Simulated searches: a problem without a recipe, and workers that finish in an order of their own.

`search` runs a rule as the executor would, on losses that a function knows, and counts what it cost in whole trials.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.lib.config import InputError
from pipelines.lib.search.space import Space
from pipelines.lib.search.trials import Ask, Done, Objective, Trial


@dataclass
class Pretend:
    """A `trials.Problem` whose recipe is `recipe` and which refuses what `refuse` says."""

    space: Any
    seeds: tuple[int, ...] = (0,)
    seed: int = 0
    objective: Objective = field(default_factory=Objective)
    recipe: dict[str, Any] = field(default_factory=dict)
    refuse: Callable[[dict[str, Any]], str | None] = lambda settings: None

    def __post_init__(self) -> None:
        if isinstance(self.space, dict):
            self.space = Space.read(self.space)

    def base(self, key: str) -> Any:
        if key not in self.recipe:
            raise InputError(f"{key}: not in the recipe")
        return self.recipe[key]

    def refuses(self, settings: Any) -> str | None:
        return self.refuse(dict(settings))

    def identity(self, settings: Any) -> str:
        assert self.refuses(settings) is None
        return json.dumps({**self.recipe, **settings}, sort_keys=True)


@dataclass
class Search:
    """What a simulated search did. spent: whole trials' worth of training at the end of each trial, by its number."""

    problem: Pretend
    trials: list[Trial]
    done: Done | None
    spent: dict[int, float]
    ended: list[int]

    @property
    def cost(self) -> float:
        return max(self.spent.values(), default=0.0)

    def best(self, budget: float = math.inf, whole: bool = True) -> float:
        """The lowest loss of what had ended within a budget; of trials at full length, unless all count."""
        counts = [t for t in self.trials if self.spent.get(t.number, math.inf) <= budget + 1e-9]
        return min((self.problem.objective.loss(t) for t in counts if t.ask.share == 1 or not whole), default=math.inf)

    def reaches(self, loss: float) -> float:
        """The budget at which a trial of full length was at least this good."""
        good = [t.number for t in self.trials if t.ask.share == 1 and self.problem.objective.loss(t) <= loss]
        return min((self.spent[n] for n in good), default=math.inf)


def search(
    rule: Any,
    problem: Pretend,
    train: Callable[[Ask, Any], tuple[float, Any]],
    workers: int = 1,
    budget: float = math.inf,
    most: int = 10_000,
    order: random.Random | None = None,
    look: Callable[[list[Trial], Ask | Done | None], None] = lambda trials, found: None,
) -> Search:
    """Run a rule to its end or its budget of whole trials.

    train(ask, state) -> (loss, state): the loss at the end of a piece; NaN is a divergence, an exception a failure.
    state: what the piece before it left, or the source's.  order: how fast each piece is; None: all are equally fast.
    look: called with what the rule saw and what it answered.
    """
    trials: list[Trial] = []
    states: dict[int, Any] = {}
    reached: dict[tuple[str, int], int] = {}
    running: list[tuple[float, int]] = []  # (when it ends, number)
    now = spent = 0.0
    out = Search(problem, trials, None, {}, [])
    while True:
        while len(running) < workers and spent < budget - 1e-9 and len(trials) < most:
            found = rule.next(problem, tuple(trials))
            look(list(trials), found)
            if not isinstance(found, Ask):
                out.done = found if isinstance(found, Done) else None
                break
            settings = json.loads(json.dumps(found.settings))  # as the ledger gives them back
            reason = problem.refuses(settings)
            number = len(trials)
            if reason:
                trials.append(Trial(number, found, status="refused", error=reason))
                continue
            ident = problem.identity(settings)
            before = found.source if found.source is not None else reached.get((ident, found.seed))
            begun = trials[before].ask.share if before is not None else 0.0
            assert found.share > begun, "a piece that is already trained"
            if before is not None:
                assert trials[before].ask.keep, "there is no checkpoint to go on from"
                assert trials[before].status == "done"
            trials.append(Trial(number, replace(found, settings=settings), ident))
            states[number] = states.get(before)
            reached[ident, found.seed] = number
            spent += found.share - begun
            takes = (found.share - begun) * (order.uniform(0.5, 2) if order else 1)
            running.append((now + takes, number))
        if not running:
            return out
        running.sort()
        now, number = running.pop(0)
        try:
            loss, states[number] = train(trials[number].ask, states[number])
            trials[number] = replace(trials[number], status="done", metrics={problem.objective.metric: loss})
        except RuntimeError as error:
            trials[number] = replace(trials[number], status="failed", error=str(error))
        out.spent[number] = spent
        out.ended.append(number)


def is_repeatable(rule: Any, problem: Pretend, train: Any, **how: Any) -> Search:
    """Run a search, and ask a new copy of the rule at every moment of it: the answers must be the same."""
    moments: list[tuple[list[Trial], Any]] = []
    found = search(rule, problem, train, look=lambda trials, answer: moments.append((trials, answer)), **how)
    for trials, answer in moments:
        again = replace(rule).next(replace(problem, space=replace(problem.space)), tuple(trials))
        if isinstance(answer, Ask):
            assert isinstance(again, Ask)
            assert json.dumps(again.settings) == json.dumps(answer.settings)
            assert replace(again, settings={}) == replace(answer, settings={})
        else:
            assert again == answer
    return found


SPACE = {
    "optim.lr": {"log_uniform": [1e-4, 1e-1]},
    "optim.weight_decay": {"log_uniform": [1e-3, 1.0]},
    "optim.beta2": {"uniform": [0.8, 0.999]},
    "schedule.warmup": {"uniform": [0.0, 0.3]},
    "model.width": [32, 64, 128, 256],
    "model.depth": [1, 2, 3, 4],
    "model.dropout": {"uniform": [0.0, 0.3]},
    "model.mlp": ["gelu", "swiglu", "relu2"],
}


@dataclass(frozen=True)
class Curves:
    """Losses of settings in SPACE over the share of their length, with a truth that is known.

    Large models and small learning rates learn later but further, so curves cross; learning rates that are too large
    for the depth diverge. noise: standard deviation of one measurement, drawn anew for each seed and share.
    crossing: how much longer large models take to learn than small ones; 1: no crossing by size.
    """

    seed: int = 0
    noise: float = 0.01
    crossing: float = 2.0

    def truth(self, s: dict[str, Any], share: float) -> float:
        rng = random.Random(f"problem {self.seed}")
        best = {k: rng.uniform(0.2, 0.8) for k in ("lr", "weight_decay", "beta2", "warmup", "dropout")}
        at = {
            "lr": math.log10(s["optim.lr"] / 1e-4) / 3,
            "weight_decay": math.log10(s["optim.weight_decay"] / 1e-3) / 3,
            "beta2": (s["optim.beta2"] - 0.8) / 0.199,
            "warmup": s["schedule.warmup"] / 0.3,
            "dropout": s["model.dropout"] / 0.3,
        }
        weight = {"lr": 1.2, "weight_decay": 0.3, "beta2": 0.2, "warmup": 0.15, "dropout": 0.3}
        size = (math.log2(s["model.width"] / 32) + s["model.depth"] - 1) / 6  # 0 small .. 1 large
        if at["lr"] > 0.97 - 0.2 * size:
            return math.nan
        final = 1.5 + sum(weight[k] * (at[k] - best[k]) ** 2 for k in best) - 0.25 * size
        final -= {"gelu": 0.0, "swiglu": 0.06, "relu2": 0.04}[s["model.mlp"]]
        delay = 0.01 * self.crossing**size * 3 ** (best["lr"] - at["lr"]) * (1 + at["warmup"])
        return final + 2.0 * ((delay / (share + delay)) ** 0.9 - (delay / (1 + delay)) ** 0.9)

    def __call__(self, ask: Ask, state: Any) -> tuple[float, Any]:
        rng = random.Random(f"{self.seed} {json.dumps(ask.settings, sort_keys=True)} {ask.seed} {ask.share}")
        return self.truth(dict(ask.settings), ask.share) + rng.gauss(0, self.noise), None
