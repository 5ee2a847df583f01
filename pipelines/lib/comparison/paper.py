"""The comparison as Markdown with plots beside it: for a repository, an issue, a printer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.lib.comparison import sentences, words
from pipelines.lib.comparison.curves import AXES, Curve, mean_curve, seed_curve, thinned
from pipelines.lib.comparison.findings import ALL_COSTS, Findings
from pipelines.lib.comparison.page import (
    BANDS,
    GREY,
    PAIRS,
    SAMPLES,
    TALLEST,
    colour,
    dimension,
    last_samples,
    shortened,
)
from pipelines.lib.comparison.variants import ABSENT, word

MARKS = {"stop": "**Not comparable.** ", "care": "**Care.** ", "info": ""}


def comparison_paper(found: Findings, title: str, command: str, shown: int, folder: Path) -> str:
    """The Markdown; draws its plots into `folder` as PNG files."""
    question = found.question
    parts = [f"# {plain(title)}", "\n".join(f"- {plain(line)}" for line in sentences.in_short(found))]
    parts += [f"> {MARKS[n.kind]}{plain(n.text.removeprefix('Not comparable: '))}" for n in found.notes]
    for story in found.searches:
        parts += ["## Search", plain(story.sentence())]
        if story.decisions:
            parts.append("\n".join(f"{i}. {plain(line)}" for i, line in enumerate(story.decisions, 1)))
        if story.winner is not None:
            ended = ", ".join(f"{k}={word(v)}" for k, v in story.winner.items()) or "its baseline"
            parts.append(f"Recommended: {plain(ended)}.")
    parts += ["## Results", results(found)]
    if image(
        folder,
        "finals",
        lambda figure: draw_finals(figure, found, shown),
        (8, 1.2 + 0.3 * len(drawn_finals(found, shown))),
    ):
        parts.append("![final values over seeds](finals.png)")
    parts += ["## What differs", differs(found), "## Curves"]
    parts.append(
        f"{question.metric} over tokens, FLOP and time: single runs thin, means over seeds thick, "
        f"{question.level:.0%} bands for the first {BANDS}."
    )
    if image(folder, "curves", lambda figure: draw_curves(figure, found, shown), (13, 4.6)):
        parts.append("![curves over tokens, FLOP and time](curves.png)")
    if found.pairs:
        parts += ["## Differences", plain(sentences.about_differences(found)), pairs(found)]
    parts.append("## Loss and cost")
    size = (10, 3.5 * -(-len(question.costs) // 2))
    if image(folder, "fronts", lambda figure: draw_fronts(figure, found, shown), size):
        parts.append("Filled points are on the front.\n\n![Pareto fronts](fronts.png)")
    else:
        parts.append("No costs are known.")
    parts += ["## What each setting does", plain(found.importance.text)]
    if found.importance.effects:
        parts.append(effects(found))
    if image(folder, "coordinates", lambda figure: draw_coordinates(figure, found), (10, 4.2)):
        parts.append("![parallel coordinates](coordinates.png)")
    parts += ["## Samples", samples(found), "## Sources", sources(found), f"Made by\n\n{fenced(command)}"]
    return "\n\n".join(parts) + "\n"


def plain(text: Any) -> str:
    """Text that Markdown shows as it is, in a cell too."""
    line = " ".join(str(text).split())
    return "".join(f"\\{c}" if c in "\\|`*<>" else c for c in line).replace("](", "]\\(")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], numbers: frozenset[int] = frozenset()) -> str:
    """A Markdown table. numbers: columns that stand to the right."""
    rule = ["---:" if i in numbers else "---" for i in range(len(head))]
    lines = [[plain(h) for h in head], rule, *([plain(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def results(found: Findings) -> str:
    head = ["", "variant", "seeds", found.question.metric, f"{found.question.level:.0%} interval"]
    head += ["parameters", "tokens", "training FLOP", "per update", "memory"]
    head += [*(ALL_COSTS[cost] for cost in sentences.more_columns(found.question)), "flags"]
    rows = [
        [
            r.letter,
            r.variant.label,
            len(r.values),
            words.figure(r.interval.mean, found.error) + (" (not ranked)" if r.group else ""),
            words.bounds(r.interval.low, r.interval.high, found.error) or "–",
            *sentences.cells(r, found.question),
            "; ".join(r.flags),
        ]
        for r in found.ranked
    ]
    return table(head, rows, frozenset(range(2, len(head) - 1)))


def differs(found: Findings) -> str:
    if not found.columns:
        return "No setting differs; only seeds do."
    rows = [[r.letter, *(word(r.variant.settings.get(k, ABSENT)) for k in found.columns)] for r in found.ranked]
    same = len(found.ranked[0].variant.settings) - len(found.columns)
    return f"{table(['', *found.columns], rows)}\n\n{same} settings are the same in all."


def pairs(found: Findings) -> str:
    head = ["first", "second", "second − first", f"{found.question.level:.0%} interval", "p alone", "adjusted p"]
    head += ["verdict", "how", "differ in", "but"]
    rows = []
    for pair in found.pairs[:PAIRS]:
        d = pair.difference
        one, two = found.ranked[pair.first].letter, found.ranked[pair.second].letter
        rows.append(
            [
                one,
                two,
                words.signed(d.mean, found.error),
                words.bounds(d.low, d.high, found.error) or "–",
                words.chance(d.p),
                words.chance(pair.p),
                sentences.about_pair(pair) or f"{one if pair.verdict == 'first' else two} better",
                pair.how,
                ", ".join(pair.settings),
                "; ".join(pair.caveats),
            ]
        )
    rest = f"\n\nThe first {PAIRS} of {len(found.pairs)}." if len(found.pairs) > PAIRS else ""
    return table(head, rows, frozenset({2, 3, 4, 5})) + rest


def effects(found: Findings) -> str:
    forest = found.importance.kind == "forest"
    head = ["setting", "share of variance" if forest else f"change of {found.question.metric}", "interval", "verdict"]
    error = math.nan if forest else found.error
    rows = [
        [
            f"{e.key} {e.change}".strip(),
            words.figure(e.size, 0.01) if forest else words.signed(e.size, error),
            words.bounds(e.low, e.high, 0.01 if forest else error) or "–",
            "matters" if e.shown else "none",
        ]
        for e in found.importance.effects
    ]
    return table(head, rows, frozenset({1, 2}))


def samples(found: Findings) -> str:
    parts = []
    for r in [r for r in found.ranked if last_samples(r)][:SAMPLES]:
        for row in last_samples(r):
            parts.append(f"{plain(r.name)}, step {row['step']}:\n\n{fenced(str(row['text']))}")
    return "\n\n".join(parts) or "No run has samples (samples.txt)."


def sources(found: Findings) -> str:
    rows = [
        [r.letter, run.seed, run.path, run.status + (f": {run.note}" if run.note else "")]
        for r in found.ranked
        for run in r.variant.runs
    ]
    text = table(["", "seed", "run", "status"], rows)
    if found.left_out:
        text += "\n\n" + table(["left out", "why"], [[e.name, e.why] for e in found.left_out])
    return text


# ---- plots -----------------------------------------------------------------------------------------------------------


def image(folder: Path, name: str, draw: Callable[[Any], bool], size: tuple[float, float]) -> bool:
    """Draw folder/name.png; False, and no file, where there is nothing to draw."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # no pyplot: it keeps global state and may look for a display

    style: Any = {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    style |= {"axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 7.5}
    path = folder / f"{name}.png"
    path.unlink(missing_ok=True)
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        if not draw(figure):
            return False
        figure.savefig(path, dpi=110)
    return True


def drawn_finals(found: Findings, shown: int) -> Sequence[int]:
    """The variants in the plot of final values: all of them, unless there are very many."""
    return found.compared[: max(2 * shown, TALLEST)]


def draw_finals(figure: Any, found: Findings, shown: int) -> bool:
    chosen = drawn_finals(found, shown)
    if not chosen:
        return False
    axes = figure.subplots()
    for row, i in enumerate(chosen):
        r = found.ranked[i]
        axes.scatter(list(r.values.values()), [row] * len(r.values), s=18, color=colour(i, shown), alpha=0.4)
        bars = None
        if math.isfinite(r.interval.low):
            bars = [[r.interval.mean - r.interval.low], [r.interval.high - r.interval.mean]]
        axes.errorbar([r.interval.mean], [row], xerr=bars, fmt="D", color=colour(i, shown), capsize=3, ms=5, lw=1)
    axes.set_yticks(range(len(chosen)), [shortened(found.ranked[i].name, 56) for i in chosen])
    axes.invert_yaxis()
    axes.set_xlabel(found.question.metric)
    axes.grid(alpha=0.25, axis="x")
    return True


def draw_curves(figure: Any, found: Findings, shown: int) -> bool:
    key, level = found.question.metric, found.question.level
    drawn = [
        (i, r, [thinned(seed_curve(run, key)) for run in r.variant.runs])
        for i, r in enumerate(found.ranked[: shown + GREY])
    ]
    here = [axis for axis in AXES if any(axis in c.x for _, _, curves in drawn for c in curves)]
    if not here:
        return False
    figure_axes = figure.subplots(1, len(here), sharey=True, squeeze=False)[0]
    values = sorted(v for _, _, curves in drawn for c in curves for v in c.y if math.isfinite(v))
    for axes, axis in zip(figure_axes, here, strict=True):
        for i, r, curves in drawn:
            mean = mean_curve(r.variant.runs, key, level)
            loud = i < shown
            _draw_lines(axes, axis, curves, colour(i, shown), mean, loud, i < BANDS, shortened(r.name, 40))
        axes.set_xlabel(AXES[axis])
        axes.grid(alpha=0.25)
    if values:  # the bands of few seeds are cut off, so that the curves can be seen
        low, high = values[0], values[min(len(values) - 1, int(0.995 * len(values)))]
        pad = 0.06 * (high - low or abs(low) or 1.0)
        figure_axes[0].set_ylim(low - pad, high + pad)
    figure_axes[0].set_ylabel(key)
    handles, labels = figure_axes[0].get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return True


def _draw_lines(
    axes: Any, axis: str, curves: Sequence[Curve], tint: str, mean: Curve | None, loud: bool, band: bool, name: str
) -> None:
    for curve in curves:
        if axis in curve.x:
            alone = mean is None
            axes.plot(curve.x[axis], curve.y, color=tint, lw=1.6 if alone and loud else 0.6, alpha=1 if alone else 0.5,
                      label=name if alone and loud and curve is curves[0] else None)  # fmt: skip
    if mean is not None and loud and axis in mean.x:
        thin = thinned(mean)
        axes.plot(thin.x[axis], thin.y, color=tint, lw=1.8, label=name)
        if band:
            axes.fill_between(thin.x[axis], thin.low, thin.high, color=tint, alpha=0.12, lw=0)


def draw_fronts(figure: Any, found: Findings, shown: int) -> bool:
    if not found.fronts:
        return False
    costs = found.question.costs
    places = list(figure.subplots(-(-len(costs) // 2), 2).flat)
    for axes in places[len(costs) :]:
        axes.set_axis_off()
    for axes, cost in zip(places, costs, strict=False):
        axes.set_xlabel(ALL_COSTS[cost])
        axes.set_ylabel(found.question.metric)
        axes.grid(alpha=0.25)
        if cost not in found.fronts:
            axes.text(0.5, 0.5, "no run has this figure", ha="center", transform=axes.transAxes)
            continue
        points = sorted(zip(*found.fronts[cost], strict=True), key=lambda point: point[1])
        front = sorted((found.ranked[i].costs[cost], found.ranked[i].interval.mean) for i, on in points if on)
        axes.step(*zip(*front, strict=True), where="post", color="0.5", lw=1, ls=":")
        for i, on in points:
            r = found.ranked[i]
            at = (r.costs[cost], r.interval.mean)
            axes.scatter(*at, s=36, color=colour(i, shown) if on else "white", edgecolors=colour(i, shown), zorder=3)
            if on or len(points) <= 8:
                axes.annotate(r.letter, at, xytext=(5, 3), textcoords="offset points", fontsize=8)
    return True


def draw_coordinates(figure: Any, found: Findings) -> bool:
    drawn = [found.ranked[i] for i in found.compared]
    keys = [k for k in found.columns if len({repr(r.variant.settings.get(k, ABSENT)) for r in drawn}) > 1]
    if len(drawn) < 2 or not keys:
        return False
    from matplotlib import colormaps

    means = [r.interval.mean for r in drawn]
    dimensions = [dimension(found.names[k], [r.variant.settings.get(k, ABSENT) for r in drawn]) for k in keys]
    dimensions.append({"name": found.question.metric, "values": means})
    axes = figure.subplots()
    heights = []
    for x, d in enumerate(dimensions):
        low, high = d.get("range", (min(d["values"]), max(d["values"])))
        scale = lambda v, low=low, high=high: (v - low) / (high - low) if high > low else 0.5
        heights.append([scale(v) for v in d["values"]])
        axes.axvline(x, color="0.6", lw=0.8)
        ticks = d.get("ticks", [low, (low + high) / 2, high])
        for t, name in zip(ticks, d.get("words", [f"{t:.4g}" for t in ticks]), strict=True):
            axes.annotate(name, (x, scale(t)), xytext=(-4, 0), textcoords="offset points", ha="right", fontsize=8)
    for line, mean in zip(zip(*heights, strict=True), heights[-1], strict=True):
        axes.plot(range(len(dimensions)), line, color=colormaps["viridis"](mean), lw=1.2, alpha=0.85)
    axes.set_xticks(range(len(dimensions)), [d["name"] for d in dimensions])
    axes.set_yticks([])
    axes.set_xlim(-0.5, len(dimensions) - 0.8)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return True
