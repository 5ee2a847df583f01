"""The conformance suite of models/check.py as a command: `python -m pipelines.evaluate check WHAT`."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Literal

from models.spec import near
from pipelines.lib.config import InputError


@dataclass(frozen=True)
class CheckConfig:
    """Run the conformance suite: everything that every model family promises, in float64.

    model: a family (all its presets and parts, small), a preset, a recipe, a run, or a Hugging Face folder of ours
    which: the checkpoint of a run: best, last or step_N
    only: checks whose name contains this
    backend: of torch.compile; inductor runs the real compiler (slow)
    full: presets and recipes at their real size instead of a small one
    """

    model: str
    which: str = "best"
    only: str | None = None
    backend: Literal["eager", "aot_eager", "inductor"] = "eager"
    full: bool = False


def subjects(config: CheckConfig) -> dict[str, Any]:
    """{name: function that makes the model} of what `model` names. Raises InputError or ConfigError."""
    import torch

    from models.check import shrunk, variants
    from models.families import Family, create
    from models.gpt.presets import PRESETS
    from models.lm import LM
    from models.spec import build
    from pipelines.lib.config import RECIPES, recipe
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.model_folder import open_folder
    from pipelines.lib.run import resolve

    def maker(spec: Any) -> Any:
        def make() -> LM:
            torch.manual_seed(0)
            return create(spec)

        return make

    name = config.model
    if name in Family.kinds:
        specs = {k: s for k, s in variants().items() if isinstance(s, Family.kinds[name])}
        return {k: maker(s) for k, s in specs.items()}
    if name in PRESETS:
        return {name: maker(PRESETS[name]() if config.full else shrunk(PRESETS[name]()))}
    path = storage_path(name)
    if path.is_dir():
        folder = resolve(path, config.which)
        model = open_folder(folder)
        if not isinstance(model, LM):
            raise InputError(f"{folder}: a {type(model).__name__} of transformers; the suite is for our own families")
        return {str(name): lambda: open_folder(folder)}
    recipes = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    if not path.is_file() and name not in recipes:
        known = [*Family.kinds, *PRESETS, *recipes]
        raise InputError(f"check {name}: no family, preset, recipe or folder of this name{near(name, known)}")
    tree = recipe(path if path.is_file() else name).get("model")
    if tree is None:
        raise InputError(f"check {name}: this recipe has no `model`; recipes of pipelines.train have one")
    spec = build(Family, tree, "model")
    if spec.vocab_size is None:
        spec = dataclasses.replace(spec, vocab_size=64)
    return {name: maker(spec if config.full else small(spec, shrunk))}


def small(spec: Any, shrunk: Any) -> Any:
    """A spec at test size; as it is, where its layers differ and so cannot be made smaller together."""
    try:
        return shrunk(spec)
    except AssertionError:
        return spec


def run_check(config: CheckConfig) -> int:
    """Every check on every subject, as a table. Returns 1 if a promise does not hold, else 0."""
    from rich import box
    from rich.table import Table
    from transformers.utils.logging import disable_progress_bar

    from models.check import CHECKS, conformance
    from pipelines.lib.progress import Progress
    from pipelines.lib.terminal import print_table

    disable_progress_bar()  # of saving and loading, which the checks do often
    chosen = [name for name in CHECKS if config.only is None or config.only in name]
    if not chosen:
        raise InputError(f"only={config.only}: no such check{near(config.only, CHECKS)}")
    makers = subjects(config)
    began = time.perf_counter()
    outcomes: dict[str, list[Any]] = {}
    with Progress(len(makers) * len(chosen), "checks", f"check {config.model}") as progress:
        done = 0
        for name, make in makers.items():
            outcomes[name] = []
            for check in chosen:
                outcomes[name] += [r for r in conformance(make, config.backend, check) if r.name == check]
                done += 1
                progress.update(done, on=name)
    table = Table(box=box.SIMPLE)
    for column in ("model", "check", "", "figures"):
        table.add_column(column, overflow="fold")
    several = len(outcomes) > 1
    for name, results in outcomes.items():
        failed = [r for r in results if not r.ok]
        if several:
            table.add_row(name, f"{len(results) - len(failed)} of {len(results)} hold", "FAIL" if failed else "ok", "")
        for i, r in enumerate(failed if several else results):
            table.add_row("" if several or i else name, r.name, "ok" if r.ok else "FAIL", r.detail)
    print_table(table)
    failures = sum(not r.ok for results in outcomes.values() for r in results)
    total = sum(len(results) for results in outcomes.values())
    print(f"{total - failures} of {total} checks hold on {len(outcomes)} model(s), {time.perf_counter() - began:.1f} s")
    return 1 if failures else 0
