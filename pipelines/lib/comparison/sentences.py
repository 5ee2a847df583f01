"""The findings in sentences, the same on the page and on paper."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipelines.lib.comparison import words
from pipelines.lib.comparison.findings import ALL_COSTS, COSTS, TESTED, Findings, Pair, Question, Ranked, some

VERDICTS = {"none": "none", "unknown": "no error known"}


def in_short(found: Findings) -> list[str]:
    """What the page shows, in a few lines; what forbids a conclusion stands before it."""
    out = [story.sentence() for story in found.searches]
    if any(note.kind == "stop" for note in found.notes):
        out.append("These runs are not comparable as they stand; the red notes say why.")
    if not found.compared:
        out.append("No variant was trained to its end with a finite loss, so nothing is ranked.")
        return out
    first = found.ranked[found.compared[0]]
    best = "lowest" if found.question.mode == "min" else "highest"
    seeds = f"{len(first.values)} seeds" if len(first.values) > 1 else "one seed, so without uncertainty"
    if len(found.compared) == 1:
        out.append(f"{first.name}: {found.question.metric} {words.mean(first.interval, found.error)}, {seeds}.")
    else:
        out.append(
            f"{first.name} has the {best} {found.question.metric}: {words.mean(first.interval, found.error)}, {seeds}."
        )
        out += about_pairs(found)
    for effect in found.importance.effects[:2]:
        if effect.shown and effect.change:
            size = f"{words.signed(effect.size, found.error)} {words.bounds(effect.low, effect.high, found.error)}"
            out.append(f"{effect.key} {effect.change} changes it by {size}, over all that it was tried with.")
        elif effect.shown:
            share = f"{effect.size:.0%} of the variance"
            out.append(f"{effect.key} matters: shuffled, it takes {share} from a forest's prediction.")
    on_fronts = [
        f"{ALL_COSTS[cost].split(',')[0]}: {some([found.ranked[i].letter for i, on in zip(*front, strict=True) if on])}"
        for cost, front in found.fronts.items()
    ]
    if on_fronts and len(found.compared) > 1:
        out.append(f"On the front of {found.question.metric} against {'; '.join(on_fronts)}.")
    return out


def about_pairs(found: Findings) -> list[str]:
    """Of the first variant, or of the baseline: from which others it can be told, and from which not."""
    me = found.compared[0] if found.baseline is None else found.baseline
    mine = [p for p in found.pairs if me in (p.first, p.second)]
    sides: dict[str, list[str]] = {"better": [], "worse": [], "none": [], "unknown": []}
    for pair in mine:
        other = pair.second if pair.first == me else pair.first
        won = {"first": pair.first == me, "second": pair.second == me}.get(pair.verdict)
        kind = pair.verdict if won is None else ("better" if won else "worse")
        sides[kind].append(found.ranked[other].letter)
    name = found.ranked[me].letter
    out = []
    if sides["better"]:
        out.append(f"{name} is better than {some(sides['better'])}.")
    if sides["worse"]:
        out.append(f"{name} is worse than {some(sides['worse'])}.")
    if sides["none"]:
        out.append(f"Between {name} and {some(sides['none'])}: no difference is outside its error{over(found)}.")
    if sides["unknown"]:
        out.append(f"Between {name} and {some(sides['unknown'])} nothing can be told: it takes two seeds each.")
    return out


def over(found: Findings) -> str:
    n = sum(not math.isnan(p.p) for p in found.pairs)
    if n < 2:
        return ""
    return f" ({n} comparisons at once{f'; one by one, {found.alone} of all would be' if found.alone else ''})"


def about_differences(found: Findings) -> str:
    """How the differences were tested."""
    n = sum(not math.isnan(p.p) for p in found.pairs)
    kinds = {p.how for p in found.pairs}
    how = []
    if "paired" in kinds:
        how.append("paired over common seeds")
    if "unpaired" in kinds:
        how.append("unpaired (Welch) where seeds are not common")
    tested = " and ".join(how)
    level = found.question.level
    text = (
        f"Second minus first, {tested}, with {level:.0%} intervals; p adjusted over {n} comparisons (Holm). A "
        f"difference whose adjusted p is not below {1 - level:.2g} is called none."
        if tested
        else "Bare differences: with one seed there is no error and no test."
    )
    if found.baseline is None and len(found.compared) > TESTED:
        text += f" Only the first {TESTED} variants are tested against each other."
    if found.alone:
        text += f" {found.alone} would count alone, but not among so many: more seeds tell"
        text += "." if found.baseline is not None else ", or baseline=NAME, which tests one variant against the others."
    return text


def about_pair(pair: Pair) -> str:
    return VERDICTS.get(pair.verdict, "")


def more_columns(question: Question) -> list[str]:
    """Costs that were asked for besides the usual ones."""
    return [cost for cost in question.costs if cost not in COSTS]


def cells(ranked: Ranked, question: Question) -> Sequence[str]:
    """The costs of a variant, as columns of a table."""
    usual = ("parameters", "tokens", "flops", "step_time_s", "memory_gb")
    return [words.cost(name, ranked.costs.get(name)) for name in (*usual, *more_columns(question))]
