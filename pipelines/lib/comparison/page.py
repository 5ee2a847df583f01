"""The comparison as one HTML page."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.lib.comparison import sentences, words
from pipelines.lib.comparison.curves import AXES, Curve, mean_curve, seed_curve, thinned
from pipelines.lib.comparison.findings import ALL_COSTS, Findings, Pair, Ranked
from pipelines.lib.comparison.html import Safe, buttons, document, join, plot, say, section, table, tag
from pipelines.lib.comparison.variants import ABSENT, number_axis, word

COLOURS = "#4269d0 #e58606 #e4572e #2a9d8f #3ca951 #d95f9f #9457c9 #5aa9e6 #9c6b4e #8a8f3c #c1121f #007f9e".split()
QUIET = "#8a8f98"
MATRIX = 14  # variants in the matrix of differences; the table of pairs has them all
BANDS = 3  # variants whose mean stands in its band: more would hide each other
TALLEST = 60  # variants in the plot of final values, where fewer are in colour
GREY = 100  # variants beyond those in colour whose curves are drawn at all
PAIRS = 300  # rows of the table of pairs
SAMPLES = 6  # variants whose samples stand side by side


def comparison_page(found: Findings, title: str, command: str, shown: int) -> str:
    """The page. shown: variants in colour; the others stay grey, their tables whole."""
    plots: dict[str, Any] = {}
    parts = [
        header(found, title),
        tag("section", tag("h2", "In short"), bullets(sentences.in_short(found)), notes(found), id="short"),
        searches_section(found, plots),
        finals_section(found, plots, shown),
        settings_section(found),
        curves_section(found, plots, shown),
        differences_section(found),
        fronts_section(found, plots, shown),
        importance_section(found, plots),
        samples_section(found),
        sources_section(found, command),
    ]
    return document(title, [p for p in parts if p], plots)


def colour(i: int, shown: int) -> str:
    return COLOURS[i % len(COLOURS)] if i < shown else QUIET


def name_of(ranked: Ranked, i: int, shown: int) -> Safe:
    """The variant's colour, letter and label."""
    dot = Safe(f'<span class="dot" style="background:{colour(i, shown)}"></span>')
    return join([dot, tag("span", ranked.letter, class_="letter"), " ", ranked.variant.label])


def bullets(lines: Sequence[str]) -> Safe:
    return tag("ul", *(tag("li", line) for line in lines), class_="short")


def notes(found: Findings) -> Safe:
    order = ("stop", "care", "info")
    notes = sorted(found.notes, key=lambda n: order.index(n.kind))
    return join([tag("div", n.text, class_=f"note {n.kind}") for n in notes])


def header(found: Findings, title: str) -> Safe:
    runs = sum(len(r.variant.runs) for r in found.ranked)
    question = found.question
    at = {"last": "at the end", "best": "best of each run", "common": "at equal tokens"}[question.at]
    goal = "less is better" if question.mode == "min" else "more is better"
    what = f"{len(found.ranked)} variants, {runs} runs · {question.metric}, {at}, {goal}"
    what += f" · {time.strftime('%Y-%m-%d %H:%M')}"
    places = (
        *((("search", "Search"),) if found.searches else ()),
        ("finals", "Results"),
        ("settings", "What differs"),
        ("curves", "Curves"),
        ("differences", "Differences"),
        ("fronts", "Loss and cost"),
        ("importance", "Settings"),
        ("samples", "Samples"),
        ("sources", "Sources"),
    )
    links = [tag("a", name, href=f"#{place}") for place, name in places]
    return tag("header", tag("h1", title), tag("div", what, class_="sub"), tag("nav", *links))


# ---- searches --------------------------------------------------------------------------------------------------------


def searches_section(found: Findings, plots: dict[str, Any]) -> Safe | None:
    """What each search did: its trials in order, its decisions, why it ended."""
    if not found.searches:
        return None
    inside: list[Any] = []
    for i, story in enumerate(found.searches):
        time_spent = f" {words.duration(story.seconds)} of driver time." if story.seconds else ""
        inside.append(say(story.sentence() + time_spent))
        if story.decisions:
            inside += [
                tag("h3", "Decisions"),
                tag("ol", *(tag("li", line) for line in story.decisions), class_="short"),
            ]
        if story.winner is not None:
            ended = ", ".join(f"{k}={word(v)}" for k, v in story.winner.items()) or "its baseline"
            inside.append(say(tag("b", "Recommended: "), ended))
        if len(story.points) > 1:
            best = story.best_so_far()
            line = [*best, (story.points[-1][0], best[-1][1])] if best else []
            plots[f"plot-search-{i}"] = {
                "kind": "search",
                "metric": story.metric,
                "points": [{"x": n, "y": value, "whole": share == 1} for n, value, share in story.points],
                "best": {"x": [n for n, _ in line], "y": [v for _, v in line]},
            }
            inside += [tag("h3", "Trials in the order they were asked for"), plot(f"plot-search-{i}")]
    return section("search", "Search" if len(found.searches) == 1 else "Searches", *inside)


