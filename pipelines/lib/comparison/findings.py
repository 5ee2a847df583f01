"""What runs show, in numbers: ranking with intervals, differences with their significance, Pareto fronts, caveats.

Pure: records in, numbers out. An effect inside its error is called none; a loss that is no number is never first.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from models.cost import Ops
from models.spec import near
from pipelines.lib.comparison.collect import Collection, LeftOut, RunRecord, is_number
from pipelines.lib.comparison.importance import Importance, importance_of
from pipelines.lib.comparison.searches import SearchStory
from pipelines.lib.comparison.variants import (
    Variant,
    computes,
    differing,
    labelled,
    letter,
    natural,
    short_names,
    variants_of,
    varying,
    word,
)
from pipelines.lib.config import InputError
from pipelines.lib.statistics import Difference, Interval, holm, interval, paired, pareto, welch

COSTS = {  # cost -> how people call it; the axes of the Pareto fronts that everybody wants
    "parameters": "parameters",
    "flops": "training FLOP",
    "step_time_s": "time per update, s",
    "memory_gb": "peak memory, GiB",
}
ALL_COSTS = {  # and of those that are drawn when they are named
    **COSTS,
    "macs_per_token": "multiply-accumulates per token",
    "energy_j": "energy, J",
    "seconds": "training time, s",
    **{name: f"{name.replace('_', ' ')} per token" for name in Ops().counts()},
}
LOSSES = ("val/bpb", "val/nll")  # what decides where nobody says: the first that every run has
PAIRS_IN_NOTES = 4
TESTED = 100  # variants whose every pair is tested: 4,950 comparisons
At = Literal["last", "best", "common"]
Verdict = Literal["first", "second", "none", "unknown"]


@dataclass(frozen=True)
class Question:
    """What is asked of the runs.

    metric: what decides;  mode: whether less or more of it is better
    at: its value at the end of a run, its best one, or the last one that all runs have reached (by tokens)
    level: of confidence intervals; a difference counts at 1 - level
    costs: what it is set against
    """

    metric: str
    mode: Literal["min", "max"]
    at: At = "last"
    level: float = 0.95
    costs: tuple[str, ...] = tuple(COSTS)

    @property
    def sign(self) -> int:
        return 1 if self.mode == "min" else -1


@dataclass(frozen=True)
class Ranked:
    """A variant in its place.

    letter: its name in tables and plots, A is the first;  place: as people count, None where nothing may be ranked
    values: seed -> value, NaN for a diverged run;  interval: over these
    group: 0 trained to the end, 1 not, 2 diverged; a later group never stands before an earlier one
    costs: medians over its runs;  flags: what a reader must know
    """

    letter: str
    variant: Variant
    values: Mapping[str, float]
    interval: Interval
    group: int
    costs: Mapping[str, float]
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.letter} {self.variant.label}"


@dataclass(frozen=True)
class Pair:
    """Two variants: the first stands before the second in the ranking.

    difference: second - first in the metric;  how: `paired` over common seeds, `unpaired`, or `one seed` (no error)
    p: adjusted for the number of comparisons (Holm)
    verdict: which is better; `none` for an effect inside its error; `unknown` without an error
    settings: what they differ in;  caveats: why the difference may have another reason
    """

    first: int
    second: int
    difference: Difference
    how: Literal["paired", "unpaired", "one seed"]
    p: float
    verdict: Verdict
    settings: tuple[str, ...]
    caveats: tuple[str, ...]


@dataclass(frozen=True)
class Note:
    """A caveat over the whole page. kind: `stop` forbids a conclusion, `care` limits one, `info` is good to know."""

    kind: Literal["stop", "care", "info"]
    text: str


@dataclass(frozen=True)
class Findings:
    """All that a page shows.

    columns: the settings that vary;  names: their short names;  pairs: every pair of fully trained variants, or those
    with the baseline;  fronts: cost -> (index into `ranked` of its points, whether each is on the front)
    """

    question: Question
    ranked: tuple[Ranked, ...]
    columns: tuple[str, ...]
    names: Mapping[str, str]
    pairs: tuple[Pair, ...]
    fronts: Mapping[str, tuple[tuple[int, ...], tuple[bool, ...]]]
    importance: Importance
    notes: tuple[Note, ...]
    left_out: tuple[LeftOut, ...] = ()
    searches: tuple[SearchStory, ...] = ()
    baseline: int | None = None
    cost_how: Mapping[str, str] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The usual standard error of a mean here, by which figures are rounded; NaN without one."""
        known = [r.interval.se for r in self.ranked if math.isfinite(r.interval.se)]
        return statistics.median(known) if known else math.nan

    @property
    def alone(self) -> int:
        """Differences that would count if each were the only one, but do not among so many."""
        return sum(p.verdict == "none" and p.difference.p < 1 - self.question.level for p in self.pairs)

    @property
    def compared(self) -> list[int]:
        """The variants that were trained to the end with a finite loss."""
        return [i for i, r in enumerate(self.ranked) if r.group == 0]


