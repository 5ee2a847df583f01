"""One HTML file that needs nothing else: style, plotly.js, data and text, and a policy that forbids it the network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.lib.jsonl import finite

HERE = Path(__file__).resolve().parent
POLICY = (  # plotly's parallel coordinates compile their drawing code, hence unsafe-eval
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; "
    "img-src data: blob:; font-src data:"
)


class Safe(str):
    """Text that is HTML already."""


def text(value: Any) -> Safe:
    """Any value as HTML text."""
    return value if isinstance(value, Safe) else Safe(html.escape(str(value)))


def tag(name: str, *inside: Any, **attributes: Any) -> Safe:
    """`<name attributes>inside</name>`, everything escaped that is not HTML already. `class_` is class."""
    given = "".join(
        f' {k.rstrip("_").replace("_", "-")}="{html.escape(str(v), quote=True)}"'
        for k, v in attributes.items()
        if v is not None
    )
    return Safe(f"<{name}{given}>{''.join(text(part) for part in inside)}</{name}>")


def join(parts: Sequence[Any], between: str = "") -> Safe:
    return Safe(html.escape(between).join(text(p) for p in parts))


def table(head: Sequence[tuple[str, str]], rows: Sequence[Sequence[Any]], **attributes: Any) -> Safe:
    """head: (name, class) per column; class `n` is a column of numbers. A cell may be a `td` already."""
    top = tag("tr", *(tag("th", name, class_=kind or None) for name, kind in head))
    body = [
        tag(
            "tr",
            *(
                cell if isinstance(cell, Safe) and cell.startswith("<td") else tag("td", cell, class_=kind or None)
                for cell, (_, kind) in zip(row, head, strict=True)
            ),
        )
        for row in rows
    ]
    return tag("div", tag("table", tag("thead", top), tag("tbody", *body), **attributes), class_="scroll")


def plot(id_: str) -> Safe:
    return tag("div", id=id_, class_="plot")


def buttons(key: str, choices: Sequence[tuple[str, str]], chosen: int = 0) -> Safe:
    """A row of buttons that set one state of the plots. choices: (value, name)."""
    return tag(
        "span",
        *(
            tag("button", name, type="button", data_key=key, data_value=value, aria_pressed=str(i == chosen).lower())
            for i, (value, name) in enumerate(choices)
        ),
    )


def section(name: str, title: str, *inside: Any) -> Safe:
    return tag("section", tag("h2", title), *inside, id=name)


def say(*inside: Any) -> Safe:
    return tag("p", *inside, class_="say")


def in_script(tree: Any) -> str:
    """Plain data as JSON that may stand inside <script>: no NaN, and nothing that could end the element."""
    out = json.dumps(finite(tree), allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return out.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def document(title: str, body: Sequence[Safe], plots: Mapping[str, Any]) -> str:
    """A page with plotly. plots: id of a place -> what page.js draws there."""
    from plotly.offline import get_plotlyjs

    return page(title, body, {"plots": plots}, (get_plotlyjs(), (HERE / "page.js").read_text(encoding="utf-8")))


def page(title: str, body: Sequence[Safe], data: Any, scripts: Sequence[str] = (), style: str = "") -> str:
    """The whole file. data: for the scripts, as JSON in #page-data.  style: CSS behind the house's own."""
    own = (HERE / "page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{own}{style}</style>",
            "</head>",
            "<body>",
            tag("main", *body),
            f'<script type="application/json" id="page-data">{in_script(data)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )
