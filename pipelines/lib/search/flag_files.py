"""Experiment files of the modular laboratory (run_experiments' YAML and JSON) as search files of ours.

A file is read as the laboratory read it and expanded by `Space`, whose words and rules are the same; every run is
translated by itself (flag_runs.py), and what the runs have in common is found again (flag_arrange.py).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from models.spec import near
from pipelines.lib.config import InputError, Yaml, as_word, read_yaml, write_yaml
from pipelines.lib.search.flag_arrange import RECIPE, arrange, refusal
from pipelines.lib.search.flag_runs import settings
from pipelines.lib.search.flag_values import Flags, Lacking
from pipelines.lib.search.flags import FLAGS, is_flag, left_out, unknown
from pipelines.lib.search.space import Space
from pipelines.lib.search.vary import TOP, USES, WORDS

MOST_TRIED = 200  # settings that are looked at for whether they can be; a search looks at all of them
ALWAYS = (
    "norm_variant_attn",
    "optimizer",
    "dtype",
)  # whose change of meaning is told even where a file leaves them out


class OldYaml(Yaml):
    """YAML 1.1, in which `yes`, `on` and `True` are true: what the laboratory reads."""


OldYaml.yaml_implicit_resolvers = yaml.SafeLoader.yaml_implicit_resolvers


@dataclass(frozen=True)
class Imported:
    """A search file and what a reader of it should know, line by line.  runs: how many there are."""

    tree: dict[str, Any]
    notes: tuple[str, ...]
    runs: int

    def text(self) -> str:
        """The search file, the notes as comments above it."""
        return "".join(f"# {line}\n" for line in self.notes) + write_yaml(self.tree, inline=True)

    def words(self) -> list[str]:
        """The search file as words of a command line."""
        return [f"{key}={as_word(value)}" for key, value in self.tree.items()]


def documents(path: Path) -> list[Any]:
    """What a file holds, one item per document. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
        found = [json.loads(text)] if path.suffix == ".json" else list(yaml.load_all(text, OldYaml))
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno}: {error.msg}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: {getattr(error, 'problem', None) or error}") from None
    return [document for document in found if document is not None]


def is_laboratory(path: Path) -> bool:
    """Whether a file is one of the laboratory's: several mappings, or one that names flags and has no `vary`."""
    try:
        found = documents(path)
    except InputError:
        return False  # whoever reads it next says what is wrong
    if len(found) > 1 or (found and isinstance(found[0], list)):
        return True
    if not found or not isinstance(found[0], dict) or {"vary", "base"} & set(found[0]):
        return False
    return any(key in WORDS or is_flag(str(key)) for key in found[0])