# ---- results ---------------------------------------------------------------------------------------------------------


def finals_section(found: Findings, plots: dict[str, Any], shown: int) -> Safe:
    question = found.question
    rows = [
        {
            "name": f"{r.letter}  {shortened(r.variant.label)}",
            "color": colour(i, shown),
            "mean": r.interval.mean,
            "low": r.interval.low,
            "high": r.interval.high,
            "values": [v for v in r.values.values() if math.isfinite(v)],
        }
        for i, r in enumerate(found.ranked)
        if math.isfinite(r.interval.mean) and r.group == 0
    ][: max(2 * shown, TALLEST)]
    plots["plot-finals"] = {"kind": "finals", "rows": rows, "metric": question.metric}
    head = [
        ("variant", ""),
        ("seeds", "n"),
        (question.metric, "n"),
        (f"{question.level:.0%} interval", "n"),
        ("parameters", "n"),
        ("tokens", "n"),
        ("training FLOP", "n"),
        ("per update", "n"),
        ("memory", "n"),
        *((ALL_COSTS[cost], "n") for cost in sentences.more_columns(question)),
        ("flags", "flags"),
    ]
    body = []
    for i, r in enumerate(found.ranked):
        over = r.interval
        value: Any = words.figure(over.mean, found.error)
        if r.group:
            value = tag("span", value, class_="none")
        body.append(
            [
                name_of(r, i, shown),
                f"{len(r.values)}",
                value,
                words.bounds(over.low, over.high, found.error) or "–",
                *sentences.cells(r, found.question),
                "; ".join(r.flags),
            ]
        )
    text = (
        "Diamonds are means over seeds with their interval, pale dots the seeds. Variants that were not trained to "
        "their end, or diverged, stand below the others and are not ranked among them."
    )
    return section("finals", "Results", say(text), plot("plot-finals"), tag("div", table(head, body), class_="tall"))


def shortened(label: str, n: int = 60) -> str:
    return label if len(label) <= n else label[: n - 3] + "..."


def settings_section(found: Findings) -> Safe:
    if not found.columns:
        text = "Nothing but the seed differs between these runs." if len(found.ranked) == 1 else "No setting differs."
        return section("settings", "What differs", say(text))
    same = len(found.ranked[0].variant.settings) - len(found.columns)
    head = [("", ""), *((found.names[k], "") for k in found.columns)]
    body = [
        [tag("span", r.letter, class_="letter"), *(word(r.variant.settings.get(k, ABSENT)) for k in found.columns)]
        for r in found.ranked
    ]
    keys = [k for k in found.columns if found.names[k] != k]
    long = f" In full: {', '.join(keys)}." if keys else ""
    text = f"The settings that vary, and no others; {same} settings are the same in all.{long}"
    return section("settings", "What differs", say(text), tag("div", table(head, body), class_="tall"))


# ---- curves ----------------------------------------------------------------------------------------------------------


def curves_section(found: Findings, plots: dict[str, Any], shown: int) -> Safe:
    keys = dict.fromkeys([found.question.metric, "train/nll"])
    lines = {key: lines_of(found.ranked, key, found.question.level, shown) for key in keys}
    figures = [{"name": key, "lines": lines[key]} for key in keys]
    plots["plot-curves"] = {"kind": "curves", "figures": figures, "axes": axes_of(), "height": 480}
    bar = tag(
        "div",
        buttons("figure", [(str(i), key) for i, key in enumerate(keys)]),
        buttons("axis", [(a["key"], f"over {a['short']}") for a in axes_of()]),
        tag("span", tag("button", "log axis", type="button", data_key="log", data_value="", aria_pressed="false")),
        class_="buttons",
    )
    text = (
        f"Thin lines are single runs, thick ones the mean over seeds; the band is its {found.question.level:.0%} "
        f"interval, for the first {BANDS} variants. A click on a name hides it, a double click shows it alone."
    )
    if len(found.ranked) > shown + GREY:
        text += f" Of {len(found.ranked)} variants, the first {shown + GREY} are drawn."
    return section("curves", "Curves", say(text), bar, plot("plot-curves"))


