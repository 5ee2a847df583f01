"""Small charts as SVG text: lines, a grid of cells, a histogram. They need no script; the pointer shows the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.lib.comparison.html import Safe, tag, text

COLOURS = ("var(--accent)", "#d9822b")  # of the first and the second model
WIDTH, HEIGHT = 430, 215
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 38
LETTER = 7.5  # width of one, at most on average over a name, in the 12 px of the page's style
LARGEST_POINTS = 48  # points of a line that get a dot each


@dataclass(frozen=True)
class Line:
    """One line: its name, its points (a y that is not finite is a gap), colour and strength."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str = COLOURS[0]
    opacity: float = 1.0
    dashed: bool = False


def number(x: float) -> str:
    """Four digits, without an exponent where that is short.

    >>> number(0.00001234), number(1234567), number(2.0)
    ('1.234e-05', '1.235e+06', '2')
    """
    return f"{x:.4g}" if math.isfinite(x) else "not finite"


def scale(values: Sequence[float], log: bool, low: float, high: float) -> tuple[Callable[[float], float], list[float]]:
    """From a value to a place between two ends, and the ticks. log: values that are not above 0 have no place."""
    good = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
    a, b = min(good), max(good)
    if log:
        a, b = math.log10(a), math.log10(b)
    if b - a < 1e-12 * max(1.0, abs(a)):
        a, b = a - 0.5, b + 0.5
    pad = 0.04 * (b - a)
    a, b = a - pad, b + pad

    def place(v: float) -> float:
        return low + (high - low) * ((math.log10(v) if log else v) - a) / (b - a)

    return place, ticks(a, b, log)


def ticks(a: float, b: float, log: bool) -> list[float]:
    """Round numbers between two ends. log: the ends are exponents of ten; the numbers are 1, 2 and 5 times such."""
    if log:
        every = [m * 10.0**e for e in range(math.floor(a), math.ceil(b) + 1) for m in (1, 2, 5)]
        few = [v for v in every if a <= math.log10(v) <= b]
        if len(few) > 6:
            step = max(1, math.ceil((b - a) / 6))
            few = [10.0**e for e in range(math.ceil(a), math.floor(b) + 1) if e % step == 0]
        return few if len(few) > 1 else ticks(10**a, 10**b, False)
    step = 10 ** math.floor(math.log10((b - a) / 3))
    step = next(step * m for m in (1, 2, 5, 10) if (b - a) / (step * m) <= 5)
    return [float(f"{i * step:.9g}") for i in range(math.ceil(a / step), math.floor(b / step) + 1)]


