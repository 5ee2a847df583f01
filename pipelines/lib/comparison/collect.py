"""Runs as their folders tell them: from run folders, folders of runs, searches and MLflow, to one list.

Nothing is made up: a figure that no file has is not there, and a run that cannot be used is left out with the reason.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models.cost import Ops
from models.spec import ConfigError, build, flatten, near, plain
from pipelines.lib.comparison.searches import SearchStory, story_of
from pipelines.lib.config import InputError
from pipelines.lib.jsonl import figures
from pipelines.lib.jsonl import rows as read_rows
from pipelines.lib.run import Run
from pipelines.lib.runlog import read_samples
from pipelines.lib.search.ledger import NAME as LEDGER
from pipelines.lib.search.ledger import Ledger
from pipelines.lib.training import HOW, TrainConfig

SEEDS = ("seed", "init_seed", "order_seed")
CARRIED_OUT = frozenset("num_workers cpus_per_worker gpus_per_worker device threads micro_batch".split())
BOOKKEEPING = (HOW - CARRIED_OUT - {"data"}) | {"eval_every"}  # what is written down, not what is computed
DEPTH = 3  # folders below the one given, in which runs are looked for

Status = Literal["complete", "cut short", "incomplete", "failed", "diverged"]


@dataclass(frozen=True)
class RunRecord:
    """One run.

    path, name: its folder, and how people know it
    config: as config.yaml has it;  settings: flat, without seeds and bookkeeping, the data named by its fingerprint
    seed: of initialisation and order, as text that is equal for runs that make a pair
    rows: metrics.jsonl: step and figures, NaN where a figure was none
    status: `complete` trained to its length; `cut short` by a search's rule; `diverged`: its last loss is no number
    note: what a reader must know of its status
    cost: figures of cost.json, or derived from config and metrics.jsonl where that is not there
    derived: names in `cost` that are not from cost.json
    data: fingerprints of the token folders; empty if no file tells
    machine: host, versions and commit it was trained with
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    seed: str
    rows: Sequence[Mapping[str, Any]]
    status: Status
    note: str = ""
    cost: Mapping[str, float] = field(default_factory=dict)
    derived: frozenset[str] = frozenset()
    data: tuple[str, ...] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    machine: Mapping[str, str] = field(default_factory=dict)

    def column(self, key: str) -> list[tuple[Mapping[str, Any], float]]:
        """The rows that have a figure, with it."""
        return [(row, float(row[key])) for row in self.rows if is_number(row.get(key))]

    def last(self, key: str) -> float:
        """The newest value of a figure; NaN if there is none."""
        return next((float(row[key]) for row in reversed(self.rows) if is_number(row.get(key))), math.nan)

    @property
    def tokens(self) -> float:
        return self.last("train/tokens")


@dataclass(frozen=True)
class LeftOut:
    """Something among the inputs that cannot be compared, and why."""

    name: str
    why: str


@dataclass
class Collection:
    """What was found."""

    runs: list[RunRecord] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    searches: list[SearchStory] = field(default_factory=list)

    def add(self, path: Path, name: str, trial: Mapping[str, Any] | None = None, asked: bool = False) -> None:
        """Read one run folder. asked: the user named it, so what is wrong with it is an error."""
        if any(run.path == path for run in self.runs):
            return
        try:
            self.runs.append(read_run(path, name, trial))
        except (InputError, OSError) as error:
            if asked:
                raise
            self.left_out.append(LeftOut(name, " ".join(str(error).split())))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def collect(paths: Sequence[Path], query: str | None = None, experiment: str | None = None) -> Collection:
    """All runs of these inputs, each folder once.

    paths: run folders, search folders, or folders with any of them below.  query: an MLflow filter; experiment: where.
    Raises InputError for a path that is not there or holds no run, and when nothing is left to compare.
    """
    found = Collection()
    for path in paths:
        before = len(found.runs) + len(found.left_out)
        if not path.is_dir():
            there = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
            raise InputError(f"{path}: no such folder{near(path.name, there) if there else ''}")
        if (path / LEDGER).is_file():
            add_search(found, path)
        elif Run(path).config.is_file():
            found.add(path, path.name, asked=True)
        else:
            add_below(found, path, path, DEPTH)
        if len(found.runs) + len(found.left_out) == before and not any(run.path == path for run in found.runs):
            raise InputError(f"{path}: no run in it (a folder with config.yaml and metrics.jsonl), and no search")
    if query is not None:
        add_query(found, query, experiment)
    if not found.runs:
        why = f": {found.left_out[0].name}: {found.left_out[0].why}" if found.left_out else ""
        raise InputError(f"no run that can be compared{why}")
    found.runs = distinct_names(found.runs)
    return found