def question_of(
    found: Collection, metric: str | None, mode: Literal["min", "max"] | None, at: At, level: float,
    costs: Sequence[str] = (),
) -> Question:  # fmt: skip
    """What decides: as asked; else as the searches say; else bits per byte where all runs have them, else nats.

    costs: what is set against it besides `COSTS`.  Raises InputError for a metric or cost that no run has.
    """
    objectives = {(search.metric, search.mode) for search in found.searches if search.metric}
    if metric is None and len(objectives) == 1:
        (metric, goal), *_ = objectives
        mode = mode or ("max" if goal == "max" else "min")
    there = list(dict.fromkeys(k for run in found.runs for row in run.rows for k in row if k != "step"))
    if metric is None:
        metric = next((k for k in LOSSES if all(any(k in row for row in run.rows) for run in found.runs)), LOSSES[-1])
    if metric not in there:
        shown = [k for k in there if k.startswith(("val/", "train/"))]
        raise InputError(f"metric={metric}: no run has it{near(metric, shown)}")
    measured = dict.fromkeys(cost for run in found.runs for cost in run.cost if cost in ALL_COSTS)
    for cost in costs:
        if cost not in measured:
            raise InputError(f"costs={cost}: no run has it{near(cost, measured)}")
    return Question(metric, mode or "min", at, level, tuple(dict.fromkeys([*COSTS, *costs])))


def analyse(found: Collection, question: Question, baseline: str | None = None) -> Findings:
    """Everything, from the runs that were found. baseline: a variant's label or a run's name; others stand against it.

    Raises InputError for a baseline that is not there.
    """
    variants = labelled(variants_of(found.runs))
    common = common_tokens(found.runs, question.metric) if question.at == "common" else None
    ranked = rank(variants, question, common)
    settings = [r.variant.settings for r in ranked]
    columns = varying(settings)
    at = None if baseline is None else find_baseline(ranked, baseline)
    pairs = compare(ranked, question, at)
    return Findings(
        question,
        tuple(ranked),
        tuple(columns),
        short_names(columns),
        tuple(pairs),
        fronts_of(ranked, question),
        importance_of(
            [(r.variant.settings, r.values) for r in ranked if r.group == 0], computes(columns), question.level
        ),
        tuple(notes_of(ranked, pairs, question, common)),
        tuple(found.left_out),
        tuple(found.searches),
        at,
        cost_sources(ranked),
    )


def find_baseline(ranked: Sequence[Ranked], name: str) -> int:
    known: dict[str, int] = {}
    for i, r in enumerate(ranked):
        for word_ in (r.variant.label, *r.variant.repeats, *(run.name for run in r.variant.runs)):
            known.setdefault(word_, i)
    if name not in known:
        raise InputError(f"baseline={name}: neither a variant nor a run here{near(name, known)}")
    return known[name]


# ---- values and ranking ----------------------------------------------------------------------------------------------


def value_of(run: RunRecord, question: Question, common: float | None = None) -> float:
    """The figure that a run is judged by; NaN if it diverged or never had one."""
    if run.status == "diverged":
        return math.nan
    points = run.column(question.metric)
    if common is not None:
        points = [(row, v) for row, v in points if row.get("train/tokens", math.inf) <= common]
    if not points:
        return math.nan
    if question.at == "best":
        finite = [v for _, v in points if math.isfinite(v)]
        return (min(finite) if question.mode == "min" else max(finite)) if finite else math.nan
    return points[-1][1]


