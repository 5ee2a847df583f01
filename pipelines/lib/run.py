"""A run folder: what is in it, who may write it, and which checkpoint a name means.

    runs/NAME/  config.yaml  metrics.jsonl  log.txt  samples.txt  cost.json  estimate.json  mlflow.json
                checkpoints/step_N/  last  best  .ray/

The folder is the truth of a run. `last` and `best` are small files that name a checkpoint. A checkpoint is a Hugging
Face folder with `training_state/` in it, and is valid only with its `manifest.json`, which is written last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from models.spec import flatten
from pipelines.lib.config import FORMAT_VERSION, InputError, recipe, write_yaml
from pipelines.lib.shards import file_sha256, write_atomically

MANIFEST = "manifest.json"


def write_atomic(path: Path, text: str) -> None:
    """Replace the file's text in one step, and wait for the disk: a reader or a kill sees the old or the new."""
    write_atomically(path, text.encode(), sync=True)


class Run:
    """The files of one run folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()

    config = property(lambda self: self.path / "config.yaml")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    log = property(lambda self: self.path / "log.txt")
    samples = property(lambda self: self.path / "samples.txt")
    cost = property(lambda self: self.path / "cost.json")
    estimate = property(lambda self: self.path / "estimate.json")
    checkpoints = property(lambda self: self.path / "checkpoints")
    stop_request = property(lambda self: self.path / ".stop")

    def exists(self) -> bool:
        """Whether something was trained here. A start that failed leaves a config at most, which counts for nothing."""
        return self.config.is_file() and (self.metrics.is_file() or bool(self.steps()))

    def read_config(self) -> dict[str, Any]:
        return recipe(self.config)

    def write_config(self, tree: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.config, write_yaml({"format_version": FORMAT_VERSION, **tree}))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run against a second driver; the system frees it when this process ends, however it ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        holder = self.path / ".driver"
        lock = filelock.FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            who = holder.read_text().strip() if holder.is_file() else "another process"
            raise InputError(f"{self.path} is being written by {who}; wait for it or choose another out=") from None
        try:
            holder.write_text(f"process {os.getpid()}")
            yield
        finally:
            lock.release()

    def point(self, name: str, checkpoint: str) -> None:
        """Let `last` or `best` name a checkpoint."""
        write_atomic(self.path / name, checkpoint + "\n")

    def pointed(self, name: str) -> str | None:
        path = self.path / name
        return path.read_text(errors="replace").strip() if path.is_file() else None

    def steps(self) -> list[int]:
        """Steps of the checkpoint folders that are there, valid or not, newest first."""
        found = []
        for path in self.checkpoints.glob("step_*"):
            if path.name[5:].isdigit():
                found.append(int(path.name[5:]))
        return sorted(found, reverse=True)

    def drop(self, checkpoint: str) -> None:
        """Delete a checkpoint and the pointers that name it.

        Its manifest goes first: a kill in between leaves nothing half valid.
        """
        for name in ("last", "best"):
            if self.pointed(name) == checkpoint:
                (self.path / name).unlink()
        (self.checkpoints / checkpoint / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints / checkpoint, ignore_errors=True)

    def newest_valid(
        self, say: Callable[[str], None] = lambda message: None, but: frozenset[str] = frozenset()
    ) -> Path | None:
        """The newest checkpoint whose every file is as its manifest says; each damaged one is said and passed over.

        but: names of checkpoints that are known to be damaged.
        """
        for step in self.steps():
            path = self.checkpoints / f"step_{step}"
            if path.name in but:
                continue
            faults = damage(path)
            if not faults:
                return path
            say(f"checkpoint {path.name} is not usable ({'; '.join(faults)}); trying the one before it")
        return None


def damage(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint folder: file, expected, found. Empty when every file is as the manifest says."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return [f"{manifest}: missing, so it was never finished"]
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return [f"{manifest}: not readable as JSON with `files`"]
    faults = []
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            faults.append(f"{path}: missing")
        elif path.stat().st_size != entry["bytes"]:
            faults.append(f"{path}: expected {entry['bytes']} bytes, found {path.stat().st_size}")
        elif (found := file_sha256(path)) != entry["sha256"]:
            faults.append(f"{path}: expected sha256 {entry['sha256'][:16]}, found {found[:16]}")
    return faults


def resolve(path: str | Path, which: str = "best", say: Callable[[str], None] = print) -> Path:
    """The Hugging Face folder that a user means by `path`: a run (then `which`), a checkpoint, or any HF folder.

    which: `best`, `last` or `step_N`; a run that has no `best` gives its `last`. A damaged checkpoint is named and the
    newest good one used instead, except when it was asked for by its step. Raises InputError.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such folder; a run folder or a Hugging Face model folder is needed")
    if (path / "config.json").is_file():
        if (path / "training_state").is_dir() and (faults := damage(path)):
            raise InputError(f"checkpoint {path.name} is not usable ({'; '.join(faults)})")
        return path
    run = Run(path)
    if not run.checkpoints.is_dir():
        raise InputError(f"{path}: neither a run folder (no checkpoints/) nor a Hugging Face folder (no config.json)")
    if which.startswith("step_"):
        chosen = run.checkpoints / which
        if not chosen.is_dir():
            there = ", ".join(f"step_{s}" for s in run.steps()) or "none yet"
            raise InputError(f"{path}: no checkpoint {which!r}; there is {there}")
        if faults := damage(chosen):
            raise InputError(f"checkpoint {which} is not usable ({'; '.join(faults)})")
        return chosen
    if which not in ("best", "last"):
        raise InputError(f"which={which!r}; there is best, last, step_N")
    named = dict.fromkeys(p for p in (run.pointed(which), run.pointed("last")) if p is not None)
    for name in named:
        faults = damage(run.checkpoints / name)
        if not faults:
            return run.checkpoints / name
        say(f"checkpoint {name} is not usable ({'; '.join(faults)}); trying another one")
    newest = run.newest_valid(say, but=frozenset(named))
    if newest is None:
        raise InputError(f"{path}: no valid checkpoint yet; train it with python -m pipelines.train ... out={path}")
    return newest


def differences(old: dict[str, Any], new: dict[str, Any], ignore: frozenset[str] = frozenset()) -> list[str]:
    """One line per setting in which two config trees differ; settings whose top name is in `ignore` do not count."""
    a, b = flatten(old), flatten(new)
    lines = []
    for k in dict.fromkeys([*a, *b]):
        if k.split(".")[0].split("[")[0] not in ignore and a.get(k) != b.get(k):
            lines.append(f"{k}: {a.get(k, '(not there)')} -> {b.get(k, '(not there)')}")
    return lines