def add_below(found: Collection, root: Path, folder: Path, depth: int) -> None:
    """The runs and searches below a folder; a run's own folders are not looked into."""
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if (path / LEDGER).is_file():
            add_search(found, path)
        elif Run(path).config.is_file():
            if Run(path).exists():
                found.add(path, path.relative_to(root).as_posix())
            elif not (path / "manifest.json").is_file() and not (path / "results.json").is_file():
                found.left_out.append(LeftOut(path.name, "holds a config.yaml, but nothing was trained"))
        elif depth > 1:
            add_below(found, root, path, depth - 1)


def add_search(found: Collection, folder: Path) -> None:
    """The trials of a search, as its ledger has them; the folder of a trial that went on is one run."""
    ledger = Ledger(folder)
    found.searches.append(story_of(folder, ledger))
    newest: dict[str, dict[str, Any]] = {}
    for number in sorted(ledger.rows):
        row = ledger.rows[number]
        name = f"trial {number}"
        if row["status"] == "refused" or not row.get("run"):
            found.left_out.append(LeftOut(name, f"{row['status']}: {row.get('error') or 'no reason in the ledger'}"))
        else:
            newest[row["run"]] = {**row, "share": max(row["share"], newest.get(row["run"], row)["share"])}
    for run, row in newest.items():
        if not Run(folder / run).exists():
            why = row.get("error") or "its folder holds no training"
            found.left_out.append(LeftOut(f"trial {row['number']}", f"{row['status']}: {why}"))
        else:
            found.add(folder / run, run.removeprefix("trials/"), row)


def add_query(found: Collection, query: str, experiment: str | None) -> None:
    """The training runs that an MLflow filter finds; other stages' runs have no training to compare."""
    from pipelines.lib.tracking import find_runs

    folders = find_runs(query, experiment)
    if not folders:
        where = f" in experiment {experiment!r}" if experiment else ""
        raise InputError(f"query={query!r} finds no run{where}; `make ui` shows what there is")
    for folder in folders:
        if not folder.is_dir():
            found.left_out.append(LeftOut(folder.name, f"its folder {folder} is gone, or on another machine"))
        elif (folder / LEDGER).is_file():
            add_search(found, folder)
        elif Run(folder).exists():
            found.add(folder, folder.name)