def common_tokens(runs: Sequence[RunRecord], metric: str) -> float | None:
    """The largest number of tokens at which every run that did not diverge has a figure; None if there is none."""
    reached = []
    for run in runs:
        if run.status != "diverged":
            tokens = [row["train/tokens"] for row, _ in run.column(metric) if is_number(row.get("train/tokens"))]
            if not tokens:
                return None
            reached.append(max(tokens))
    return min(reached, default=None)


def rank(variants: Sequence[Variant], question: Question, common: float | None = None) -> list[Ranked]:
    """Best first within each group: those trained to the end, those that were not, those that diverged."""
    judged = []
    for variant in variants:
        counted = [r for r in variant.runs if r.status in ("complete", "diverged")]
        if common is not None or not counted:
            counted = list(variant.runs)
        values = {r.seed: value_of(r, question, common) for r in counted}
        over = interval([values[s] for s in sorted(values, key=natural)], question.level)
        whole = common is not None or any(r.status == "complete" for r in counted)
        group = 0 if whole else 1
        if not math.isfinite(over.mean):
            group = 2
        judged.append((group, question.sign * over.mean, variant, values, over, counted))
    judged.sort(key=lambda j: (j[0], j[1] if math.isfinite(j[1]) else math.inf, j[2].label))
    return [
        Ranked(letter(i), variant, values, over, group, costs_of(counted), flags_of(variant, values, group))
        for i, (group, _, variant, values, over, counted) in enumerate(judged)
    ]


def costs_of(runs: Sequence[RunRecord]) -> dict[str, float]:
    """The median over runs of each cost that any of them has."""
    names = dict.fromkeys(k for run in runs for k in run.cost)
    return {k: statistics.median(run.cost[k] for run in runs if k in run.cost) for k in names}


def flags_of(variant: Variant, values: Mapping[str, float], group: int) -> tuple[str, ...]:
    flags = []
    n = len(variant.runs)
    for status, count in Counter(run.status for run in variant.runs).items():
        if status != "complete":
            flags.append(f"{status}" if count == n else f"{count} of {n} seeds {status}")
    if not any(run.status == "diverged" for run in variant.runs) and group == 2:
        flags.append("no figure")
    if len(values) == 1:
        flags.append("one seed")
    flags += [f"{run.name}: {run.note}" for run in variant.runs if run.note]
    if variant.repeats:
        flags.append(f"repeats of a seed, not counted: {', '.join(variant.repeats)}")
    return tuple(flags)


# ---- differences -----------------------------------------------------------------------------------------------------


def compare(ranked: Sequence[Ranked], question: Question, baseline: int | None = None) -> list[Pair]:
    """Each pair of fully trained variants, or each with the baseline; significance adjusted over all of them.

    Of more than TESTED variants without a baseline: each pair of the first.
    """
    finite = [i for i, r in enumerate(ranked) if r.group == 0]
    if baseline is None:
        which = list(combinations(finite[:TESTED], 2))
    else:
        which = [(min(i, baseline), max(i, baseline)) for i in finite if i != baseline and baseline in finite]
    raw = [(i, j, *difference_of(ranked[i].values, ranked[j].values, question.level)) for i, j in which]
    adjusted = holm([d.p for _, _, d, _ in raw])
    pairs = []
    for (i, j, difference, how), p in zip(raw, adjusted, strict=True):
        verdict: Verdict = "unknown" if math.isnan(p) else "none"
        if p < 1 - question.level:
            verdict = "first" if question.sign * difference.mean > 0 else "second"
        settings = tuple(differing(ranked[i].variant.settings, ranked[j].variant.settings))
        pairs.append(Pair(i, j, difference, how, p, verdict, settings, caveats(ranked[i], ranked[j], settings)))
    return pairs


def difference_of(
    a: Mapping[str, float], b: Mapping[str, float], level: float
) -> tuple[Difference, Literal["paired", "unpaired", "one seed"]]:
    """b - a: paired over common seeds, else between independent means, else a bare number."""
    common = [s for s in a if s in b]
    if len(common) >= 2:
        return paired(a, b, level), "paired"
    if len(a) >= 2 and len(b) >= 2:
        return welch(list(a.values()), list(b.values()), level), "unpaired"
    nan = math.nan
    if common:
        return Difference(b[common[0]] - a[common[0]], nan, nan, nan, nan, 1, 0.0), "one seed"
    mean = statistics.fmean(b.values()) - statistics.fmean(a.values())
    return Difference(mean, nan, nan, nan, nan, len(a) + len(b), 0.0), "one seed"


