"""The conformance suite of models/check as a command.

python -m pipelines.evaluate check gpt                           every preset, part and switch of a family, small
python -m pipelines.evaluate check gpt model.norm=rmsnorm        one small model with this part, and every option of it
python -m pipelines.evaluate check runs/demo                     a trained model
NOVELLA_IMPORTS=my.norms python -m pipelines.evaluate check gpt model.norm=mine       a part of your own

A part of your own is a frozen dataclass in a registry (`Norm.kinds["mine"] = Mine` in a module of yours that
NOVELLA_IMPORTS names): its parameters and operations are held against its formulas, memory against full passes, float32
and bfloat16 against float64, and each of its options must have an effect.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from models.spec import near
from pipelines.lib.config import InputError


@dataclass(frozen=True)
class CheckConfig:
    """Run the conformance suite: everything that every model family promises, in float64.

    model: a family (all its presets and parts, small), a preset, a recipe, a run, or a Hugging Face folder of ours
    changes: settings laid over the model, which may stand as they are: model.norm=mine model.attention.window=8. Laid
        over a family they make one small model
    which: the checkpoint of a run: best, last or step_N
    only: checks whose name contains this
    backend: of torch.compile; inductor runs the real compiler (slow)
    full: presets and recipes at their real size instead of a small one
    """

    model: str
    changes: tuple[str, ...] = ()
    which: str = "best"
    only: str | None = None
    backend: Literal["eager", "aot_eager", "inductor"] = "eager"
    full: bool = False


class Subject(NamedTuple):
    """make: gives the model.  focus: the config field that it is about, None: all.  first: whether all are run."""

    make: Any
    focus: str | None = None
    first: bool = True


def words(given: Sequence[str]) -> list[str]:
    """`model.norm=mine` on the command line is a change laid over the model."""
    return [f"changes={word}" if word.startswith("model.") and "=" in word else word for word in given]


def changed(spec: Any, changes: Sequence[str]) -> tuple[Any, str | None]:
    """A spec with settings such as `model.norm.eps=1e-3` laid over it, and the field that all of them are about.

    A part that is named alone has the options of its small form. Raises InputError or ConfigError.
    """
    from models.check.variants import small
    from models.families import Family
    from models.spec import build, fields, part_of, plain
    from pipelines.lib.config import defaults_under, override, scalar

    cls: Any = type(spec)
    tree = plain(spec)
    for change in changes:
        key, given, value = change.removeprefix("model.").partition("=")
        if not given:
            raise InputError(f"changes={change}: a setting is needed, such as model.norm=rmsnorm")
        new = scalar(value)
        base = part_of(fields(cls)[key][0]) if key in fields(cls) else None
        if base is not None and isinstance(new, str) and new in base.kinds:
            new = plain(small(base.kinds[new]))
            tree = {**tree, key: new}
        else:
            tree = override(tree, key, new)
    tops = {change.removeprefix("model.").partition("=")[0].split(".")[0] for change in changes}
    kind = tree.pop("kind")
    made = build(Family, {"kind": kind, **defaults_under(cls, tree)}, "model")
    return made, tops.pop() if len(tops) == 1 else None


def subjects(config: CheckConfig) -> dict[str, Subject]:
    """{name: model} of what `model` names. Raises InputError or ConfigError."""
    import torch

    from models.check import shrunk, stirred, variants
    from models.check.variants import base
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

        return make if config.full else stirred(make)

    name = config.model
    if name in Family.kinds:
        if config.changes:
            if not isinstance(base(), Family.kinds[name]):
                raise InputError(
                    f"check {name}: changes= need a preset or recipe of this family; there is no small base"
                )
            spec, focus = changed(base(), config.changes)
            return {" ".join(config.changes): Subject(maker(spec), focus)}
        found = {k: v for k, v in variants().items() if isinstance(v.spec, Family.kinds[name])}
        return {k: Subject(maker(v.spec), v.focus, v.first) for k, v in found.items()}
    if name in PRESETS:
        spec, focus = changed(PRESETS[name]() if config.full else shrunk(PRESETS[name]()), config.changes)
        return {name: Subject(maker(spec), focus)}
    path = storage_path(name)
    if path.is_dir():
        if config.changes:
            raise InputError(
                f"check {name}: a trained model is what it is; changes= are for families, presets, recipes"
            )
        folder = resolve(path, config.which)
        model = open_folder(folder)
        if not isinstance(model, LM):
            raise InputError(f"{folder}: a {type(model).__name__} of transformers; the suite is for our own families")
        return {str(name): Subject(lambda: open_folder(folder))}
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
    spec, focus = changed(spec if config.full else small(spec, shrunk), config.changes)
    return {name: Subject(maker(spec), focus)}


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

    from models.check import CHECKS, QUICK, conformance
    from pipelines.lib.progress import Progress
    from pipelines.lib.terminal import print_table

    disable_progress_bar()  # of saving and loading, which the checks do often
    chosen = [name for name in CHECKS if config.only is None or config.only in name]
    if not chosen:
        raise InputError(f"only={config.only}: no such check{near(config.only, CHECKS)}")
    work = {
        name: (subject, [c for c in chosen if subject.first or c in (*QUICK, "every_field_matters")])
        for name, subject in subjects(config).items()
    }
    began = time.perf_counter()
    outcomes: dict[str, list[Any]] = {}
    with Progress(sum(len(checks) for _, checks in work.values()), "checks", f"check {config.model}") as progress:
        done = 0
        for name, (subject, checks) in work.items():
            outcomes[name] = []
            for check in checks:
                outcomes[name] += conformance(subject.make, config.backend, focus=subject.focus, names=[check])
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
