"""Grow the model: from a baseline, take the one step that pays best, as long as a step is proven to pay at all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from models.spec import near
from pipelines.lib.config import InputError
from pipelines.lib.search.moves import Duplicate, Move, check_dimension, moves, show, value_at
from pipelines.lib.search.trials import Ask, Done, Problem, Rule, Trial
from pipelines.lib.statistics import Difference, paired, quantile

Cost = Literal[
    "parameters", "memory_gb", "step_time_s", "energy_j", "macs_per_token",
    # per token, counted (models/cost.py)
    "multiplies", "additions", "exponentials", "divisions", "reductions",
    "table_bytes", "weight_bits", "bit_operations",
]  # fmt: skip

LOOKS = ((0.25, 0.1), (0.5, 0.3), (1.0, 0.6))  # at this share of the fresh seeds, with this share of the test's level
DECAY = 0.9  # each test of a search has this share of the level of the one before it
FUTILE = 0.5  # fewer standard errors than this into the right direction at a look: the test is given up
PRIOR = 4.0  # degrees of freedom that the pooled variance counts for beside a candidate's own
CAP = 5.0  # medians: what one candidate's own variance may add to the pool
UNITS = {"val/bpb": "bits per byte", "val/nll": "nats per token"}


@dataclass(frozen=True)
class Greedy(Rule):
    """Take the best proven step from a baseline, and again from there, until no step is proven to be better.

    A round measures every single change of the baseline with the search's seeds, screens them, confirms the best, and
    makes the first that is confirmed the new baseline. Two kinds of error are bounded, whatever the number of rounds:

    False steps. A step counts only if fresh seeds prove it: baseline and candidate are trained in pairs on seeds that
    neither was chosen by, and Student's t of these differences alone (with the candidate's own variance, so that an
    erratic one gains nothing) must pass one-sided. The k-th test of a search gets the level alpha * 0.1 * 0.9^k; the
    level of a test that was passed goes to the next one. Whatever is tested, the levels of the tests of steps that are
    no better, up to the first false one, then sum to alpha at most; so does the chance of accepting any, ties included
    (the fallback procedure; online: Tian and Ramdas, arXiv:1910.04900). A test looks at its differences after a
    quarter, half and all of the fresh seeds, with 0.1, 0.3 and 0.6 of its level, and is given up at a look that points
    the wrong way (less than half a standard error of gain), which costs no level. Candidates of one round share the
    baseline's fresh runs: their levels and order are fixed before these are known, so the sum above still holds.

    Missed steps. An improvement of three standard errors (of the paired difference over the screening seeds) passes
    screening and confirmation in 9 of 10 searches or more. With 2 or 3 seeds a candidate's own variance has 1 or 2
    degrees of freedom and would hide it, so screening pools the variances of all candidates since the length last
    grew, each capped at 5 medians so that an erratic one does not hide the others; in its own standard error a
    candidate's own variance counts with its degrees of freedom beside 4 of the pool (moderated as by Smyth, 2004).

    rounds: stop after this many steps were taken (null: when none is proven)
    times: how many values to try each way along a list of numbers ({increment: ...} has its own times)
    cost: what a step is charged, or several (summed): parameters, memory_gb, step_time_s, energy_j, macs_per_token, or
        a count of operations per token: multiplies, additions, exponentials, divisions, reductions, table_bytes,
        weight_bits, bit_operations
    cost_floor: relative cost differences below this, or within two standard errors, count as none
    effect: standard errors by which a candidate must be better with the search's seeds to be confirmed
    alpha: chance that a whole search takes any step that is no improvement
    confirm: fresh pairs of seeds that a confirmation may use (null: four times the search's seeds, at least 15)
    layers_key: the number of layers, whose steps also change the lists with one entry per layer
    duplicate: the layer that is doubled, or dropped on the way down: the middle one, each in turn, or no list follows
    grow_length: added to the recipe's steps, tokens or epochs when no step is proven; the baseline is measured anew
    growths: how often that may happen
    """

    rounds: int | None = None
    times: int = 1
    cost: tuple[Cost, ...] = ("parameters",)
    cost_floor: float = 0.01
    effect: float = 1.0
    alpha: float = 0.05
    confirm: int | None = None
    layers_key: str = "model.n_layers"
    duplicate: Duplicate = "middle"
    grow_length: float | None = None
    growths: int = 1

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1; null goes on until no step is proven")
        if self.times < 1:
            raise ValueError(f"times={self.times} must be at least 1")
        for name in ("cost_floor", "effect", "growths"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} must lie between 0 and 1; 0.05 is usual")
        if self.confirm is not None and self.confirm < 4:
            raise ValueError(f"confirm={self.confirm} fresh pairs prove nothing; 15 are usual, 4 the least")
        if self.grow_length is not None and not self.grow_length > 0:
            raise ValueError(f"grow_length={self.grow_length} must be above 0; null leaves the length as it is")
        object.__setattr__(self, "_known", (None, {}))  # no field: it can be computed again from the problem

    def next(self, problem: Problem, trials: Sequence[Trial]) -> Ask | Done | None:
        found = self.asks(problem, trials)
        return found if isinstance(found, Done) else next(iter(found), None)

    def asks(self, problem: Problem, trials: Sequence[Trial]) -> list[Ask] | Done:
        """All work that could start now, in order. Raises InputError for a metric or a cost that trials do not have."""
        story = self._story(problem, trials)
        return Done(story.stop) if story.stop else story.asks

    def check(self, problem: Problem) -> None:
        if len(problem.seeds) < 2:
            raise InputError("rule greedy: seeds=1 cannot tell a gain from noise; give seeds=3, at least 2")
        dimensions = problem.space.dimensions()
        if not dimensions:
            raise InputError("rule greedy: vary: names nothing that could change")
        tree = problem.tree({})
        for key, domain in dimensions.items():
            check_dimension(key, domain, tree)
        if self.grow_length is not None:
            _length(problem)
        if self.layers_key != "model.n_layers":
            problem.base(self.layers_key)  # raises for a key that is not there; other families may have no layers
        _, candidates = self._candidates(problem, {})
        if all(refused for _, _, refused in candidates):
            why = f": {candidates[0][2]}" if candidates else ""
            raise InputError(f"rule greedy: there is no step from the baseline{why}")

    def opening(self, problem: Problem, most: int) -> Sequence[Mapping[str, Any]]:
        """The settings of the first round, all of them; the baseline's first."""
        return [{}, *(move.settings for move, _, _ in self._candidates(problem, {})[1])]

    def winner(self, problem: Problem, trials: Sequence[Trial]) -> Mapping[str, Any] | None:
        """The present baseline, once it is measured."""
        story = self._story(problem, trials)
        return story.settings if story.rounds and story.rounds[-1].base else None

    def records(self, problem: Problem, trials: Sequence[Trial]) -> Any:
        """The results tree: the baseline, then one entry per round with its candidates, seeds and decision."""
        return self._story(problem, trials).records()

    def lines(self, problem: Problem, trials: Sequence[Trial]) -> list[str]:
        """The decisions so far, each with its uncertainty."""
        return [line for r in self._story(problem, trials).rounds for line in r.lines]

    def unfinished(self, problem: Problem, trials: Sequence[Trial]) -> str:
        story = self._story(problem, trials)
        if story.stop or not story.rounds:
            return ""
        proven = "the baseline is still the recipe" if not story.settings else "the steps before it stand"
        return f"round {len(story.rounds)} was not finished; {proven}"

    def _story(self, problem: Problem, trials: Sequence[Trial]) -> Story:
        story = Story(self, problem, trials)
        story.tell()
        return story

    def _candidates(
        self, problem: Problem, settings: Mapping[str, Any]
    ) -> tuple[str, tuple[tuple[Move, str, str | None], ...]]:
        """The baseline's id; each step from it with its id, or why it cannot be. Equal steps stand once."""
        owner, known = self._known  # type: ignore[attr-defined]
        if owner is not problem:
            owner, known = problem, {}
            object.__setattr__(self, "_known", (owner, known))
        key = json.dumps(settings)
        if key not in known:
            base = problem.identity(settings)
            seen, found = {base}, []
            for move in moves(
                problem.space.dimensions(),
                problem.tree(settings),
                settings,
                self.times,
                self.layers_key,
                self.duplicate,
            ):
                refused = problem.refuses(move.settings)
                ident = "" if refused else problem.identity(move.settings)
                if ident not in seen:
                    found.append((move, ident, refused))
                    seen |= {ident} if ident else set()
            known[key] = base, tuple(found)
        return known[key]


def _length(problem: Problem) -> str:
    """The key of the recipe's length."""
    from pipelines.lib.training import LENGTHS  # brings torch, which --help does without

    return next(key for key in LENGTHS if problem.base(key) is not None)


@dataclass
class Candidate:
    """A step of a round and what is known of it.

    status: running, refused, failed (no finite result), rejected (by screening), unproven (by fresh seeds), waiting
        (screened, another one came first), chosen
    trials, fresh: seed -> trial, of the screening and of the confirmation
    gain, se: mean paired loss difference to the baseline (below 0: better), and its moderated standard error
    increase: relative cost, summed over the costs
    proof: the differences over fresh seeds; level: what its one-sided p had to reach
    """

    move: Move
    id: str
    status: str = "running"
    reason: str = ""
    trials: dict[int, Trial] = field(default_factory=dict)
    fresh: dict[int, Trial] = field(default_factory=dict)
    gain: float = math.nan
    se: float = math.nan
    increase: float = math.nan
    proof: Difference | None = None
    level: float = math.nan

    @property
    def rank(self) -> tuple[int, float]:
        """What costs nothing comes first, by its gain; the rest by gain per cost."""
        return (0, self.gain) if self.increase <= 0 else (1, self.gain / self.increase)


@dataclass
class Round:
    """One round: a baseline, its candidates, and what was decided."""

    number: int
    settings: Mapping[str, Any]
    id: str
    candidates: list[Candidate]
    base: dict[int, Trial] = field(default_factory=dict)
    fresh: dict[int, Trial] = field(default_factory=dict)
    chosen: Candidate | None = None
    after: Mapping[str, Any] | None = None
    lines: list[str] = field(default_factory=list)
    grown: str = ""


class Story:
    """A greedy search told again from its trials.

    rounds: as far as it got.  settings: its present baseline.  asks: what it needs next (none: it waits).
    stop: why it is over, if it is.
    """

    def __init__(self, rule: Greedy, problem: Problem, trials: Sequence[Trial]):
        self.rule, self.problem = rule, problem
        self.known: dict[tuple[str, int], Trial] = {}
        for trial in trials:
            at = (trial.id, trial.ask.seed)
            if trial.ask.share == 1.0 and trial.id and (at not in self.known or trial.status == "done"):
                self.known[at] = trial
        self.rounds: list[Round] = []
        self.settings: Mapping[str, Any] = {}
        self.asks: list[Ask] = []
        self.running = 0  # trials that it waits for
        self.stop = ""
        self.confirm = rule.confirm or max(15, 4 * len(problem.seeds))
        self.tests, self.carried = 0, 0.0  # confirmations so far; the level that the last one hands on
        self.spreads: list[float] = []  # of the candidates since the length last grew

    # ---- the search

    def tell(self) -> None:
        taken = growths = 0
        rule, grown = self.rule, ""
        while not self.stop:
            base, found = rule._candidates(self.problem, self.settings)
            now = Round(len(self.rounds), self.settings, base, [Candidate(m, i) for m, i, _ in found], grown=grown)
            for candidate, (_, _, refused) in zip(now.candidates, found, strict=True):
                if refused:
                    candidate.status, candidate.reason = "refused", refused
            self.rounds.append(now)
            if not self.measure(now) or not self.decide(now):
                return
            grown = ""
            if now.chosen is not None:
                self.settings, taken = now.chosen.move.settings, taken + 1
                if taken == rule.rounds:
                    self.stop = f"{taken} {'step was' if taken == 1 else 'steps were'} taken, as rounds={taken} asks"
            elif rule.grow_length is not None and growths < rule.growths:
                key = _length(self.problem)
                old = value_at(self.problem.tree(self.settings), key)
                longer = round(old + rule.grow_length) if isinstance(old, int) else old + rule.grow_length
                self.settings = {**self.settings, key: longer}
                growths, self.spreads, grown = growths + 1, [], f"{key} {show(old)} -> {show(longer)}"
                now.lines.append(f"round {now.number + 1}: {grown}, and the baseline is measured anew")
            else:
                self.stop = now.lines[-1]
            now.after = self.settings

    def measure(self, now: Round) -> bool:
        """Gather the results of the round; True when all are there."""
        seeds, objective = self.problem.seeds, self.problem.objective
        name = f"round {now.number + 1}"
        missing = self.results(now.base, now.settings, now.id, seeds, f"{name}: baseline")
        complete = missing is None
        self.asks += missing or ()
        for trial in now.base.values():
            if trial.status == "done" and objective.metric not in trial.metrics:
                raise InputError(
                    f"objective {objective.metric}: no trial measures it{near(objective.metric, trial.metrics)}"
                )
            for cost in self.rule.cost:
                if trial.status == "done" and cost not in trial.cost:
                    raise InputError(f"cost {cost}: it is not measured here{near(cost, trial.cost)}")
            if bad := self.fault(trial):
                self.stop = f"{name}: the baseline has no result to compare with: {bad}"
                return False
        for candidate in now.candidates:
            if candidate.status != "running":
                continue
            why = f"{name}: {candidate.move.label}"
            missing = self.results(candidate.trials, candidate.move.settings, candidate.id, seeds, why)
            if bad := next(filter(None, map(self.fault, candidate.trials.values())), ""):
                candidate.status, candidate.reason = "failed", bad  # its other seeds would change nothing
            elif missing is not None:
                complete = False
                self.asks += missing
        return complete

    def results(
        self, into: dict[int, Trial], settings: Mapping[str, Any], ident: str, seeds: Iterable[int], why: str
    ) -> list[Ask] | None:
        """Put the ended trials of these settings into `into`; what is still to be asked, None when all ended."""
        missing, complete = [], True
        for seed in seeds:
            trial = self.known.get((ident, seed))
            if trial is None:
                missing.append(Ask(settings, seed, why=why))
            elif trial.status == "running":
                self.running += 1
            else:
                into[seed] = trial
                continue
            complete = False
        return None if complete else missing

    def fault(self, trial: Trial) -> str:
        """Why an ended trial cannot be compared; empty if it can."""
        if math.isfinite(self.problem.objective.loss(trial)):
            return ""
        what = trial.error or f"{self.problem.objective.metric} is not finite"
        return f"seed {trial.ask.seed}: {what}"

    def decide(self, now: Round) -> bool:
        """Screen the candidates, then confirm them in order until one is proven; False while results are missing."""
        screened = self.screen(now)
        for candidate in screened:
            candidate.level = self.rule.alpha * (1 - DECAY) * DECAY**self.tests + self.carried
            self.tests, self.carried = self.tests + 1, 0.0
            proven = self.prove(now, candidate)
            if proven is None:
                return False
            if proven:
                candidate.status, now.chosen, self.carried = "chosen", candidate, candidate.level
                break
            candidate.status = "unproven"
        now.lines += [self.line(now, c) for c in screened if c.status in ("chosen", "unproven")]
        if now.chosen is None:
            now.lines.append(self.none_line(now, screened))
        return True

    def screen(self, now: Round) -> list[Candidate]:
        """The candidates that are better by `effect` standard errors, in the order in which they are confirmed."""
        rule, n = self.rule, len(self.problem.seeds)
        alive = [c for c in now.candidates if c.status == "running"]
        for candidate in alive:
            candidate.increase = self.increase(now.base, candidate.trials)
            if math.isnan(candidate.increase):
                candidate.status, candidate.reason = "failed", "its cost was not measured"
        alive = [c for c in alive if c.status == "running"]
        if not alive:
            return []
        base = np.array(list(self.losses(now.base).values()))
        d = np.array([list(self.losses(c.trials).values()) for c in alive]) - base
        own = d.var(axis=1, ddof=1)
        self.spreads += own.tolist()
        pooled = float(np.minimum(self.spreads, CAP * np.median(self.spreads)).mean())
        se = np.sqrt((PRIOR * pooled + (n - 1) * own) / (PRIOR + n - 1) / n)
        for candidate, gain, error in zip(alive, d.mean(axis=1).tolist(), se.tolist(), strict=True):
            candidate.gain, candidate.se = gain, error
            candidate.status = "waiting" if gain < 0 and gain <= -rule.effect * error else "rejected"
        return sorted((c for c in alive if c.status == "waiting"), key=lambda c: c.rank)

    def prove(self, now: Round, candidate: Candidate) -> bool | None:
        """Whether fresh pairs of seeds prove that the candidate is better; None while results are missing."""
        first = max(self.problem.seeds) + 1 + now.number * self.confirm
        why = f"round {now.number + 1}: proof of {candidate.move.label}"
        spread = candidate.se * math.sqrt(len(self.problem.seeds))
        for share, weight in LOOKS:
            seeds = range(first, first + max(2, math.ceil(share * self.confirm)))
            of_base = self.results(now.fresh, now.settings, now.id, seeds, f"{why}: its baseline")
            own = self.results(candidate.fresh, candidate.move.settings, candidate.id, seeds, why)
            if bad := next(filter(None, map(self.fault, candidate.fresh.values())), ""):
                candidate.reason = bad
                return False
            if of_base is not None or own is not None:
                self.asks += [*(of_base or ()), *(own or ())]
                return None
            candidate.proof = proof = paired(self.losses(now.fresh), self.losses(candidate.fresh))
            if proof.mean < 0 and proof.p / 2 <= candidate.level * weight:
                return True
            if not proof.mean <= -FUTILE * spread / math.sqrt(len(seeds)):
                return False
        return False

    def losses(self, trials: Mapping[int, Trial]) -> dict[int, float]:
        """seed -> loss where it is finite, in the order of the seeds."""
        found = {seed: self.problem.objective.loss(trials[seed]) for seed in sorted(trials)}
        return {seed: loss for seed, loss in found.items() if math.isfinite(loss)}

    def increase(self, base: Mapping[int, Trial], other: Mapping[int, Trial]) -> float:
        """Relative cost above the baseline's, summed over the costs; NaN if one of them is unknown."""
        total = 0.0
        for name in self.rule.cost:
            a = {seed: trial.cost.get(name, math.nan) for seed, trial in base.items()}
            difference = paired(a, {seed: trial.cost.get(name, math.nan) for seed, trial in other.items()})
            usual = abs(sum(a.values()) / len(a))
            if not abs(difference.mean) <= max(self.rule.cost_floor * usual, 2 * difference.se):
                total += difference.mean / usual if usual else math.copysign(math.inf, difference.mean)
        return total

    # ---- what people read

    def line(self, now: Round, candidate: Candidate) -> str:
        """The decision on a candidate that was tested with fresh seeds."""
        head, proof = f"round {now.number + 1}: {candidate.move.label}", candidate.proof
        if proof is None or candidate.reason:
            return f"{head}: not proven: {candidate.reason}"
        metric = self.problem.objective.metric
        errors = f"{abs(proof.mean / proof.se):.1f} standard errors" if proof.se else "without any spread"
        said = f"{self.sign * proof.mean:+.4g} ± {proof.se:.2g} {UNITS.get(metric, metric)}"
        said += f" ({errors}, {{}} {proof.n} fresh seeds)"
        if candidate.status != "chosen":
            return f"{head}: not proven: {said.format('over')}"
        charge = f"for {candidate.increase:+.1%} {' and '.join(self.rule.cost)}" if candidate.increase else "at no cost"
        return f"{head}: {said.format('confirmed with')} {charge}"

    def none_line(self, now: Round, screened: list[Candidate]) -> str:
        """Why a round has no step."""
        said = [
            f"{count} {status}"
            for status in ("refused", "failed")
            if (count := sum(c.status == status for c in now.candidates))
        ]
        said.append(f"{len(screened)} tested with fresh seeds" if screened else "none worth a test with fresh seeds")
        line = f"round {now.number + 1}: none of {len(now.candidates)} steps is proven better ({', '.join(said)}"
        near_misses = [c for c in now.candidates if c.status == "rejected" and c.se > 0]
        if screened or not near_misses:
            return line + ")"
        best = min(near_misses, key=lambda c: c.gain / c.se)
        return f"{line}; nearest: {best.move.label}, {self.sign * best.gain:+.4g} ± {best.se:.2g})"

    @property
    def sign(self) -> int:
        """From a difference of losses to one of the metric."""
        return 1 if self.problem.objective.mode == "min" else -1

    def records(self) -> dict[str, Any]:
        first, n = self.rounds[0], len(self.problem.seeds)
        measured = len(first.base) == n and not any(map(self.fault, first.base.values()))
        baseline = {
            "iter": -1,
            "status": "done" if measured else "failed" if self.stop else "running",
            "expected_experiments": n,
            "completed_experiments": len(first.base),
            "baseline_metrics": _averages(first.base),
            "seeds": [_seed(t) for t in first.base.values()],
        }
        return {
            "objective": {"metric": self.problem.objective.metric, "mode": self.problem.objective.mode},
            "baseline_config": self.problem.tree({}),
            "iterations": [baseline, *(self.round_record(r) for r in self.rounds)],
            "decisions": [line for r in self.rounds for line in r.lines],
            "winner": dict(self.settings),
            "stop_reason": self.stop or None,
        }

    def round_record(self, now: Round) -> dict[str, Any]:
        over = now.after is not None
        parts = [now.base, now.fresh, *(t for c in now.candidates for t in (c.trials, c.fresh))]
        completed = sum(map(len, parts))
        return {
            "iter": now.number,
            "status": "done" if over else "failed" if self.stop else "running",
            "expected_experiments": completed if over else completed + len(self.asks) + self.running,
            "completed_experiments": completed,
            "length": now.grown or None,
            "baseline_config_before": dict(now.settings),
            "baseline_metrics": _averages(now.base),
            "candidates": [self.candidate_record(now, c) for c in now.candidates],
            "chosen": now.chosen and {"param": now.chosen.move.key, "value": now.chosen.move.value},
            "decision": now.lines,
            "baseline_config_after": dict(now.after) if now.after is not None else None,
        }

    def candidate_record(self, now: Round, candidate: Candidate) -> dict[str, Any]:
        record: dict[str, Any] = {
            "param": candidate.move.key,
            "value": candidate.move.value,
            "step": candidate.move.label,
            "status": candidate.status,
            "reason": candidate.reason or None,
            "seeds": [_seed(t) for t in candidate.trials.values()],
        }
        if math.isnan(candidate.gain):
            return record
        averages, base = _averages(candidate.trials), _averages(now.base)
        half = candidate.se * quantile(0.95, PRIOR + len(candidate.trials) - 1)
        record |= {
            "averages": averages,
            "deltas": {name: _tidy(value - base[name]) for name, value in averages.items() if name in base},
            "delta": _tidy(self.sign * candidate.gain),
            "standard_error": _tidy(candidate.se),
            "interval": sorted(_tidy(self.sign * candidate.gain + way * half) for way in (-1, 1)),
            "cost_increase": _tidy(candidate.increase),
            "efficiency": _tidy(-candidate.gain / candidate.increase) if candidate.increase > 0 else None,
        }
        if (proof := candidate.proof) is not None:
            record["confirmation"] = {
                "delta": _tidy(self.sign * proof.mean),
                "standard_error": _tidy(proof.se),
                "interval": sorted(_tidy(self.sign * bound) for bound in (proof.low, proof.high)),
                "p": _tidy(proof.p / 2 if proof.mean < 0 else 1 - proof.p / 2),
                "level": _tidy(candidate.level),
                "seeds": [_seed(t) for t in candidate.fresh.values()],
            }
        return record


def _tidy(value: float) -> float:
    return float(f"{value:.6g}")


def _seed(trial: Trial) -> dict[str, Any]:
    """One line of a seed: `loss` is val/nll, `score` val/score; the other figures by their own names."""
    figures = {"loss" if name == "val/nll" else name.removeprefix("val/"): v for name, v in trial.metrics.items()}
    return {"seed": trial.ask.seed, "trial": trial.number, "status": trial.status, **figures, **trial.cost}


def _averages(trials: Mapping[int, Trial]) -> dict[str, float]:
    """The mean of every figure that all seeds have, named as in `_seed`."""
    rows = [{k: v for k, v in _seed(t).items() if k not in ("seed", "trial", "status")} for t in trials.values()]
    names = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    return {name: _tidy(sum(row[name] for row in rows) / len(rows)) for name in names}
