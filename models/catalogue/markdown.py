"""The catalogue as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from models.catalogue.collect import Kind, Registry
from models.catalogue.costs import Setting
from models.catalogue.limits import Refusal, grouped
from models.cost import Ops


def page(registries: Sequence[Registry], refusals: Sequence[Refusal], setting: Setting, command: str) -> str:
    """The whole catalogue. command: what made it."""
    return "\n".join(_lines(registries, refusals, setting, command)) + "\n"


def _lines(
    registries: Sequence[Registry], refusals: Sequence[Refusal], setting: Setting, command: str
) -> Iterator[str]:
    yield "# The catalogue of parts"
    yield ""
    yield f"{sum(len(r.kinds) for r in registries)} kinds of {len(registries)} sorts of parts. Made by `{command}`"
    yield "from the registries in `models/`; costs are per token of a forward pass at"
    yield f"{setting.words()}."
    yield ""
    yield from table(
        ("part", "kinds", "where"),
        [(f"[{r.name}](#{r.name})", len(r.kinds), ", ".join(where for where, _ in r.places)) for r in registries],
    )
    for registry in registries:
        yield ""
        yield f"## {registry.name}"
        yield ""
        yield from (f"- {where}: {clean(meaning)}" for where, meaning in registry.places)
        yield from _costs(registry)
        for kind in registry.kinds:
            yield from _kind(registry, kind)
    if refusals:
        yield ""
        yield "## What cannot stand together"
        yield ""
        yield "Each of the two is fine in the default model; every pair of kinds and switches was tried."
        yield ""
        rows = [(_ticked(ones), _ticked(others), clean(reason)) for ones, others, reason in grouped(refusals)]
        yield from table(("", "with", "because"), rows)
    counts = ", ".join(f"`{name}`" for name in Ops().counts())
    yield ""
    yield "## What the costs count"
    yield ""
    yield (
        f"A run's `cost.json` and a search's `cost:` take the same counts for a whole model: {counts}. "
        "`models/cost.py` says what each counts."
    )


def _costs(registry: Registry) -> Iterator[str]:
    if not registry.unit:
        return
    yield ""
    yield f"Cost of {registry.unit}:"
    yield ""
    head = ("kind", "parameters", *(name.replace("_", " ") for name in Ops().counts()))
    rows = [(k.name, number(k.parameters or 0), *(number(v) for v in counts(k))) for k in registry.kinds]
    yield from table(head, rows, right=True)


def _kind(registry: Registry, kind: Kind) -> Iterator[str]:
    yield ""
    yield f"### {registry.name}: {kind.name}"
    yield ""
    yield clean(kind.formula)
    for text in kind.text:
        yield ""
        yield clean(text)
    if kind.source:
        yield ""
        yield f"Source: {clean(kind.source)}"
    if kind.options:
        yield ""
        rows = [(f"`{o.name}`", clean(o.type), clean(o.default), clean(o.meaning)) for o in kind.options]
        yield from table(("option", "type", "default", "meaning"), rows)
    if kind.limits:
        yield ""
        yield "Refused:"
        yield ""
        yield from (f"- {clean(reason)}" for reason in kind.limits)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], right: bool = False) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("---" if i == 0 or not right else "---:" for i in range(len(head))) + "|"
    for row in rows:
        yield "| " + " | ".join(str(cell) for cell in row) + " |"


def clean(text: str) -> str:
    """Text in which Markdown reads no markup: formulas have stars, bars and underscores. `code` stays as it is."""
    pieces = text.split("`")
    return "`".join(piece if i % 2 else re.sub(r"([\\\\*_|<>])", r"\\\1", piece) for i, piece in enumerate(pieces))


def _ticked(words: Sequence[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def number(value: float) -> str:
    """Whole numbers in full, others to three places."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"


def counts(kind: Kind) -> tuple[float, ...]:
    return tuple((kind.ops or Ops()).counts().values())
