"""Every part that a model can be built from: formula, options, limits, source, and hardware cost per token.

    python -m models.catalogue                          how many kinds of each sort there are
    python -m models.catalogue --kind softmax           one sort, with its costs
    python -m models.catalogue --out catalogue.html     everything as a page, or as .md

The registries are the only source: a part of your own is in it once its module is named in NOVELLA_IMPORTS.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.command import Parser
from models.spec import ConfigError

if TYPE_CHECKING:
    from models.catalogue.collect import Registry
    from models.catalogue.costs import Setting

SIZES = {  # flag -> what it means; Setting has the defaults
    "d_model": "width of the residual stream",
    "heads": "attention heads",
    "layers": "blocks",
    "context": "tokens that a query looks back on",
    "vocab": "tokens in the vocabulary",
}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "python -m models.catalogue", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="a page: FILE.html or FILE.md; left out: the terminal")
    parser.add_argument("--kind", metavar="SORT", help="one sort of part only: norm, attention, softmax, ...")
    for name, meaning in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=meaning)
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ConfigError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


def run(args: Any) -> None:
    """Raises ConfigError for what cannot be."""
    from models.catalogue.collect import collect
    from models.catalogue.costs import Setting

    given = {name: value for name in SIZES if (value := getattr(args, name)) is not None}
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
    setting = Setting(**given)
    if args.out is None:
        show(collect(setting, args.kind, with_limits=False), setting, detailed=args.kind is not None)
        return
    args.out.write_text(text(args.out.suffix, setting, args.kind))
    print(f"{args.out}: {args.out.stat().st_size / 1024:.0f} KiB")


def text(suffix: str, setting: Setting, kind: str | None = None) -> str:
    """The catalogue as the file of that suffix holds it. Raises ConfigError for another suffix."""
    from models.catalogue import html, markdown
    from models.catalogue.collect import collect
    from models.catalogue.costs import Setting
    from models.catalogue.limits import combinations

    writers = {".md": markdown.page, ".html": html.page}
    if suffix not in writers:
        raise ConfigError(f"--out: a name that ends in .md or .html is needed, not {suffix or 'none'}")
    words = [f"--kind {kind}"] if kind else []
    usual = Setting()
    changed = [(name, getattr(setting, name)) for name in SIZES if getattr(setting, name) != getattr(usual, name)]
    words += [f"--{name.replace('_', '-')} {value}" for name, value in changed]
    command = " ".join(["python -m models.catalogue", *words])
    refusals = [] if kind else combinations(setting.spec())
    return writers[suffix](collect(setting, kind), refusals, setting, command)


def show(registries: list[Registry], setting: Setting, detailed: bool) -> None:
    """Tables on the terminal."""
    from rich.console import Console
    from rich.table import Table

    from models.catalogue.markdown import counts, number
    from models.cost import Ops

    console = Console()
    if not detailed:
        table = Table("part", "kinds", "names", box=None)
        for r in registries:
            table.add_row(r.name, str(len(r.kinds)), ", ".join(k.name for k in r.kinds))
        console.print(table)
        console.print(
            f"{sum(len(r.kinds) for r in registries)} kinds; --kind SORT for one sort, --out FILE.html for all"
        )
        return
    for r in registries:
        console.print(f"{r.name}: {len(r.kinds)} kinds, at {', '.join(where for where, _ in r.places)}", markup=False)
        for kind in r.kinds:
            console.print(f"  {kind.name:20} {kind.formula}", markup=False, highlight=False)
        if r.unit:
            table = Table("kind", box=None, title=f"cost of {r.unit}, at {setting.words()}", title_justify="left")
            for name in ("parameters", *Ops().counts()):
                table.add_column(name.replace("_", " "), justify="right", overflow="fold")
            for kind in r.kinds:
                table.add_row(kind.name, *(number(v) for v in (kind.parameters or 0, *counts(kind))))
            console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
