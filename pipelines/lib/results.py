"""What every measuring command shares: which model it measures, and where its results go.

A result is a folder with results.json (RUN/evaluation/NAME/ for a run); its figures also go to MLflow, under names
that `figures_of` makes. `pipelines.compare` reads the same files.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.spec import ConfigError, plain
from pipelines.lib.config import InputError
from pipelines.lib.jsonl import finite

FORMAT_VERSION = 1
LONGEST_CONTEXT = 2048  # of a model that states none, and of windows where a model states very many


@dataclass(frozen=True)
class Measuring:
    """The settings of every command that measures a model.

    run: run folder, checkpoint folder or any local Hugging Face folder
    which: the checkpoint of a run: best, last or step_N
    device: auto, cpu, cuda, mps or xpu
    dtype: number format of the weights; auto: as they were saved
    threads: CPU threads; null: the machine's own choice
    out: folder for results.json; null: RUN/evaluation/NAME, or evaluation/MODEL/NAME for what is no run
    overwrite: measure again where results of the same settings are, or others
    track: where figures go beside results.json
    """

    run: str
    which: str = "best"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = None
    out: str | None = None
    overwrite: bool = False
    track: Literal["mlflow", "none"] = "mlflow"

    def positive(self, *names: str) -> None:
        """Raise ConfigError for a setting that is given and not above zero."""
        for name in names:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} is not positive; leave it out for the default")


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """The model to measure. folder: its files.  run: the run it belongs to, if any.  step: of a checkpoint."""

    folder: Path
    run: Path | None
    step: int
    weights: dict[str, str]  # file -> sha256

    @property
    def name(self) -> str:
        return self.folder.name


def open_subject(config: Measuring) -> Subject:
    """Find the model that `run` means. Raises InputError for what is none, or has no weights."""
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.model_folder import weight_hashes
    from pipelines.lib.run import Run, resolve

    path = storage_path(config.run)
    folder = resolve(path, config.which, say=lambda message: print(message, file=sys.stderr))
    owner = folder.parent.parent if folder.parent.name == "checkpoints" else None
    number = folder.name.removeprefix("step_")
    return Subject(
        folder,
        owner if owner is not None and Run(owner).exists() else None,
        int(number) if number.isdigit() else 0,
        weight_hashes(folder),
    )


def open_model(subject: Subject, config: Measuring) -> Any:
    """The model in evaluation mode on its device. Raises InputError for damaged files, ConfigError for the device."""
    import torch

    from pipelines.lib.model_folder import open_folder
    from pipelines.lib.world import choose_device

    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return open_folder(subject.folder, config.dtype).to(device)


def context_of(model: Any, asked: int | None) -> int:
    """Tokens the model sees at most: `asked`, else its own. Raises ConfigError if that is longer than its own."""
    from pipelines.lib.model_folder import context_length

    own = context_length(model)
    if asked is not None and own is not None and asked > own:
        raise ConfigError(f"context={asked} is longer than the {own} tokens the model was made for")
    return asked or own or LONGEST_CONTEXT


# ---- what is written -------------------------------------------------------------------------------------------------


def about(subject: Subject, model: Any, config: Measuring, *packages: str) -> dict[str, Any]:
    """What results.json says of the model, the settings, the machine and the programs. packages: beside the usual."""
    from importlib.metadata import version

    import torch

    from pipelines.lib import machine

    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.processor()
    programs = ("torch", "transformers", "tokenizers", "numpy", *packages)
    return {
        "format_version": FORMAT_VERSION,
        "model": {
            "run": str(subject.run) if subject.run else None,
            "folder": str(subject.folder),
            "step": subject.step,
            "class": type(model).__name__,
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "sha256": subject.weights,
        },
        "config": plain(config),
        "device": f"{model.device} {device}".strip(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in programs}},
        "git_sha": machine.git_sha(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def where(config: Measuring, subject: Subject, words: Sequence[str], fingerprint: str) -> Path:
    """The folder of the results: `out`, or one whose name says what was measured and ends in the settings' hash."""
    from pipelines.lib.jobs import storage_path

    if config.out is not None:
        return storage_path(config.out)
    few = "-".join(words if len(words) <= 3 else [*words[:2], f"{len(words) - 2}_more"])
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in few)[:60]
    if subject.run is not None:
        return subject.run / "evaluation" / f"{subject.name}-{name}-{fingerprint[:8]}"
    return storage_path("evaluation") / subject.name / f"{name}-{fingerprint[:8]}"


def earlier(path: Path, fingerprint: str, overwrite: bool) -> dict[str, Any] | None:
    """The results that are there already. Raises InputError if they are of other settings, or no results at all."""
    if overwrite or not path.is_file():
        return None
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        same = old["fingerprint"] == fingerprint
        if not same:
            what = f"{old['model']['folder']} of {old['date']}"
    except (OSError, ValueError, KeyError, TypeError):
        same, what = False, "something that is no result of this version"
    if not same:
        raise InputError(f"{path} holds {what}, measured otherwise; choose another out=, or overwrite=true")
    return old


def write(path: Path, results: Mapping[str, Any]) -> None:
    """results.json, whole or not at all. Raises InputError if it cannot be written."""
    from pipelines.lib.run import write_atomic

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(finite(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"out={path.parent}: {error.strerror}") from None


def figures_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The figures under the names they have in MLflow: eval/NAME/METRIC, and its error at .../METRIC_stderr."""
    found: dict[str, float | None] = {}
    short = {"bits_per_byte": "bpb", "nats_per_token": "nll", "perplexity": "ppl"}
    for name, table in results["text"].items():
        for long, metric in short.items():
            found[f"eval/{name}/{metric}"] = table[long]
            found[f"eval/{name}/{metric}_stderr"] = table[f"{long}_stderr"]
        for baseline, value in table.get("baselines_bits_per_byte", {}).items():
            found[f"eval/{name}/bpb_{baseline}"] = value
    for task, table in results["tasks"].items():
        for metric, entry in table["metrics"].items():
            found[f"eval/{task}/{metric}"] = entry["value"]
            found[f"eval/{task}/{metric}_stderr"] = entry["stderr"]
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def track(config: Measuring, subject: Subject, results: Mapping[str, Any], out: Path, *more: str) -> None:
    """The figures on the run's own MLflow run, at the checkpoint's step; for what is no run, on a run of their own.

    more: names of files beside results.json that are logged with it, where they are.
    """
    from pipelines.lib.tracking import Tracker

    if config.track == "none":
        return
    files = [path for path in (out / name for name in ("results.json", *more)) if path.is_file()]
    figures = figures_of(results)
    if subject.run is not None:
        with Tracker.attach(subject.run) as tracker:
            tracker.metrics(figures, subject.step)
            for path in files:
                tracker.artifact(path, f"evaluation/{out.name}")
        return
    datasets = [(name, t["fingerprint"], str(t["source"]), "evaluation") for name, t in results["text"].items()]
    tags = {"model": str(subject.folder), "weights": next(iter(subject.weights.values()))}
    name = f"{subject.name} {out.name}"
    with Tracker.start(out, "evaluate", plain(config), name=name, tags=tags, datasets=datasets, system_s=0) as tracker:
        tracker.metrics(figures, subject.step)
        for path in files:
            tracker.artifact(path)