def caveats(a: Ranked, b: Ranked, settings: Sequence[str]) -> tuple[str, ...]:
    """Why a difference between these two may not be due to the one thing that was varied."""
    found = []
    computed = [k for k in computes(settings) if k != "data"]
    if len(computed) > 1:
        found.append(f"differ in {len(computed)} settings")
    one, two = a.variant.runs[0], b.variant.runs[0]
    if one.data and two.data and one.data != two.data:
        found.append("other data")
    elif validation(one) != validation(two):
        found.append("other validation")
    if tokens_of(a) != tokens_of(b):
        found.append("other tokens")
    return tuple(found)


def validation(run: RunRecord) -> tuple:
    """What the validation loss is measured on, as far as settings decide it."""
    model: Any = run.config.get("model")
    context = run.config.get("seq_len") or (model.get("seq_len") if isinstance(model, dict) else None)
    return run.data, run.config.get("eval_tokens"), context, run.config.get("mask_documents")


def tokens_of(ranked: Ranked) -> tuple[float, ...]:
    """Tokens that the counted runs were trained on, each number once."""
    runs = [run for run in ranked.variant.runs if run.seed in ranked.values]
    return tuple(sorted({run.tokens for run in runs if is_number(run.tokens) and math.isfinite(run.tokens)}))


# ---- Pareto fronts ---------------------------------------------------------------------------------------------------


def fronts_of(ranked: Sequence[Ranked], question: Question) -> dict[str, tuple[tuple[int, ...], tuple[bool, ...]]]:
    """For each cost: the fully trained variants that have it, and which no other beats in loss and cost at once."""
    fronts = {}
    for cost in question.costs:
        points = [i for i, r in enumerate(ranked) if r.group == 0 and math.isfinite(r.costs.get(cost, math.nan))]
        if points:
            on = pareto([(ranked[i].costs[cost], question.sign * ranked[i].interval.mean) for i in points])
            fronts[cost] = (tuple(points), tuple(on))
    return fronts


def cost_sources(ranked: Sequence[Ranked]) -> dict[str, str]:
    """For each cost the files that it comes from; figures of two sources need not compare."""
    sources: dict[str, set[str]] = {}
    for r in ranked:
        for run in r.variant.runs:
            for cost in run.cost:
                from_config = cost in ("parameters", "flops") or cost in Ops().counts()
                derived = "the config" if from_config else "metrics.jsonl"
                sources.setdefault(cost, set()).add(derived if cost in run.derived else "cost.json")
    return {cost: " and ".join(sorted(s)) for cost, s in sources.items()}


# ---- caveats over all ------------------------------------------------------------------------------------------------


def notes_of(ranked: Sequence[Ranked], pairs: Sequence[Pair], question: Question, common: float | None) -> list[Note]:
    """What a reader must know before any conclusion."""
    runs = [run for r in ranked for run in r.variant.runs]
    notes = [
        *data_notes(ranked),
        *length_notes(ranked, question, common),
        *setting_notes(ranked, pairs),
        *seed_notes(ranked),
    ]
    unfinished = Counter(run.status for run in runs if run.status != "complete")
    if unfinished:
        said = ", ".join(f"{n} {status}" for status, n in unfinished.items())
        notes.append(Note("care", f"Of {len(runs)} runs, not all are complete: {said}. They are flagged in the table."))
    if question.at == "best":
        notes.append(Note("care", "The best of many noisy values of a run is judged, which flatters every run."))
    notes += machine_notes(runs)
    mixed = [ALL_COSTS.get(c, c) for c, how in cost_sources(ranked).items() if " and " in how]
    if mixed:
        notes.append(Note("care", f"In cost.json of some runs, for others taken from elsewhere: {', '.join(mixed)}."))
    return notes


def sides(ranked: Sequence[Ranked], key: Any) -> dict[Any, list[str]]:
    """Letters of the variants by a property of theirs."""
    found: dict[Any, list[str]] = {}
    for r in ranked:
        found.setdefault(key(r), []).append(r.letter)
    return found


def some(letters: Sequence[str]) -> str:
    return ", ".join(letters) if len(letters) <= 6 else f"{', '.join(letters[:5])} and {len(letters) - 5} more"