def axes_of() -> list[dict[str, str]]:
    short = {"tokens": "tokens", "flops": "FLOP", "seconds": "time"}
    return [{"key": key, "name": name, "short": short[key]} for key, name in AXES.items()]


def lines_of(ranked: Sequence[Ranked], key: str, level: float, shown: int) -> list[dict[str, Any]]:
    lines = []
    for i, r in enumerate(ranked[: shown + GREY]):
        mean = mean_curve(r.variant.runs, key, level)
        lines.append(
            {
                "name": f"{r.letter} {shortened(r.variant.label, 48)}",
                "color": colour(i, shown),
                "quiet": i >= shown,
                "band": i < BANDS,
                "mean": data_of(mean) if mean else None,
                "seeds": [{"seed": run.seed, **data_of(seed_curve(run, key))} for run in r.variant.runs],
            }
        )
    return lines


def data_of(curve: Curve) -> dict[str, Any]:
    """A curve for the page: thinned, six digits."""
    short = lambda values: [float(f"{v:.6g}") for v in values]
    thin = thinned(curve)
    out: dict[str, Any] = {"x": {k: short(v) for k, v in thin.x.items()}, "y": short(thin.y)}
    return out | ({"low": short(thin.low), "high": short(thin.high)} if thin.low else {})


# ---- differences -----------------------------------------------------------------------------------------------------


def differences_section(found: Findings) -> Safe | None:
    if not found.pairs:
        return None
    pairs = {(p.first, p.second): p for p in found.pairs}
    many = found.compared[:MATRIX]
    inside: list[Any] = [say(sentences.about_differences(found))]
    if found.baseline is None and len(many) > 1:
        inside.append(
            say(
                "Row less column. Green: the row is better; red: worse; grey: none; dark: outside its own error, but "
                "none among so many; italics: no error known."
            )
        )
        inside.append(matrix(found, many, pairs))
        if len(found.compared) > MATRIX:
            inside.append(say(f"The first {MATRIX} of {len(found.compared)} variants."))
        inside.append(tag("details", tag("summary", "Every difference, with its interval"), pair_table(found)))
    else:
        inside.append(pair_table(found))
    return section("differences", "Differences", *inside)


def matrix(found: Findings, which: Sequence[int], pairs: Mapping[tuple[int, int], Pair]) -> Safe:
    top = tag("tr", tag("th", ""), *(tag("th", found.ranked[j].letter) for j in which))
    rows = []
    for i in which:
        row = [tag("th", found.ranked[i].letter)]
        for j in which:
            row.append(tag("td", "", class_="self") if i == j else matrix_cell(found, pairs[min(i, j), max(i, j)], i))
        rows.append(tag("tr", *row))
    return tag("div", tag("table", tag("thead", top), tag("tbody", *rows), class_="matrix"), class_="scroll")


def matrix_cell(found: Findings, pair: Pair, row: int) -> Safe:
    """The row's value less the column's."""
    d = pair.difference
    value = -d.mean if row == pair.first else d.mean
    mark = "+" if any(c.startswith("differ in") for c in pair.caveats) else ""
    if any(not c.startswith("differ in") for c in pair.caveats):
        mark += "!"
    won = {"first": row == pair.first, "second": row == pair.second}.get(pair.verdict)
    alone = pair.verdict == "none" and d.p < 1 - found.question.level
    kind = ("alone" if alone else "none") if won is None else "good" if won else "bad"
    shown: Any = words.signed(value, found.error)
    if pair.verdict == "unknown":
        shown = tag("i", shown)
    return tag("td", shown, tag("sup", mark) if mark else "", class_=kind, title=pair_words(found, pair))


def pair_words(found: Findings, pair: Pair) -> str:
    d = pair.difference
    one, two = found.ranked[pair.first], found.ranked[pair.second]
    size = f"{words.signed(d.mean, found.error)} {words.bounds(d.low, d.high, found.error)}".strip()
    said = [f"{two.name} − {one.name} = {size}", f"{pair.how}, adjusted p {words.chance(pair.p)}"]
    return "; ".join([*said, *pair.caveats])


