"""Every checkpoint below a folder as one row: where it stands, how well it did, and whether its weights are healthy."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipelines.lib.config import InputError
from pipelines.lib.jsonl import rows
from pipelines.lib.run import MANIFEST, Run, damage

PATH_WIDTH = 44  # of the table's first column, before it is folded
LEFT_OUT = (".ray", ".git", "__pycache__", "training_state")  # folders in which there are none
UNFINISHED = "never finished: it has no manifest.json"
SORTS = {"path": "path", "loss": "best_nll", "step": "step", "nan": "bad_weights", "nan_step": "nan_step"}
SORTS |= {name: name for name in ("norm", "kurtosis", "parameters", "skipped")}


@dataclass
class Row:
    """One checkpoint; None is what is not known.

    path: below the folder that was looked through.  named: which pointers of its run name it.  step: updates made.
    nll: validation loss at that step, best_nll: the run's lowest so far, at best_step.  skipped: steps with a loss or
    gradient that was not finite; nan_step: the first logged step of its run with such.  bad_weights: numbers that are
    not finite.  parameters: numbers in the weight files.  norm: L2 of them all.  largest: |w|.  kurtosis, kurtosis_max:
    excess, median and largest over the matrices.  note: what is wrong with it.
    """

    path: str
    named: str = ""
    step: int | None = None
    nll: float | None = None
    best_nll: float | None = None
    best_step: int | None = None
    skipped: int | None = None
    nan_step: int | None = None
    bad_weights: int | None = None
    parameters: int | None = None
    norm: float | None = None
    largest: float | None = None
    kurtosis: float | None = None
    kurtosis_max: float | None = None
    note: str = ""


def find(folder: Path) -> Iterable[Path]:
    """Checkpoints below a folder: Hugging Face folders, unfinished or damaged ones of a run too, and ckpt.pt files."""
    for here, names, files in os.walk(folder):
        path = Path(here)
        names[:] = sorted(n for n in names if n not in LEFT_OUT and not n.startswith(".writing_"))
        has_weights = any(f.endswith(".safetensors") or re.fullmatch(r"pytorch_model.*\.bin", f) for f in files)
        of_run = path.parent.name == "checkpoints" and re.fullmatch(r"step_\d+", path.name)
        if of_run or has_weights:
            names[:] = []  # what lies inside belongs to it
            yield path
        yield from sorted(path / f for f in files if f == "ckpt.pt")


def collect(folder: Path, pattern: str = "", fast: bool = False) -> list[Row]:
    """A row for each checkpoint below `folder` whose path matches. fast: text files only, no weights are read.

    Raises InputError for a folder that is not there or holds none. What cannot be read is a row with a note.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = [(p, p.relative_to(folder).as_posix()) for p in find(folder)]
    wanted = [(p, name) for p, name in found if re.search(pattern, name)]
    if not wanted:
        raise InputError(
            f"{folder}: no checkpoint below it"
            + (f" matches path_regex={pattern}; there are {len(found)}, such as {found[0][1]}" if found else "")
        )
    return [read(path, name, fast) for path, name in wanted]


def read(path: Path, name: str, fast: bool = False) -> Row:
    """The row of one checkpoint. It never fails: what is wrong stands in `note`."""
    row, notes = Row(name), []
    if path.is_file():
        steps = [_header] if fast else [_state_of_nanogpt, _weights]
    else:
        steps = [_state, _validation, *((_header,) if fast else (_whole, _weights))]
    for step in steps:
        try:
            step(path, row)
        except InputError as error:
            notes.append(str(error).replace(f"{path}/", "").replace(f"{path}: ", ""))
            if step is _whole or notes == [UNFINISHED]:  # the rest would say the same again
                break
        except Exception as error:  # of a file that holds what it should not
            notes.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    if row.bad_weights:
        notes.append(f"{row.bad_weights:,} weights are not finite")
    row.note = "; ".join(dict.fromkeys(notes))
    return row


def _state(path: Path, row: Row) -> None:
    """What its training state says, and which pointers name it."""
    file = path / "training_state" / "state.json"
    if path.parent.name == "checkpoints":
        run = Run(path.parent.parent)
        row.named = ", ".join(word for word in ("best", "last") if run.pointed(word) == path.name)
        row.step = int(path.name.removeprefix("step_")) if path.name[5:].isdigit() else None
    if not file.is_file():
        if path.parent.name == "checkpoints" and not (path / MANIFEST).is_file():
            raise InputError(UNFINISHED)
        return
    try:
        state = json.loads(file.read_text(encoding="utf-8"))["state"]
    except (ValueError, KeyError, TypeError):
        raise InputError("training_state/state.json is not readable") from None
    row.step, row.skipped = state.get("step"), state.get("skipped")
    row.best_nll, row.best_step = state.get("best"), state.get("best_step")