def data_notes(ranked: Sequence[Ranked]) -> list[Note]:
    notes = []
    data = sides(ranked, lambda r: r.variant.runs[0].data)
    known = {d: letters for d, letters in data.items() if d}
    if len(known) > 1:
        said = "; ".join(f"{some(letters)} on {' + '.join(f[:12] for f in d)}" for d, letters in known.items())
        notes.append(Note("stop", f"Not comparable: trained and validated on other data ({said})."))
    if () in data:
        notes.append(Note("care", f"Nothing tells what data was trained on: {some(data[()])}."))
    ways = sides(ranked, lambda r: validation(r.variant.runs[0])[1:])
    if len(ways) > 1:
        names = ("eval_tokens", "context", "mask_documents")
        vary = [n for i, n in enumerate(names) if len({w[i] for w in ways}) > 1]
        said = "; ".join(
            f"{some(letters)}: {', '.join(f'{n}={word(w[names.index(n)])}' for n in vary)}"
            for w, letters in ways.items()
        )
        notes.append(Note("stop", f"Not comparable: validated on other windows ({said})."))
    return notes


def length_notes(ranked: Sequence[Ranked], question: Question, common: float | None) -> list[Note]:
    if question.at == "common":
        if common is None:
            return [Note("stop", "The runs have no number of tokens in common at which to compare them.")]
        text = f"Each run is judged at its last validation within {common:,.0f} tokens, which all reached."
        return [Note("info", text)]
    lengths = sides([r for r in ranked if r.group == 0], tokens_of)
    if len(lengths) < 2:
        return []
    said = "; ".join(f"{some(ls)}: {', '.join(f'{t:,.0f}' for t in ts) or 'not known'}" for ts, ls in lengths.items())
    text = f"Not comparable: trained on other numbers of tokens ({said}). at=common compares at equal ones."
    return [Note("stop", text)]


def setting_notes(ranked: Sequence[Ranked], pairs: Sequence[Pair]) -> list[Note]:
    several = [p for p in pairs if any(c.startswith("differ in") for c in p.caveats)]
    if not several:
        return []
    if len(several) <= PAIRS_IN_NOTES:
        said = "; ".join(
            f"{ranked[p.first].letter} and {ranked[p.second].letter} in {', '.join(computes(p.settings))}"
            for p in several
        )
        text = f"Variants differ in more than one setting, so a difference cannot be put down to one: {said}."
        return [Note("care", text)]
    text = f"{len(several)} of {len(pairs)} pairs differ in more than one setting (marked +), "
    return [Note("care", text + "so their difference cannot be put down to one of them.")]


def seed_notes(ranked: Sequence[Ranked]) -> list[Note]:
    notes = []
    single = [r.letter for r in ranked if r.group == 0 and len(r.values) == 1]
    if single:
        notes.append(Note("care", f"One seed only, so without uncertainty and untested: {some(single)}."))
    sets = sides([r for r in ranked if r.group == 0], lambda r: tuple(sorted(r.values, key=natural)))
    if len(sets) > 1:
        said = "; ".join(f"{some(letters)}: {spans(s)}" for s, letters in sets.items())
        notes.append(Note("info", f"The variants have other seeds ({said}); pairs are made of common ones."))
    return notes


def spans(seeds: Sequence[str]) -> str:
    """Seeds in their order, three or more in a row by their ends: `0 to 2, 18`."""
    rows: list[list[str]] = []
    for seed in seeds:
        follows = rows and seed.isdigit() and rows[-1][-1].isdigit() and int(seed) == int(rows[-1][-1]) + 1
        if follows:
            rows[-1].append(seed)
        else:
            rows.append([seed])
    return ", ".join(f"{row[0]} to {row[-1]}" if len(row) > 2 else ", ".join(row) for row in rows)


def machine_notes(runs: Sequence[RunRecord]) -> list[Note]:
    notes = []
    for key, what, why in (
        ("host", "machines", "their times, memory and energy do not compare"),
        ("version.torch", "versions of torch", "losses may differ in the last digits, times by more"),
        ("commit", "commits of the source", "what the same setting does may have changed between them"),
    ):
        there = Counter(run.machine[key][:12] for run in runs if run.machine.get(key))
        if len(there) > 1:
            said = ", ".join(f"{name} ({n} runs)" for name, n in there.most_common(4))
            notes.append(Note("info", f"Runs of several {what}: {said}; {why}."))
    return notes