def import_file(path: str | Path, dataset: str | None = None, ignore: Sequence[str] = ()) -> Imported:
    """Translate a file. Raises InputError.

    dataset: of several, the one whose runs are meant.  ignore: names that are no flags we know, to be left out
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}")
    sweeps = [
        sweep for document in documents(path) for sweep in (document if isinstance(document, list) else [document])
    ]
    if not sweeps or not all(isinstance(sweep, dict) for sweep in sweeps):
        raise InputError(f"{path}: an experiment file is a mapping, a list of mappings, or several documents of these")
    try:
        return _imported(path.name, [_numbers(sweep) for sweep in sweeps], dataset, ignore)
    except InputError as error:
        text = str(error)
        raise InputError(
            text if text.startswith(str(path)) else f"{path}: {text.removeprefix(f'{path.name}: ')}"
        ) from None


def _imported(name: str, sweeps: list[dict[str, Any]], dataset: str | None, ignore: Sequence[str]) -> Imported:
    notes: list[str] = []
    trees = []
    for sweep in sweeps:
        tree, unused = _without_unused(sweep)
        notes += [f"left out: named group {group} (no run uses it)" for group in unused]
        trees.append(tree)
    points = [{k: v for k, v in point.items() if v is not None} for point in Space.read(trees, name).points()]
    ignored = {key for point in points for key in point if key in ignore and not is_flag(key)}
    points = [{key: value for key, value in point.items() if key not in ignored} for point in points]
    notes += [f"left out: {key} (as asked; it is no flag known here)" for key in sorted(ignored)]
    if wrong := list(dict.fromkeys(key for point in points for key in point if not is_flag(key))):
        more = f" ({len(wrong) - 1} more: {', '.join(wrong[1:])})" if wrong[1:] else ""
        raise InputError(f"{unknown(wrong[0])}{more}; import FILE ignore={wrong[0]} leaves it out")
    points = _of_one_dataset(points, dataset)
    configs, seeds, told = _translated(points)
    notes += [*told, *_refused(configs)]
    fixed, vary = arrange(configs)
    search = {
        "recipe": RECIPE,
        "fixed": fixed,
        "rule": "sweep",
        "objective": {"metric": "val/nll"},
        "seeds": len(seeds),
        "first_seed": seeds[0],
        "vary": vary,
    }
    here = f"{len(configs)} settings" if len(configs) != 1 else "1 setting"
    head = f"{name}: {len(points)} runs of the laboratory, here {here}, {len(seeds)} seeds each"
    return Imported(search, (head.replace(", 1 seeds each", "").replace(" 1 runs", " 1 run"), *notes), len(configs))


def import_greedy(path: str | Path, names: Sequence[str], increments: Sequence[float]) -> Imported:
    """Translate a greedy search of the laboratory (hyperparam_search). Raises InputError.

    path: its --orig_settings, one run in which a list is a value; or its results, whose last baseline is the run
    names: its --param_names, that steps are tried of.  increments: of each, or one for all
    """
    path = Path(path)
    found = documents(path)
    if len(found) != 1 or not isinstance(found[0], dict):
        raise InputError(f"{path}: the settings of one run are needed, a mapping")
    given = _numbers(found[0])
    if "baseline_config" in given:
        later = [block.get("baseline_config_after") for block in given.get("iterations") or []]
        given = next((config for config in reversed(later) if config), given["baseline_config"])
    given = {key: value for key, value in given.items() if value is not None}
    if wrong := [key for key in (*names, *given) if not is_flag(key)]:
        raise InputError(f"{path}: {unknown(wrong[0])}")
    if len(increments) not in (1, len(names)):
        raise InputError(f"increments: one, or one for each of the {len(names)} param_names, is needed")
    configs, seeds, told = _translated([given])
    steps = increments if len(increments) == len(names) else [increments[0]] * len(names)
    vary = {}
    for name, step in zip(names, steps, strict=True):
        key, increment = _step(given, name, step)
        vary[key] = {"increment": increment}
    fixed, _ = arrange(configs)
    search = {
        "recipe": RECIPE,
        "fixed": fixed,
        "rule": "greedy",
        "objective": {"metric": "val/nll"},
        "first_seed": seeds[0],
        "vary": vary,
    }
    head = f"{path.name}: a greedy search of the laboratory; here it goes both ways, and a step must be proven"
    return Imported(search, (head, *told, *_refused(configs)), 1)


def _step(given: dict[str, Any], name: str, step: float) -> tuple[str, float]:
    """The setting that a step of a flag changes, and by how much."""
    value = given.get(name, FLAGS[name].default) if name in FLAGS else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(
            f"param_names: {name}={value} is no number that could be stepped along; write its values in vary:"
        )
    stepped = value + step
    stepped = int(stepped) if stepped == int(stepped) else stepped
    try:
        before, after = settings(Flags(given)), settings(Flags({**given, name: stepped}))
    except Lacking as error:
        raise InputError(f"a step of {name} has no counterpart: {error}") from None
    keys = [key for key in after if before.get(key) != after[key] and key not in ("micro_batch", "eval_tokens")]
    if name == "n_layer":  # lists with one entry per layer follow by themselves
        keys = [key for key in keys if not isinstance(after[key], list)]
    if len(keys) != 1 or not all(isinstance(found.get(keys[0]), (int, float)) for found in (before, after)):
        changed = ", ".join(keys) or "nothing"
        raise InputError(f"param_names: a step of {name} changes {changed}; give its values in vary: instead")
    change = Decimal(str(after[keys[0]])) - Decimal(str(before[keys[0]]))
    return keys[0], int(change) if change == change.to_integral_value() else float(change)


def _numbers(tree: Any) -> Any:
    """Text that is a number becomes one: the laboratory handed its values over as words of a command line."""
    if isinstance(tree, dict):
        names = ("named_group", *USES)  # which stay what they are called
        return {key: value if key in names else _numbers(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_numbers(value) for value in tree]
    if isinstance(tree, str):
        try:
            value = read_yaml(tree)
        except InputError:
            return tree
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else tree
    return tree


def _without_unused(sweep: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A sweep without the named groups that nothing uses, and their names."""
    words = ("named_static_groups", "named_variation_groups")
    groups = {
        str(group.get("named_group")): group
        for word in words
        for group in sweep.get(word) or []
        if isinstance(group, dict)
    }
    seen: set[str] = set()
    queue: list[Any] = [{key: value for key, value in sweep.items() if key not in TOP}]
    while queue:
        for name in _named(queue.pop()):
            if name not in seen and name in groups:
                queue.append(groups[name])
            seen.add(name)
    kept = {
        word: [g for g in sweep[word] if not isinstance(g, dict) or str(g.get("named_group")) in seen]
        for word in words
        if isinstance(sweep.get(word), list)
    }
    return {**sweep, **kept}, [name for name in groups if name not in seen]


