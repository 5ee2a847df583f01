"""The bundle of CORE's task files: which tasks there are, how each is asked, and its items.

A bundle is a folder in the layout of the public one:

    core.yaml              icl_tasks: label, dataset_uri, num_fewshot, icl_task_type, continuation_delimiter
    eval_meta_data.csv     "Eval Task", "Random baseline" in percent
    eval_data/...          one JSON object a line, at each dataset_uri

Items are shuffled with a fixed seed before a limit takes the first of them, so a limit takes a stable subset.
"""

from __future__ import annotations

import csv
import functools
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.spec import near
from pipelines.lib.config import InputError, read_yaml

SHUFFLE_SEED = 1337
EXAMPLES_SEED = 1234
# Keys of an item and their types, by task type.
KEYS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}  # where the answers to choose from stand


@dataclass(frozen=True)
class Task:
    """One task. kind: a key of KEYS.  shots: examples before each item.  chance: accuracy of a guess, as a fraction."""

    label: str
    path: Path
    kind: str
    shots: int
    delimiter: str
    chance: float


def open_bundle(folder: Path, labels: Iterable[str] = ()) -> tuple[Task, ...]:
    """The tasks of a bundle, in its order; those of `labels` only, if any. Raises InputError for what is not usable."""
    listed = folder / "core.yaml"
    if not listed.is_file():
        inside = next((p.parent for p in sorted(folder.glob("*/core.yaml"))), None)
        hint = f"; did you mean {inside}?" if inside else "; a bundle holds core.yaml, eval_meta_data.csv, eval_data/"
        raise InputError(f"bundle={folder}: no core.yaml here{hint}")
    tree = read_yaml(listed.read_text(encoding="utf-8"), str(listed))
    entries = tree.get("icl_tasks") if isinstance(tree, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{listed}: a list `icl_tasks` is needed")
    chance = read_chance(folder / "eval_meta_data.csv")
    tasks = {task.label: task for task in (_task(folder, listed, entry, chance) for entry in entries)}
    if len(tasks) < len(entries):
        raise InputError(f"{listed}: a label stands twice")
    for label in labels:
        if label not in tasks:
            raise InputError(f"tasks={label}: the bundle has no such task{near(label, tasks)}")
    return tuple(task for label, task in tasks.items() if not labels or label in labels)


def _task(folder: Path, listed: Path, entry: Any, chance: Mapping[str, float]) -> Task:
    """One entry of core.yaml."""
    try:
        label, uri, kind = (str(entry[key]) for key in ("label", "dataset_uri", "icl_task_type"))
        (shots,) = entry["num_fewshot"]
        delimiter = str(entry.get("continuation_delimiter", " "))
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{listed}: task {entry!r:.80} needs label, dataset_uri, icl_task_type and num_fewshot: [N]"
        ) from None
    if kind not in KEYS:
        raise InputError(f"{listed}: task {label}: icl_task_type {kind!r} is not known{near(kind, KEYS)}")
    if not isinstance(shots, int) or shots < 0:
        raise InputError(f"{listed}: task {label}: num_fewshot must be a whole number, not {shots!r}")
    if label not in chance:
        raise InputError(f"{folder / 'eval_meta_data.csv'}: no `Random baseline` for task {label}")
    data = (folder / "eval_data").resolve()
    path = (data / uri).resolve()
    if not path.is_relative_to(data):
        raise InputError(f"{listed}: task {label}: dataset_uri {uri} leads out of eval_data/")
    if not path.is_file():
        raise InputError(f"{listed}: task {label}: no file {path}")
    return Task(label, path, kind, shots, delimiter, chance[label])


def read_chance(path: Path) -> dict[str, float]:
    """{task: accuracy of a guess, as a fraction} of an eval_meta_data.csv. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; it holds the random baselines")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        try:
            found[row["Eval Task"]] = float(row["Random baseline"]) / 100
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: a row without `Eval Task` and `Random baseline`: {row!r:.80}") from None
        if not 0 <= found[row["Eval Task"]] < 1:
            raise InputError(f"{path}: Random baseline of {row['Eval Task']} is not in [0, 100)")
    return found


@functools.lru_cache(maxsize=4)
def read_items(task: Task) -> tuple[dict[str, Any], ...]:
    """All items of a task, shuffled. Raises InputError, naming the line, for one that cannot be asked."""
    items = []
    for number, line in enumerate(task.path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise InputError(f"{task.path} line {number}: not JSON ({error})") from None
        if fault := _fault(task.kind, item):
            raise InputError(f"{task.path} line {number}: {fault}")
        items.append(item)
    if len(items) <= task.shots:
        raise InputError(f"{task.path}: {len(items)} items; {task.label} needs more than its {task.shots} examples")
    random.Random(SHUFFLE_SEED).shuffle(items)
    return tuple(items)


def _fault(kind: str, item: Any) -> str | None:
    """What is wrong with an item; None if nothing is."""
    if not isinstance(item, dict):
        return "not a JSON object"
    for key, cls in KEYS[kind].items():
        if not isinstance(item.get(key), cls) or isinstance(item[key], bool):
            return f"{key!r} is missing or no {getattr(cls, '__name__', cls)}"
    if kind in OPTIONS:
        options = item[OPTIONS[kind]]
        if len(options) < 2 or not all(isinstance(option, str) for option in options):
            return f"{OPTIONS[kind]!r} must be two texts or more"
        if not 0 <= item["gold"] < len(options):
            return f"gold {item['gold']} is none of the {len(options)} {OPTIONS[kind]}"
    elif not item["continuation"].strip():
        return "'continuation' is empty"
    return None


def examples_of(task: Task, items: tuple[dict[str, Any], ...], index: int) -> list[dict[str, Any]]:
    """The examples before item `index`: drawn without replacement from all other items, by a generator of its own.

    Sampling positions of a list without the item, so that they are the draws of the public evaluation.
    """
    if not task.shots:
        return []
    draws = random.Random(EXAMPLES_SEED + index).sample(range(len(items) - 1), task.shots)
    return [items[j + (j >= index)] for j in draws]
