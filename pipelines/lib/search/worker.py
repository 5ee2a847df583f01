"""One piece of a trial, in the process that trains it: torch and files, no Ray.

A trial is an ordinary run folder. The token folders stay open from one trial to the next in the same process.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import traceback
from pathlib import Path
from typing import Any

from models.spec import ConfigError, build
from pipelines.lib.config import InputError
from pipelines.lib.jsonl import append, figures, row_at, rows
from pipelines.lib.run import Run, damage
from pipelines.lib.shards import TokenFolder
from pipelines.lib.training import TrainConfig

COST = "cost.json"
METRICS = ("val/bpb", "val/nll", "val/ppl", "val/score", "val/effective_rank", "val/spectrum_slope")


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Train one piece and say what came of it.

    job: {"config": plain TrainConfig, "run": absolute folder, "piece": fields of loop.Piece, "source": folder of the
    checkpoint to take over or None, "hold": names of the checkpoints that earlier pieces left}.  Returns {"status",
    "metrics", "cost", "checkpoint", "error"}; status `done` (also when the loss diverged: then it is NaN), `refused`
    for input that cannot be, `interrupted`, or `failed`.
    """
    run, until = Run(job["run"]), job["piece"]["until"]
    try:
        config: TrainConfig = build(TrainConfig, job["config"])
        with run.lock():
            run.stop_request.unlink(missing_ok=True)
            run.write_config(job["config"])
            if job.get("source"):
                take_over(run, Path(job["source"]))
            outcome = _train(job, config)
    except InputError as error:
        from pipelines.lib.loop import DIVERGED

        if DIVERGED in str(error):  # the policy on non-finite steps ended it: a finding, not a fault
            return _said(run, "done", dict.fromkeys(METRICS, math.nan), str(error))
        return _said(run, "refused", {}, str(error))
    except ConfigError as error:
        return _said(run, "refused", {}, str(error))
    except Exception as error:
        with open(run.log, "a", encoding="utf-8") as file:
            file.write(traceback.format_exc())
        return _said(run, "failed", {}, " ".join(f"{type(error).__name__}: {error}".split())[:500])
    if outcome.step < until and run.stop_request.exists():
        return _said(run, "interrupted", {}, "stopped")
    own = f"step_{outcome.step}"
    for step in run.steps():  # those on the way were for a kill; the one at the end is there if it is wanted
        if f"step_{step}" not in (own, *job["hold"]):
            run.drop(f"step_{step}")
    whole = (run.checkpoints / own).is_dir() and not damage(run.checkpoints / own)
    row = figures(row_at(run.metrics, outcome.step) or {})
    metrics = {k: v for k, v in row.items() if k.startswith("val/")}
    return _said(run, "done", metrics, outcome.stopped or "", f"checkpoints/{own}" if whole else None)


def _train(job: dict[str, Any], config: TrainConfig) -> Any:
    if config.num_workers:  # Ray Train, driven from inside this trial
        from pipelines.lib.launch import on_ray

        return on_ray(job, config, lambda text: None)
    from pipelines.lib.loop import train
    from pipelines.lib.world import World, choose_device

    folders = [open_once(mix.path, stamp(mix.path)) for mix in config.mixes]
    return train(job, World.current(choose_device(config.device)), folders=folders)


@functools.lru_cache(maxsize=8)
def open_once(path: str, stamped: float) -> TokenFolder:
    """A token folder, opened and checked by size; its hashes were checked when the search began."""
    return TokenFolder.open(path, verify="size")


def stamp(path: str) -> float:
    """When the folder's manifest was written, so that one that was made anew is opened anew."""
    manifest = Path(path) / "manifest.json"
    return manifest.stat().st_mtime if manifest.is_file() else 0.0


def take_over(run: Run, checkpoint: Path) -> None:
    """Begin a run where another one's checkpoint stands, with that one's curve up to there; nothing if it has begun."""
    if run.newest_valid() is not None:
        return
    if faults := damage(checkpoint):
        raise InputError(f"checkpoint {checkpoint} is not usable ({'; '.join(faults)})")
    target = run.checkpoints / checkpoint.name
    temporary = run.checkpoints / f".taking_{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(checkpoint, temporary)
    temporary.rename(target)
    run.point("last", checkpoint.name)
    step = int(checkpoint.name.removeprefix("step_"))
    run.metrics.unlink(missing_ok=True)
    for row, _ in rows(checkpoint.parent.parent / "metrics.jsonl"):
        if row is not None and row.get("step", math.inf) <= step:
            append(run.metrics, row)


def _said(
    run: Run, status: str, metrics: dict[str, float], error: str, checkpoint: str | None = None
) -> dict[str, Any]:
    cost = json.loads((run.path / COST).read_text()) if (run.path / COST).is_file() else {}
    return {
        "status": status,
        "metrics": metrics,
        "cost": {k: v for k, v in cost.items() if isinstance(v, int | float)},
        "checkpoint": checkpoint,
        "error": error,
    }