def pair_table(found: Findings) -> Safe:
    head = [
        ("first", ""),
        ("second", ""),
        ("second − first", "n"),
        (f"{found.question.level:.0%} interval", "n"),
        ("p alone", "n"),
        ("adjusted p", "n"),
        ("verdict", ""),
        ("how", ""),
        ("differ in", "wrap"),
        ("but", "flags"),
    ]
    rows = []
    for pair in found.pairs[:PAIRS]:
        d = pair.difference
        one, two = found.ranked[pair.first].letter, found.ranked[pair.second].letter
        verdict: Any = sentences.about_pair(pair)
        verdict = (
            tag("span", verdict, class_="none") if verdict else f"{one if pair.verdict == 'first' else two} better"
        )
        rows.append(
            [
                tag("span", one, class_="letter"),
                tag("span", two, class_="letter"),
                words.signed(d.mean, found.error),
                words.bounds(d.low, d.high, found.error) or "–",
                words.chance(d.p),
                words.chance(pair.p),
                verdict,
                f"{pair.how}, {d.n}" if pair.how == "paired" else pair.how,
                ", ".join(pair.settings),
                "; ".join(pair.caveats),
            ]
        )
    rest = say(f"The first {PAIRS} of {len(found.pairs)}.") if len(found.pairs) > PAIRS else ""
    return tag("div", table(head, rows), rest, class_="tall")


# ---- loss against cost, settings -------------------------------------------------------------------------------------


def fronts_section(found: Findings, plots: dict[str, Any], shown: int) -> Safe:
    places = []
    for cost in found.question.costs:
        title = ALL_COSTS[cost]
        if cost not in found.fronts:
            places.append(tag("div", tag("h3", title), say("No run has this figure.")))
            continue
        points = []
        for i, on in zip(*found.fronts[cost], strict=True):
            r = found.ranked[i]
            points.append(
                {
                    "x": r.costs[cost],
                    "y": r.interval.mean,
                    "low": r.interval.low,
                    "high": r.interval.high,
                    "letter": r.letter,
                    "name": r.name,
                    "front": on,
                    "color": colour(i, shown),
                }
            )
        plots[f"plot-{cost}"] = {
            "kind": "fronts",
            "points": points,
            "name": title,
            "metric": found.question.metric,
            "mode": found.question.mode,
        }
        missing = len(found.compared) - len(points)
        inside = [tag("h3", f"against {title}"), plot(f"plot-{cost}")]
        if missing:
            inside.append(say(f"{missing} variants have no such figure."))
        places.append(tag("div", *inside))
    of = found.question.costs
    how = "; ".join(f"{ALL_COSTS[c].split(',')[0]} from {h}" for c, h in found.cost_how.items() if c in of)
    text = (
        "Filled points are on the front: no other variant is as good in both and better in one. Medians over seeds. "
        f"{how[:1].upper()}{how[1:]}."
        if how
        else "No costs are known."
    )
    return section("fronts", "Loss and cost", say(text), tag("div", *places, class_="grid2"))


def importance_section(found: Findings, plots: dict[str, Any]) -> Safe:
    inside: list[Any] = []
    if spec := coordinates(found):
        plots["plot-coordinates"] = spec
        inside += [tag("h3", "Parallel coordinates"), plot("plot-coordinates")]
        inside.append(say("One line per variant. Drag along an axis to keep a range; drag a name to move its axis."))
    inside += [tag("h3", "What each setting does"), say(found.importance.text)]
    if found.importance.effects:
        plots["plot-importance"] = {
            "kind": "importance",
            "what": "share of variance" if found.importance.kind == "forest" else f"change of {found.question.metric}",
            "rows": [
                {
                    "name": f"{found.names.get(e.key, e.key)} {e.change}".strip() + ("" if e.shown else "  (none)"),
                    "size": e.size,
                    "low": e.low,
                    "high": e.high,
                    "shown": e.shown,
                }
                for e in found.importance.effects
            ],
        }
        inside.append(plot("plot-importance"))
        inside.append(say("Grey bars are inside their error: none."))
    return section("importance", "Settings", *inside)