def distinct_names(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs of one name get their folder's path before it."""
    import dataclasses as dc

    names = [run.name for run in runs]
    return [
        dc.replace(run, name=f"{run.path.parent.name}/{run.name}") if names.count(run.name) > 1 else run for run in runs
    ]


# ---- one run ---------------------------------------------------------------------------------------------------------


def read_run(path: Path, name: str = "", trial: Mapping[str, Any] | None = None) -> RunRecord:
    """A run folder as a record. trial: its row in a search's ledger.

    Raises InputError for a folder without config.yaml or metrics.jsonl, or a config that cannot be read.
    """
    run = Run(path)
    if not run.config.is_file():
        raise InputError(f"{path}: no run folder (no config.yaml)")
    try:
        config = run.read_config()
    except ConfigError as error:
        raise InputError(f"{run.config}: {error}") from None
    read = (row for row, _ in read_rows(run.metrics) if row is not None and is_number(row.get("step")))
    rows = [{"step": row["step"], **figures(row)} for row in read]
    if not rows:
        raise InputError(f"{path}: metrics.jsonl has no row yet; nothing was trained that could be compared")
    notes = [note for note, _ in read_rows(path / "tracking.jsonl") if note]
    data = fingerprints(run, config, notes)
    status, note = standing(config, rows, notes, trial)
    cost, derived = costs(path, config, rows)
    return RunRecord(
        run.path,
        name or path.name,
        config,
        settings_of(filled(config), data),
        seed_of(config),
        rows,
        status,
        note,
        cost,
        derived,
        data,
        read_samples(run.samples),
        machine_of(notes),
    )


def seed_of(config: Mapping[str, Any]) -> str:
    """`0`, or with own seeds of initialisation and order beside it."""
    own = [f"{key.removesuffix('_seed')} {config[key]}" for key in SEEDS[1:] if config.get(key) is not None]
    return " ".join([str(config.get("seed", 0)), *([f"({', '.join(own)})"] if own else [])])


def filled(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with settings that came to this program after it was written, at their defaults; else as it is."""
    try:
        return plain(build(TrainConfig, dict(config)))
    except ConfigError:
        return config  # a family or a setting that this program does not have


def settings_of(config: Mapping[str, Any], data: tuple[str, ...]) -> dict[str, Any]:
    """What a run computes, flat: two runs that agree in it are seeds of one variant."""
    tree = {k: _one_value(v) for k, v in config.items() if k not in BOOKKEEPING and k not in SEEDS}
    mix = config.get("data")
    if data:
        weights = [m.get("weight", 1.0) for m in mix] if isinstance(mix, list) else []
        several = len(data) > 1
        tree["data"] = [f"{d[:12]} x {w:g}" for d, w in zip(data, weights, strict=False)] if several else data[0][:12]
    return flatten(tree)


def _one_value(tree: Any) -> Any:
    """A list of parts as a list of words, so that a list is one setting whatever its length."""
    if isinstance(tree, dict):
        return {k: _one_value(v) for k, v in tree.items()}
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        return [_in_words(item) for item in tree]
    return tree


def _in_words(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    options = ", ".join(f"{k}={_in_words(v)}" for k, v in item.items() if k != "kind" and v is not None)
    kind = str(item.get("kind", ""))
    return f"{kind}({options})" if options else kind


def fingerprints(run: Run, config: Mapping[str, Any], notes: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Of the token folders: as the run noted them, else its checkpoint, else what stands in those folders now."""
    for note in reversed(notes):
        if note.get("do") == "start" and note.get("datasets"):
            return tuple(str(dataset[1]) for dataset in note["datasets"])
    for step in run.steps():
        state = read_json(run.checkpoints / f"step_{step}" / "training_state" / "state.json")
        if data := state.get("state", {}).get("data"):
            return tuple(data)
    mix = config.get("data")
    paths = [m.get("path", "") for m in mix] if isinstance(mix, list) else [mix]
    found = [read_json(Path(str(path)) / "manifest.json").get("fingerprint") for path in paths if path]
    return tuple(str(f) for f in found) if found and all(found) else ()


def standing(
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[Mapping[str, Any]],
    trial: Mapping[str, Any] | None,
) -> tuple[Status, str]:
    """How far a run came, and a note on it."""
    last = rows[-1]
    step = int(last["step"])
    planned = planned_steps(config)
    of = f"step {step:,}" + (f" of {planned:,}" if planned else "")
    losses = [row[k] for row in rows[-20:] for k in ("val/nll", "train/nll") if is_number(row.get(k))]
    ends = [note.get("status") for note in notes if note.get("do") in ("start", "end")]
    count = next((row["train/skipped"] for row in reversed(rows) if is_number(row.get("train/skipped"))), 0)
    skipped = f"{count:.0f} updates were skipped as not finite" if count else ""
    if losses and not math.isfinite(losses[-1]):
        return "diverged", f"its loss is no number at {of}"
    if count > (config.get("max_skipped") or 0) or (count and config.get("nonfinite") == "stop"):
        return "diverged", f"it was stopped at {of}: {skipped}"  # the policy of the training loop
    if trial is not None and trial["status"] == "failed":
        return "failed", f"{of}: {trial.get('error') or 'the ledger gives no reason'}"
    if ends and ends[-1] == "FAILED":
        return "failed", f"it ended with an error at {of}"
    if trial is not None and trial["status"] == "done" and trial["share"] < 1:
        return "cut short", f"the search ended it at {of}"
    if has_its_length(config, rows, planned) or (ends and ends[-1] == "FINISHED"):
        return "complete", skipped
    if planned is None and config.get("epochs") is not None and not ends:
        return "complete", "its length is in epochs and nothing says whether it was reached; taken as complete"
    return "incomplete", f"it stands at {of}"


def planned_steps(config: Mapping[str, Any]) -> int | None:
    """Updates that the config asks for, where it says so without the data."""
    if config.get("steps"):
        return int(config["steps"])
    if config.get("tokens") and config.get("batch_tokens"):
        return max(1, -(-int(config["tokens"]) // int(config["batch_tokens"])))
    return None


def has_its_length(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], planned: int | None) -> bool:
    if planned is not None and int(rows[-1]["step"]) >= planned:
        return True
    if config.get("seconds") and float(rows[-1].get("train/elapsed_s") or 0.0) >= float(config["seconds"]):
        return True
    patience = config.get("patience")
    losses = [row["val/nll"] for row in rows if is_number(row.get("val/nll"))]
    return bool(patience and len(losses) > patience and min(losses[:-patience]) <= min(losses[-patience:]))


def costs(
    path: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], frozenset[str]]:
    """cost.json, and what can be had without it from the config (parameters, FLOP) and metrics.jsonl (the rest)."""
    measured = {k: float(v) for k, v in read_json(path / "cost.json").items() if is_number(v)}
    found: dict[str, float | None] = {
        "tokens": _last(rows, "train/tokens"),
        "seconds": _last(rows, "train/elapsed_s"),
        "step_time_s": _median(rows, "train/step_time_s"),
        "memory_gb": max((r["system/memory_gb"] for r in rows if is_number(r.get("system/memory_gb"))), default=None),
    }
    if not {"parameters", "flops", *Ops().counts()} <= set(measured):
        figures = model_figures(json.dumps(config.get("model")), config.get("seq_len"))
        found |= figures
        found["flops"] = figures["flops"] * found["tokens"] if figures.get("flops") and found["tokens"] else None
    derived = {k: float(v) for k, v in found.items() if v is not None and k not in measured}
    return {**measured, **derived}, frozenset(derived)


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if is_number(row.get(key))), None)


