"""Coloured continuations, heatmaps and bar charts of token probabilities as PNG, drawn without a display."""

from __future__ import annotations

import contextlib
import math
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.lib.config import InputError
from pipelines.lib.inspection.colour import INK, rgb, shown
from pipelines.lib.inspection.draws import Continuation, Token, ends_of_scale, values

COLUMNS = 100  # characters in a line of a picture of text
SMALLER = 0.82  # a heading's letters, of the text's
BAND = 32  # steps in one band of a heatmap
CAPTION = 10  # tokens below a bar chart
TALLEST = 30_000  # pixels; matplotlib draws no picture of 2^16 or more
DPI = 110
# The first of these that are installed: DejaVu comes with matplotlib, the others hold what it lacks.
FONTS = ("DejaVu Sans Mono", "Noto Sans Mono CJK SC", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Noto Emoji")


@cache
def fonts() -> list[str]:
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in FONTS if name in there]


@contextlib.contextmanager
def figure(width: float, height: float, path: Path, setting: str) -> Iterator[Any]:
    """A figure in inches that is written to `path` at the end. Raises InputError, naming the setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if height * DPI > TALLEST:
        raise InputError(
            f"{setting}: the picture would be {height * DPI:,.0f} pixels high; take fewer samples, tokens or modes, "
            "or page= instead"
        )
    out = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(out)
    yield out
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a script that no font here has
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            out.savefig(path)
        except OSError as error:
            raise InputError(f"{setting}: {error.strerror}") from None


def cells(character: str) -> int:
    """Columns that a character takes on a grid of a fixed-width font."""
    return 2 if unicodedata.east_asian_width(character) in "WF" else 0 if unicodedata.combining(character) else 1


def laid_out(pieces: Sequence[tuple[str, Any]], columns: int = COLUMNS) -> tuple[list[tuple[int, int, str, Any]], int]:
    """(line, column, text, mark) of pieces of text on a grid, broken where a line is full, and how many lines.

    A line break is shown as ↵ at the end of its line.
    """
    out: list[tuple[int, int, str, Any]] = []
    line = column = 0
    for text, mark in pieces:
        run, start = "", column
        for c in text:
            breaks = c == "\n"
            c = "↵" if breaks else c if c.isprintable() else "·"
            if column + cells(c) > columns:
                out.append((line, start, run, mark))
                line, column, run, start = line + 1, 0, "", 0
            run, column = run + c, column + cells(c)
            if breaks:
                out.append((line, start, run, mark))
                line, column, run, start = line + 1, 0, "", 0
        if run:
            out.append((line, start, run, mark))
    return out, line + 1


def coloured_picture(all_: Sequence[Continuation], modes: Sequence[str], k: int, path: Path) -> None:
    """Every continuation in every mode, below each other, into one PNG."""
    blocks, lines, columns = [], 0.0, 60
    for one in all_:
        for mode in modes:
            marks = [(t.text, v) for t, v in zip(one.tokens, values(one.tokens, mode, one.vocab, k), strict=True)]
            runs, n = laid_out([(one.prompt, "prompt"), *marks])
            blocks.append((lines, one, mode, runs))
            lines += n + 2.6
            head = len(one.title()) + len(mode) + sum(map(len, ends_of_scale(one.tokens, mode, one.vocab, k))) + 6
            columns = max(columns, round(SMALLER * head) + 15, *(at + sum(map(cells, text)) for _, at, text, _ in runs))
    line_in, column_in = 0.19, 0.092
    with figure(columns * column_in + 0.4, (lines + 0.5) * line_in, path, f"picture={path}") as fig:
        ax = fig.add_axes((0, 0, 1, 1))
        ax.set(xlim=(-2, columns + 2), ylim=(lines, -0.5))
        ax.axis("off")
        size = 72 * column_in / 0.602  # of DejaVu Sans Mono, whose characters are 0.602 of it wide
        for top, one, mode, runs in blocks:
            low, high = ends_of_scale(one.tokens, mode, one.vocab, k)
            title = f"{mode}   {one.title()}   "
            put(ax, 0, top + 0.5, title, size * SMALLER, "#656a73")
            at = len(title) * SMALLER
            put(ax, at, top + 0.5, low, size * SMALLER, "#656a73")
            at += len(low) * SMALLER + 1
            for i in range(24):
                box(ax, at + i * 0.5, top + 0.1, 0.52, 0.8, rgb(i / 23))
            put(ax, at + 13, top + 0.5, high, size * SMALLER, "#656a73")
            for line, column, text, mark in runs:
                y = top + 1.4 + line
                if isinstance(mark, float):
                    box(ax, column, y, sum(map(cells, text)), 1, rgb(mark))
                put(ax, column, y + 0.5, text, size, "#8a8f98" if mark == "prompt" else hex_ink())


def heatmap(one: Continuation, k: int, path: Path) -> None:
    """Steps from left to right, the k most likely tokens of each from top to bottom, coloured by p; the drawn framed.

    A token that was drawn though it is not among them stands below, behind a gap.
    """
    from matplotlib.patches import Rectangle

    bands = [one.tokens[i : i + BAND] for i in range(0, len(one.tokens), BAND)]
    rows = k + 1.5  # of a band, with the row below the gap
    cell_w, cell_h = 0.62, 0.22
    height = max(1, len(bands)) * (rows + 1.6) * cell_h + 0.7
    with figure(min(BAND, max(8, len(one.tokens))) * cell_w + 0.8, height, path, f"charts={path.parent}") as fig:
        ax = fig.add_axes((0, 0, 1, 1))
        width = fig.get_size_inches()[0] / cell_w
        ax.set(xlim=(-0.8, width - 0.8), ylim=(height / cell_h - 2.2, -2.2))
        ax.axis("off")
        put(ax, -0.5, -1.6, f"p of the {k} most likely tokens at each step; the drawn one framed", 9, "#1b1d21")
        put(ax, -0.5, -0.85, one.title(), 8, "#656a73")
        for b, band in enumerate(bands):
            top = b * (rows + 1.6)
            for i, token in enumerate(band):
                put(ax, i + 0.5, top - 0.25, str(b * BAND + i + 1), 5.5, "#8a8f98", "center")
                for j, (name, p, _, drawn) in enumerate(candidates(token, k)):
                    y = top + j + (0.4 if j >= k else 0)
                    box(ax, i, y, 1, 1, shade(p))
                    put(ax, i + 0.5, y + 0.5, cut(shown(name), 7), 6, "#ffffff" if p > 0.55 else hex_ink(), "center")
                    if drawn:
                        ax.add_patch(Rectangle((i, y), 1, 1, fill=False, edgecolor="#c0392b", linewidth=1.6, zorder=4))


def bars(one: Continuation, step: int, k: int, path: Path) -> None:
    """One step: p of the k most likely tokens, what was left of it to draw from as an outline, the drawn one framed."""
    token = one.tokens[step]
    rows = candidates(token, k)
    with figure(6.4, 0.24 * len(rows) + 1.15, path, f"charts={path.parent}") as fig:
        ax = fig.add_axes((0.2, 0.62 / fig.get_size_inches()[1], 0.74, 1 - 1.1 / fig.get_size_inches()[1]))
        names = [shown(name) for name, *_ in rows]
        ax.barh(range(len(rows)), [p for _, p, _, _ in rows], color="#6ea0d7", height=0.72)
        ax.barh(range(len(rows)), [q for _, _, q, _ in rows], fill=False, edgecolor="#1b1d21", height=0.72, lw=0.9)
        for i, (_, p, q, drawn) in enumerate(rows):
            put(ax, max(p, q) + 0.01, i, f"{p:.3f}", 7, "#656a73")
            if drawn:
                ax.barh(i, max(p, q), fill=False, edgecolor="#c0392b", height=0.9, lw=2)
        ax.set(xlim=(0, 1.12), ylim=(len(rows) - 0.4, -0.6))
        ax.set_yticks(range(len(rows)), names, family=fonts(), fontsize=8, parse_math=False)
        ax.tick_params(axis="x", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(
            f"step {step + 1}: {shown(token.name)}, {one.title()}", fontsize=8, family=fonts(), parse_math=False
        )
        last = "".join(shown(t.name) for t in one.tokens[max(0, step - CAPTION) : step]) or shown(one.prompt[-40:])
        fig.text(0.02, 0.02, f"after … {last}", fontsize=7.5, family=fonts(), color="#656a73", parse_math=False)


def logits(one: Continuation, path: Path) -> None:
    """The raw logit of every token that was drawn, over the steps."""
    with figure(9, 2.8, path, f"charts={path.parent}") as fig:
        ax = fig.add_axes((0.07, 0.17, 0.91, 0.7))
        steps = range(1, len(one.tokens) + 1)
        ax.plot(steps, [t.draw.logit for t in one.tokens], marker="o", ms=2.5, lw=1, color="#2f5fd0")
        ax.set_xlabel("step", fontsize=8)
        ax.set_title(f"raw logit of the drawn token, {one.title()}", fontsize=9)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)


def charts(all_: Sequence[Continuation], kinds: Sequence[str], k: int, folder: Path) -> list[Path]:
    """The charts of every continuation: in the folder itself if there is one only, else numbered folders in it."""
    made = []
    for i, one in enumerate(all_, 1):
        here = folder if len(all_) == 1 else folder / f"{i:03d}"
        if "heatmap" in kinds:
            heatmap(one, k, here / "heatmap.png")
            made.append(here / "heatmap.png")
        if "logits" in kinds:
            logits(one, here / "logits.png")
            made.append(here / "logits.png")
        if "bars" in kinds:
            for step in range(len(one.tokens)):
                bars(one, step, k, here / f"step_{step + 1:04d}.png")
                made.append(here / f"step_{step + 1:04d}.png")
    return made


def candidates(token: Token, k: int) -> list[tuple[str, float, float, bool]]:
    """(name, p, q, whether it was drawn) of the k most likely tokens, then the drawn one if it is not among them."""
    draw = token.draw
    rows = [
        (name, math.exp(logprob), q, id_ == draw.id)
        for name, (id_, logprob, q) in list(zip(token.top, draw.top, strict=True))[:k]
    ]
    if not any(drawn for *_, drawn in rows):
        rows.append((token.name, math.exp(draw.logprob), draw.drawn, True))
    return rows


def shade(p: float) -> tuple[int, int, int]:
    """White at 0, dark blue at 1, by the root, so that one in a hundred is seen."""
    strength = math.sqrt(min(1.0, max(0.0, p)))
    return tuple(round(a + (b - a) * strength) for a, b in zip((250, 250, 248), (31, 78, 150), strict=True))  # type: ignore


def cut(name: str, n: int) -> str:
    return name if len(name) <= n else name[: n - 1] + "…"


def hex_ink() -> str:
    return "#{:02x}{:02x}{:02x}".format(*INK)


def put(ax: Any, x: float, y: float, text: str, size: float, colour: str, align: str = "left") -> None:
    """Text at a place; a $ in it is no formula."""
    ax.text(x, y, text, fontsize=size, color=colour, ha=align, va="center", family=fonts(), parse_math=False, zorder=3)


def box(ax: Any, x: float, y: float, width: float, height: float, colour: tuple[int, int, int]) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x, y), width, height, color=[c / 255 for c in colour], linewidth=0, zorder=2))