def coordinates(found: Findings) -> dict[str, Any] | None:
    """The parallel coordinates: fully trained and diverged variants over the settings that vary."""
    drawn = [r for r in found.ranked if r.group in (0, 2)]
    keys = [k for k in found.columns if len({repr(r.variant.settings.get(k, ABSENT)) for r in drawn}) > 1]
    finite = [r.interval.mean for r in drawn if math.isfinite(r.interval.mean)]
    if len(drawn) < 2 or not keys or not finite:
        return None
    dimensions = [dimension(found.names[k], [r.variant.settings.get(k, ABSENT) for r in drawn]) for k in keys]
    low, high = min(finite), max(finite)
    beyond = (high + 0.12 * (high - low or 1.0)) if found.question.mode == "min" else low - 0.12 * (high - low or 1.0)
    means = [r.interval.mean if math.isfinite(r.interval.mean) else beyond for r in drawn]
    metric: dict[str, Any] = {"name": found.question.metric, "values": means}
    if len(finite) < len(means):
        ticks = [low + i * (high - low) / 4 for i in range(5)]
        metric |= {"ticks": [*ticks, beyond], "words": [*(f"{t:.4g}" for t in ticks), "diverged"]}
    return {
        "kind": "coordinates",
        "dimensions": [*dimensions, metric],
        "color": means,
        "metric": found.question.metric,
        "mode": found.question.mode,
    }


def dimension(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """One axis: numbers in their place (in logarithms over wide ranges), words in the order they come."""
    log = number_axis(values)
    if log is None or ABSENT in values:
        distinct = sorted({word(v) for v in values}, key=lambda w: (w == word(ABSENT), w))
        return {
            "name": name,
            "values": [distinct.index(word(v)) for v in values],
            "ticks": list(range(len(distinct))),
            "words": [shortened(w, 24) for w in distinct],
            "range": [-0.2, len(distinct) - 0.8],
        }
    place = (lambda v: math.log10(v)) if log else float
    distinct_numbers = sorted(set(values))
    chosen = distinct_numbers
    if len(chosen) > 8:
        chosen = [distinct_numbers[round(i * (len(distinct_numbers) - 1) / 6)] for i in range(7)]
    return {
        "name": f"{name} (log)" if log else name,
        "values": [place(v) for v in values],
        "ticks": [place(v) for v in chosen],
        "words": [word(float(f"{v:.3g}") if isinstance(v, float) else v) for v in chosen],
    }


# ---- samples, sources ------------------------------------------------------------------------------------------------


def samples_section(found: Findings) -> Safe:
    columns = [(i, r, list(last_samples(r))) for i, r in enumerate(found.ranked)]
    columns = [(i, r, rows) for i, r, rows in columns if rows][:SAMPLES]
    if not columns:
        return section("samples", "Samples", say("No run has samples (samples.txt)."))
    prompts = list(dict.fromkeys(row["prompt"] for _, _, rows in columns for row in rows))
    inside: list[Any] = [
        say(f"The newest sample of the first seed, for the first {len(columns)} variants that have any.")
    ]
    for prompt in prompts:
        cards = []
        for i, r, rows in columns:
            row = next((s for s in rows if s["prompt"] == prompt), None)
            body = tag("pre", "no sample of this prompt")
            if row is not None:
                body = tag("pre", tag("mark", prompt), str(row["text"]).removeprefix(str(prompt)))
            step = f", step {row['step']}" if row else ""
            cards.append(tag("div", tag("h4", name_of(r, i, len(COLOURS)), step), body, class_="sample"))
        inside += [tag("h3", f"Prompt {prompt!r}"), tag("div", *cards, class_="samples")]
    return section("samples", "Samples", *inside)


def last_samples(ranked: Ranked) -> Sequence[Mapping[str, Any]]:
    """Of the first seed that has any: the newest sample of each prompt."""
    for run in ranked.variant.runs:
        if run.samples:
            return list({row["prompt"]: row for row in run.samples}.values())
    return []


def sources_section(found: Findings, command: str) -> Safe:
    rows = [
        [
            tag("span", r.letter, class_="letter"),
            run.seed,
            tag("code", run.path),
            run.status + (f": {run.note}" if run.note else ""),
            " + ".join(d[:12] for d in run.data) or words.MISSING,
        ]
        for r in found.ranked
        for run in r.variant.runs
    ]
    head = [("", ""), ("seed", "n"), ("run", "wrap"), ("status", "wrap"), ("data", "")]
    runs = tag("div", table(head, rows), class_="tall")
    inside: list[Any] = [tag("details", tag("summary", f"{len(rows)} runs"), runs)]
    if found.left_out:
        out = table([("left out", ""), ("why", "wrap")], [[e.name, e.why] for e in found.left_out])
        inside.append(tag("details", tag("summary", f"{len(found.left_out)} left out"), tag("div", out, class_="tall")))
    inside.append(say("Made by ", tag("code", command)))
    return section("sources", "Sources", *inside)