def _named(tree: Any) -> Iterable[str]:
    """The names of groups that a mapping, or a group in it, uses."""
    if isinstance(tree, list):
        for item in tree:
            yield from _named(item)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key in USES:
                yield from (str(v) for v in (value if isinstance(value, list) else [value]))
            else:
                yield from _named(value)


def _of_one_dataset(points: list[dict[str, Any]], dataset: str | None) -> list[dict[str, Any]]:
    """The runs that train on one dataset, for a search has one folder of tokens."""
    usual = FLAGS["dataset"].default
    found = list(dict.fromkeys(str(point.get("dataset", usual)) for point in points))
    if dataset is not None and dataset not in found:
        raise InputError(f"dataset={dataset}: no run trains on it{near(dataset, found)}")
    if dataset is None and len(found) > 1:
        raise InputError(
            f"its runs train on {', '.join(found)}, and a search has one folder of tokens; translate one after the "
            f"other: python -m pipelines.search import FILE dataset={found[0]} out=..."
        )
    return [point for point in points if str(point.get("dataset", usual)) == (dataset or found[0])]


def _translated(points: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int], list[str]]:
    """The different settings, their seeds, and what is to be told. Raises InputError where no run is left."""
    configs: dict[str, dict[str, Any]] = {}
    seeds: dict[str, list[int]] = {}
    lacking: Counter[str] = Counter()
    read: set[str] = set()
    for point in points:
        flags = Flags(point)
        try:
            config = settings(flags)
            key = json.dumps(config, sort_keys=True)
            configs.setdefault(key, config)
            seeds.setdefault(key, []).append(flags.number("seed"))
        except Lacking as error:
            lacking[str(error)] += 1
        read |= {*flags.read, "dataset"}
    told = [f"left out: {n} of {len(points)} runs: {reason}" for reason, n in lacking.items()]
    if not configs:
        raise InputError(f"nothing is left of it; {'; '.join(told)}")
    numbers = sorted({seed for found in seeds.values() for seed in found})
    even = all(sorted(set(found)) == numbers for found in seeds.values())
    if not even or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        told.append(f"changed: seed: {numbers} become {len(numbers)} of every setting, from {numbers[0]} on")
    return _comparable(list(configs.values())), numbers, [*told, *_of_flags(points, read)]


def _comparable(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is of the measuring, and not of the run, made equal: rows per forward pass, and what is validated on.

    A length in steps becomes one in tokens where batches differ, as a search wants it.
    """
    common = {
        "micro_batch": math.gcd(*(config["micro_batch"] for config in configs)),
        "eval_tokens": max(config["eval_tokens"] for config in configs),
    }
    out = [{**config, **common} for config in configs]
    if len({config["batch_tokens"] for config in configs}) > 1:
        for config in out:
            if "steps" in config:
                config["tokens"] = config.pop("steps") * config["batch_tokens"]
    return out


def _of_flags(points: list[dict[str, Any]], read: set[str]) -> list[str]:
    """What became of flags that were given: a line for each reason to leave some out, and for each changed meaning."""
    given = list(dict.fromkeys(key for point in points for key in point))
    dropped: dict[str, list[str]] = {}
    for key in given:
        if (found := left_out(key)) is not None:
            dropped.setdefault(found.reason, []).append(key)
        elif key not in read:
            dropped.setdefault("nothing that these runs choose reads it", []).append(key)
    told = [f"left out: {', '.join(keys)} ({reason})" for reason, keys in dropped.items()]
    changed = [
        key
        for key in dict.fromkeys([*given, *ALWAYS])
        if key in read and any(FLAGS[key].changes(run.get(key, FLAGS[key].default)) for run in points)
    ]
    return told + [f"changed: {key}: {FLAGS[key].note}" for key in changed]


def _refused(configs: list[dict[str, Any]]) -> list[str]:
    """Lines for settings that cannot be, by their reasons."""
    reasons = Counter(reason for config in configs[:MOST_TRIED] if (reason := refusal(config)) is not None)
    tried = min(len(configs), MOST_TRIED)
    return [f"refused: {n} of {tried} settings: {reason}" for reason, n in reasons.items()]