def _validation(path: Path, row: Row) -> None:
    """Its validation loss, and the first step of its run where something was not finite, from metrics.jsonl."""
    if path.parent.name != "checkpoints":
        return
    for line, _ in rows(path.parent.parent / "metrics.jsonl"):
        if line is None or not isinstance(line.get("step"), int) or (row.step is not None and line["step"] > row.step):
            continue
        odd = line.get("train/skipped") or ("train/loss" in line and line["train/loss"] is None)
        if odd and row.nan_step is None:
            row.nan_step = line["step"]
        if line["step"] == row.step and "val/nll" in line:
            row.nll = math.nan if line["val/nll"] is None else float(line["val/nll"])


def _whole(path: Path, row: Row) -> None:
    """Raises InputError if a checkpoint of ours is not what its manifest says."""
    if (path / MANIFEST).is_file() and (faults := damage(path)):
        raise InputError("; ".join(faults))


def _state_of_nanogpt(path: Path, row: Row) -> None:
    """Step and best loss of a ckpt.pt of nanoGPT and its kin."""
    from pipelines.lib.inspection.weights import pickled

    tree = pickled(path)
    if not isinstance(tree, dict):
        raise InputError("holds no checkpoint by name")
    for name, key in (("step", "iter_num"), ("best_nll", "best_val_loss")):
        value: Any = tree.get(key)
        setattr(row, name, None if value is None else int(value) if name == "step" else float(value))


def _weights(path: Path, row: Row) -> None:
    """Figures over all weights; a buffer that is saved beside them (a fixed radius) is none."""
    from pipelines.lib.inspection.weights import buffer_names, moments, pickled_tensors, tensors

    square, kurtoses = 0.0, []
    n = bad = 0
    largest = 0.0
    buffers = buffer_names(path)
    for name, x in pickled_tensors(path) if path.is_file() else tensors(path):
        if name in buffers:
            continue
        m = moments(x)
        n, bad = n + m.n, bad + m.bad
        if m.n > m.bad:
            square, largest = square + m.norm**2, max(largest, m.largest)
        if x.dim() >= 2 and math.isfinite(m.kurtosis):
            kurtoses.append(m.kurtosis)
    row.parameters, row.bad_weights, row.norm, row.largest = n, bad, math.sqrt(square), largest
    if kurtoses:
        row.kurtosis, row.kurtosis_max = sorted(kurtoses)[len(kurtoses) // 2], max(kurtoses)


def _header(path: Path, row: Row) -> None:
    """How many parameters, from the text that safetensors files begin with."""
    from pipelines.lib.inspection.weights import buffer_names, safe_header, weight_files

    if path.is_file():
        raise InputError("fast=true does not open pickles")
    files = weight_files(path)
    if files[0].suffix == ".safetensors":
        found = {name: e for f in files for name, e in safe_header(f).items() if name not in buffer_names(path)}
        row.parameters = sum(math.prod(e["shape"]) for e in found.values() if e["dtype"].startswith(("F", "BF")))


def in_order(found: Sequence[Row], sort: str, reverse: bool = False) -> list[Row]:
    """Sorted by a column; rows without it come last, whichever way it goes. Numbers in paths count as numbers."""
    name = SORTS[sort]
    natural = lambda row: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", row.path)]
    key = natural if name == "path" else lambda row: getattr(row, name)
    known = [r for r in sorted(found, key=natural) if _is_known(getattr(r, name))]
    return sorted(known, key=key, reverse=reverse) + [r for r in found if not _is_known(getattr(r, name))]


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def as_csv(found: Sequence[Row]) -> str:
    """All columns with all digits; what is not known is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in found)
    return out.getvalue()


def table_of(found: Sequence[Row]) -> Any:
    """The rows for a terminal, without the columns that nobody has."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    columns: tuple[tuple[str, str, str], ...] = (
        ("checkpoint", "path", ""),
        ("", "named", ""),
        ("step", "step", ",d"),
        ("val nll", "nll", ".4f"),
        ("best", "best_nll", ".4f"),
        ("at step", "best_step", ",d"),
        ("skipped", "skipped", ",d"),
        ("NaN step", "nan_step", ",d"),
        ("NaNs", "bad_weights", ",d"),
        ("parameters", "parameters", ",d"),
        ("norm", "norm", ".4g"),
        ("max |w|", "largest", ".3g"),
        ("kurtosis", "kurtosis", ".2f"),
        ("worst", "kurtosis_max", ".2f"),
    )
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    kept = [c for c in columns if c[1] == "path" or any(getattr(r, c[1]) not in (None, "") for r in found)]
    longest = min(PATH_WIDTH, max(len(shown_path(r)) for r in found))
    for title, name, form in kept:
        width = longest if name == "path" else None
        table.add_column(title, justify="right" if form else "left", overflow="fold", min_width=width)
    for row in found:
        values = [(shown_path(row) if name == "path" else getattr(row, name), form) for _, name, form in kept]
        cells = ["" if v is None else escape(format(v, form) if form else str(v)) for v, form in values]
        table.add_row(*cells, style="red" if row.note else "")
    return table


def shown_path(row: Row) -> str:
    """Without the folder that every run's checkpoints lie in.

    >>> shown_path(Row("runs/a/checkpoints/step_10"))
    'runs/a/step_10'
    """
    return re.sub(r"(^|/)checkpoints/(step_\d+)$", r"\1\2", row.path)
