"""Experiment files of the modular laboratory (run_experiments' YAML and JSON) as search files of ours.

A file is read as the laboratory read it and expanded by `Space`, whose words and rules are the same; every run is
translated by itself (flag_runs.py), and what the runs have in common is found again: settings of all runs become
`fixed`, the others `vary`, as products where they are products. A mapping of plain flags (--orig_settings) is one run.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from models.parts.attention import Attention
from models.parts.mlp import MLP
from models.spec import ConfigError, build, flatten, near, plain
from pipelines.lib.config import InputError, Yaml, as_word, override, read_yaml, recipe, write_yaml
from pipelines.lib.search.flag_runs import settings
from pipelines.lib.search.flag_values import Flags, Lacking
from pipelines.lib.search.flags import FLAGS, is_flag, left_out, unknown
from pipelines.lib.search.space import Space
from pipelines.lib.search.vary import TOP, USES, WORDS
from pipelines.lib.training import LENGTHS, TrainConfig

RECIPE = "gpt_debug"  # where our search files begin; `fixed` says all that it would say otherwise
REGISTRIES: dict[str, Any] = {"model.attention": Attention, "model.mlp": MLP}  # parts whose options are keys
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


def _numbers(tree: Any) -> Any:
    """Text that is a number becomes one: the laboratory handed its values over as words of a command line."""
    if isinstance(tree, dict):
        return {key: _numbers(value) for key, value in tree.items()}
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
    changed = [key for key in (*given, *ALWAYS) if key in read and FLAGS[key].note]
    return told + [f"changed: {key}: {FLAGS[key].note}" for key in dict.fromkeys(changed)]


# ---- settings as `fixed` and `vary`


def arrange(configs: list[dict[str, Any]]) -> tuple[dict[str, Any], Any]:
    """`fixed` and `vary` that together give exactly these settings."""
    keys = list(dict.fromkeys(key for config in configs for key in config))
    varying = {key for key in keys if len({_text(config.get(key, ...)) for config in configs}) > 1}
    # Another kind of part begins without options, so all of them are said together with it.
    varying |= {key for key in keys if any(key.startswith(f"{kind}.") for kind in varying)}
    fixed = {key: _short(configs[0][key]) for key in keys if key not in varying}
    usual, said = plain(_built({"steps": 1})), set(flatten(recipe(RECIPE)))
    for key in [key for key in fixed if key not in LENGTHS and not _is_said(key, said)]:
        if _is_usual(fixed[key], _at(usual, key)):
            del fixed[key]
    for key in sorted(varying - said):
        kind, _, option = key.rpartition(".")
        kinds = REGISTRIES[kind].kinds if kind in REGISTRIES else {}
        having = [config for config in configs if key in config]
        if kinds and all(_is_usual(config[key], plain(kinds[config[kind]]())[option]) for config in having):
            varying.remove(key)
    for unit in {"steps", "tokens", "epochs"} & varying:
        if unit in configs[0]:
            fixed[unit] = configs[0][unit]  # a search wants to know a length before it looks at what varies
    found = boxes([{key: config[key] for key in keys if key in varying and key in config} for config in configs])
    shared = [
        key for key in keys if key in varying and all(_text(box.get(key)) == _text(found[0].get(key)) for box in found)
    ]
    vary = {key: _options(found[0][key]) for key in shared}
    if len(found) > 1:
        vary["parameter_groups"] = [
            {key: _options(values) for key, values in box.items() if key not in shared} for box in found
        ]
    return fixed, vary


def boxes(points: list[dict[str, Any]]) -> list[dict[str, list[Any]]]:
    """Products, key -> values, that together hold each of the points once. The last key is merged first."""
    found = [{key: [value] for key, value in point.items()} for point in points]
    keys = list(dict.fromkeys(key for point in points for key in point))
    before = -1
    while before != len(found):
        before = len(found)
        for key in reversed(keys):
            merged: dict[str, dict[str, list[Any]]] = {}
            for number, box in enumerate(found):
                rest = _text({k: v for k, v in box.items() if k != key}) if key in box else f"{number} has no {key}"
                if rest in merged:
                    merged[rest][key] = merged[rest][key] + box[key]
                else:
                    merged[rest] = dict(box)
            found = list(merged.values())
    return found


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


def _built(settings: dict[str, Any]) -> Any:
    """The training config of dotted settings. Raises ConfigError."""
    tree: dict[str, Any] = {"data": "", "out": ""}
    for key, value in settings.items():
        tree = override(tree, key, value)
    return build(TrainConfig, tree)


def _refused(configs: list[dict[str, Any]]) -> list[str]:
    """Lines for settings that cannot be, by their reasons."""
    reasons: Counter[str] = Counter()
    for config in configs:
        try:
            assert _built(config).rows
        except ConfigError as error:
            reasons[str(error)] += 1
    return [f"refused: {n} of {len(configs)} settings: {reason}" for reason, n in reasons.items()]


def _is_said(key: str, said: set[str]) -> bool:
    return any(key == other or other.startswith(f"{key}.") for other in said)


def _at(tree: Any, key: str) -> Any:
    """What stands at a dotted key; `...` where there is none."""
    for word in key.split("."):
        if not isinstance(tree, dict) or word not in tree:
            return ...
        tree = tree[word]
    return tree


def _is_usual(value: Any, usual: Any) -> bool:
    """Whether a setting, a part among them, says what holds anyhow."""
    if isinstance(usual, dict):
        given = {"kind": value} if isinstance(value, str) else value
        return isinstance(given, dict) and all(_is_usual(item, usual.get(name, ...)) for name, item in given.items())
    return bool(value == usual)


def _short(value: Any) -> Any:
    """A part without options by its name alone."""
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, dict):
        return value["kind"] if set(value) == {"kind"} else {key: _short(item) for key, item in value.items()}
    return value


def _options(values: list[Any]) -> Any:
    """Values of a key as `vary` has them."""
    options = [_option(_short(value)) for value in values]
    return options if len(options) > 1 or isinstance(options[0], list) else options[0]


def _option(value: Any) -> Any:
    """A list as an option of a part would be options, so it stands in a list."""
    if not isinstance(value, dict):
        return value
    return {key: [item] if isinstance(item, list) else _option(item) for key, item in value.items()}
