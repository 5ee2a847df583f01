"""The catalogue as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from models.catalogue.collect import Kind, Registry
from models.catalogue.costs import Setting
from models.catalogue.limits import Refusal, grouped
from models.catalogue.markdown import counts, number
from models.cost import Ops

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2a6fb0; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
nav { columns: 14rem; margin: 1rem 0 2rem; } nav a { display: block; }
a { color: var(--accent); text-decoration: none; }
h2 { margin-top: 3rem; border-bottom: 2px solid var(--line); } h3 { margin: 2rem 0 .3rem; }
.formula { font: 14px/1.5 ui-monospace, monospace; background: var(--soft); padding: .5rem .8rem; border-radius: 6px; }
.soft { opacity: .75; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; margin: .6rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.sort th { cursor: pointer; } .sort th::after { content: " ↕"; opacity: .4; }
code { background: var(--soft); padding: 0 .25em; border-radius: 3px; }
ul { margin: .3rem 0; padding-left: 1.2rem; }
"""
SCRIPT = """
for (const table of document.querySelectorAll("table.sort")) {
  table.querySelectorAll("th").forEach((head, i) => head.addEventListener("click", () => {
    const up = head.dataset.up !== "1"; head.dataset.up = up ? "1" : "0";
    const value = row => { const c = row.cells[i]; return c.dataset.v === undefined ? c.textContent : +c.dataset.v; };
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      return (typeof x === "number" ? x - y : x.localeCompare(y)) * (up ? 1 : -1);
    });
    table.tBodies[0].append(...rows);
  }));
}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(registries: Sequence[Registry], refusals: Sequence[Refusal], setting: Setting, command: str) -> str:
    """The whole catalogue. command: what made it."""
    return "".join(_parts(registries, refusals, setting, command))


def _parts(
    registries: Sequence[Registry], refusals: Sequence[Refusal], setting: Setting, command: str
) -> Iterator[str]:
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield '<meta name="viewport" content="width=device-width"><title>Catalogue of parts</title>'
    yield f"<style>{STYLE}</style></head><body><h1>The catalogue of parts</h1>"
    total = sum(len(r.kinds) for r in registries)
    yield (
        f"<p>{total} kinds of {len(registries)} sorts of parts, read from the registries by "
        f"<code>{escape(command)}</code>. "
        f"Costs are per token of a forward pass at {escape(setting.words())}. Click a column's head to sort by it.</p>"
    )
    links = [f'<a href="#{r.name}">{r.name} ({len(r.kinds)})</a>' for r in registries]
    yield f"<nav>{''.join(links)}{'<a href=#together>what cannot stand together</a>' if refusals else ''}</nav>"
    for registry in registries:
        yield f'<h2 id="{registry.name}">{registry.name}</h2>'
        items = (f"<li>{ticked(where)}: {ticked(meaning)}</li>" for where, meaning in registry.places)
        yield f"<ul>{''.join(items)}</ul>"
        yield _costs(registry)
        yield from (_kind(registry, kind) for kind in registry.kinds)
    if refusals:
        rows = [
            f"<tr><td>{_codes(ones)}</td><td>{_codes(others)}</td><td>{ticked(reason)}</td></tr>"
            for ones, others, reason in grouped(refusals)
        ]
        yield '<h2 id="together">What cannot stand together</h2>'
        yield "<p>Each of the two is fine in the default model; every pair of kinds and switches was tried.</p>"
        head = "<thead><tr><th></th><th>with</th><th>because</th></tr></thead>"
        yield f'<table class="sort">{head}<tbody>{"".join(rows)}</tbody></table>'
    yield f"<script>{SCRIPT}</script></body></html>\n"


def _codes(words: Sequence[str]) -> str:
    return ", ".join(f"<code>{escape(word)}</code>" for word in words)


def ticked(text: str) -> str:
    """Markdown's backticks as code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def _costs(registry: Registry) -> str:
    if not registry.unit:
        return ""
    head = "".join(f'<th class="n">{name.replace("_", " ")}</th>' for name in ("parameters", *Ops().counts()))
    rows = []
    for kind in registry.kinds:
        figures = ((kind.parameters or 0), *counts(kind))
        cells = "".join(f'<td class="n" data-v="{v}">{number(v)}</td>' for v in figures)
        rows.append(f'<tr><td><a href="#{registry.name}.{kind.name}">{kind.name}</a></td>{cells}</tr>')
    return (
        f'<p>Cost of {escape(registry.unit)}:</p><div class="scroll"><table class="sort">'
        f"<thead><tr><th>kind</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _kind(registry: Registry, kind: Kind) -> str:
    parts = [f'<h3 id="{registry.name}.{kind.name}">{registry.name}: {kind.name}</h3>']
    parts.append(f'<p class="formula">{escape(kind.formula)}</p>')
    parts += [f"<p>{ticked(text)}</p>" for text in kind.text]
    parts += [f'<p class="soft">Source: {escape(kind.source)}</p>'] if kind.source else []
    if kind.options:
        rows = "".join(
            f"<tr><td><code>{o.name}</code></td><td>{escape(o.type)}</td><td>{escape(o.default)}</td>"
            f"<td>{ticked(o.meaning)}</td></tr>"
            for o in kind.options
        )
        head = "<tr><th>option</th><th>type</th><th>default</th><th>meaning</th></tr>"
        parts.append(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>")
    if kind.limits:
        items = "".join(f"<li>{ticked(reason)}</li>" for reason in kind.limits)
        parts.append(f"<p>Refused:</p><ul>{items}</ul>")
    return "".join(parts)
