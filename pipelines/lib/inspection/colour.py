"""Colours for values in [0, 1], and coloured continuations and their tables of likely tokens on a terminal.

One scale for terminal, picture and page: dark ink on a background from red (0) over pale yellow to blue (1), which
people who cannot tell red from green tell apart too, and which shows on dark and light terminals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.lib.inspection.draws import MODES, Continuation, Token, ends_of_scale, values
from pipelines.lib.inspection.modes import Mode

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

STOPS = ((225, 87, 89), (247, 222, 160), (110, 160, 215))  # at 0, 0.5 and 1
INK = (24, 26, 30)


def rgb(value: float) -> tuple[int, int, int]:
    """The background of a value in [0, 1]; others are taken as the nearer end.

    >>> rgb(0), rgb(1), rgb(0.25)
    ((225, 87, 89), (110, 160, 215), (236, 154, 124))
    """
    at = min(1.0, max(0.0, value)) * (len(STOPS) - 1)
    i = min(int(at), len(STOPS) - 2)
    return tuple(round(a + (b - a) * (at - i)) for a, b in zip(STOPS[i], STOPS[i + 1], strict=True))  # type: ignore


def hex_of(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def modes_of(setting: Mode) -> tuple[str, ...]:
    """The modes that a setting asks for."""
    return () if setting == "none" else MODES if setting == "all" else (setting,)


def coloured(one: Continuation, mode: str, k: int) -> Text:
    """The continuation behind its prompt, as rich text."""
    from rich.style import Style
    from rich.text import Text

    out = Text().append(one.prompt, "dim")
    ink = hex_of(INK)
    for token, value in zip(one.tokens, values(one.tokens, mode, one.vocab, k), strict=True):
        out.append(token.text, None if value is None else Style(color=ink, bgcolor=hex_of(rgb(value))))
    return out


def legend(one: Continuation, mode: str, k: int) -> Text:
    """What the colours of a mode mean here: the scale between the words for its ends."""
    from rich.style import Style
    from rich.text import Text

    low, high = ends_of_scale(one.tokens, mode, one.vocab, k)
    out = Text(f"{mode}: {low} ")
    for i in range(12):
        out.append(" ", Style(bgcolor=hex_of(rgb(i / 11))))
    return out.append(f" {high}")


def table_of(tokens: Sequence[Token], k: int) -> Any:
    """A row per token: cross-entropy, rank, p, mass above it, the probability it was drawn with, the k best with p."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    table.add_column("step", justify="right")
    table.add_column("token", no_wrap=True)
    for name in ("nats", "rank", "p", "above", "drawn"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"the {k} most likely")
    for step, token in enumerate(tokens, 1):
        draw, best = token.draw, Text()
        for name, (id_, logprob, _) in list(zip(token.top, draw.top, strict=True))[:k]:
            best.append(f"{shown(name)}\u00a0{math.exp(logprob):.3f}", "bold reverse" if id_ == draw.id else "")
            best.append("  ")
        cells = (f"{-draw.logprob:.3f}", str(draw.rank), f"{math.exp(draw.logprob):.4f}", f"{draw.above:.4f}")
        table.add_row(str(step), Text(shown(token.name)), *cells, f"{draw.drawn:.4f}", best)
    return table


def shown(name: str) -> str:
    """A token's name where spaces and line breaks must be seen.

    >>> shown(" a\\n"), shown("")
    ('␣a↵', '∅')
    """
    marked = name.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in marked) or "∅"


def print_coloured(console: Console, one: Continuation, modes: Sequence[str], k: int, table: bool) -> None:
    """One continuation in each of the modes, then its table."""
    from rich.text import Text

    for mode in modes:
        console.print(legend(one, mode, k))
        console.print(coloured(one, mode, k), soft_wrap=True)
    if table:
        console.print(table_of(one.tokens, k))
    figures = one.figures()
    if figures:
        words = [f"{name.replace('_', '-')} {value:.3f}" for name, value in figures.items()]
        console.print(Text(f"mean {', '.join(words)} (nats, but for rank)", style="dim"))