def lines(
    title: str,
    series: Sequence[Line],
    x_name: str,
    log_x: bool = False,
    log_y: bool = False,
    names: Sequence[str] = (),
) -> Safe:
    """A line chart. names: of the whole numbers on the x axis, which then has no other marks."""
    xs = [x for line in series for x in line.xs]
    ys = [y for line in series for y in line.ys]
    x_at, x_ticks = scale(xs, log_x, LEFT, WIDTH - RIGHT)
    y_at, y_ticks = scale(ys, log_y, HEIGHT - BOTTOM, TOP)
    parts = []
    for v in y_ticks:
        y = y_at(v)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", stroke="var(--grid)"))
        parts.append(tag("text", number(v), x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    if names:
        every = max(1, math.ceil(sum(map(len, names)) / 32))
        marks = [(float(i), name) for i, name in enumerate(names) if i % every == 0 or i == len(names) - 1]
    else:
        marks = [(v, number(v)) for v in x_ticks]
    for v, name in marks:
        half = LETTER * len(name) / 2  # the first and the last name move inwards, where they would be cut off
        x = min(max(x_at(v), half), WIDTH - half)
        parts.append(tag("text", name, x=f"{x:.1f}", y=HEIGHT - BOTTOM + 15, text_anchor="middle"))
    parts.append(tag("text", x_name, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, text_anchor="middle"))
    for line in series:
        parts += drawn(line, x_at, y_at, log_x, log_y, names)
    picture = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="chart", role="img")
    return tag("figure", tag("figcaption", title), picture, legend(series))


def drawn(
    line: Line,
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
    log_x: bool,
    log_y: bool,
    names: Sequence[str],
) -> list[Safe]:
    """The pieces of a line between its gaps, and a dot for each point if they are few."""
    pieces: list[list[tuple[float, float, float, float]]] = [[]]
    for x, y in zip(line.xs, line.ys, strict=True):
        if math.isfinite(y) and (y > 0 or not log_y) and (x > 0 or not log_x):
            pieces[-1].append((x_at(x), y_at(y), x, y))
        elif pieces[-1]:
            pieces.append([])
    style = {"stroke": line.colour, "stroke_opacity": f"{line.opacity:.2f}", "fill": "none", "stroke_width": 1.6}
    if line.dashed:
        style["stroke_dasharray"] = "5 4"
    out = []
    for piece in pieces:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in piece)
        out.append(tag("polyline", tag("title", line.name), points=points, **style))
        if len(line.xs) <= LARGEST_POINTS and not line.dashed:
            for px, py, x, y in piece:
                where = names[int(x)] if names else number(x)
                words = tag("title", f"{line.name} {where}: {number(y)}".strip())
                out.append(tag("circle", words, cx=f"{px:.1f}", cy=f"{py:.1f}", r=3, fill=line.colour))
    return out


def legend(series: Sequence[Line]) -> Safe:
    named = [line for line in series if line.name and not line.dashed]
    if len(named) < 2 or len(named) > 12:
        return Safe("")
    keys = [
        tag("span", tag("i", style=f"background:{line.colour};opacity:{line.opacity:.2f}"), line.name) for line in named
    ]
    return tag("div", *keys, class_="keys")


def shade(value: float) -> str:
    """Of a share between 0 and 1: from the page's own colour to the accent's."""
    return f"color-mix(in srgb, var(--accent) {100 * min(1.0, max(0.0, value)):.0f}%, var(--grid))"


def grid(title: str, rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[tuple[float, str]]]) -> Safe:
    """Cells with a share between 0 and 1 and the words that the pointer shows."""
    size, left, top = 22, 62, 22
    width, height = left + size * len(columns) + 8, top + size * len(rows) + 8
    parts = [
        tag("text", name, x=left + size * (j + 0.5), y=top - 7, text_anchor="middle") for j, name in enumerate(columns)
    ]
    for i, (name, row) in enumerate(zip(rows, cells, strict=True)):
        parts.append(tag("text", name, x=left - 7, y=top + size * (i + 0.65), text_anchor="end"))
        for j, (value, words) in enumerate(row):
            if math.isfinite(value):
                box = {"x": left + size * j, "y": top + size * i, "width": size - 2, "height": size - 2, "rx": 3}
                parts.append(tag("rect", tag("title", words), style=f"fill:{shade(value)}", **box))
    style = f"width:{min(width * 1.15, 560):.0f}px;max-width:100%"
    picture = tag("svg", *parts, viewBox=f"0 0 {width} {height}", class_="chart", role="img", style=style)
    return tag("figure", tag("figcaption", title), picture)


def histogram(counts: Sequence[int], words: str, colour: str = COLOURS[0]) -> Safe:
    """A small histogram for a table's cell."""
    if not counts:
        return text("")
    width, height, most = 120, 24, max(counts) or 1
    step = width / len(counts)
    path = f"M0,{height}" + "".join(
        f"L{i * step:.1f},{height - height * c / most:.1f}L{(i + 1) * step:.1f},{height - height * c / most:.1f}"
        for i, c in enumerate(counts)
    )
    shape = tag("path", tag("title", words), d=f"{path}L{width},{height}Z", style=f"fill:{colour}")
    return tag("svg", shape, viewBox=f"0 0 {width} {height}", class_="small", width=width, height=height)