def _median(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if is_number(row.get(key))]
    return statistics.median(values[1:] or values) if values else None  # the first step compiles and warms up


@functools.lru_cache(maxsize=4096)
def model_figures(model: str, seq_len: int | None) -> dict[str, float]:
    """Parameters, and per token training FLOPs and operations, of a model's config (JSON text).

    Nothing where it cannot be built.
    """
    import torch

    from models.families import Family, create
    from pipelines.lib.cost import operations

    try:
        spec: Any = build(Family, json.loads(model))
        with torch.device("meta"):
            flops = create(spec).flops_per_token(seq_len or spec.seq_len)
        figures = {"parameters": float(spec.n_parameters()), "flops": float(flops)}
        return figures | operations(spec, seq_len or spec.seq_len)
    except (ConfigError, NotImplementedError):  # a family that is not here, or a vocabulary that was never known
        return {}


def machine_of(notes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the last start noted of machine and source."""
    start = next((note for note in reversed(notes) if note.get("do") == "start"), None)
    if start is None:
        return {}
    tags = start.get("tags") or {}
    found = {k: str(tags[k]) for k in ("host", "python", "version.torch", "version.ray") if tags.get(k)}
    return {**found, **({"commit": str(start["git_sha"])} if start.get("git_sha") else {})}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if the file is not there or holds none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def digest(settings: Mapping[str, Any]) -> str:
    """A name for equal settings, however they were written."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
