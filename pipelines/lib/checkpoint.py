"""Write and read checkpoints: a Hugging Face folder with the training state in it, complete or not there at all.

Rank 0 copies the tensors in memory; a thread writes them under a temporary name, renames the folder and writes
`manifest.json` (bytes and sha256 of every file) last. So a kill, a full disk or a cut cable leaves the older checkpoint
whole, and training goes on while the new one is written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from pipelines.lib.config import InputError
from pipelines.lib.optimizer_state import Optimizers, join, split
from pipelines.lib.run import FORMAT_VERSION, MANIFEST, Run, write_atomic
from pipelines.lib.shards import file_sha256

STATE = "training_state"


@dataclass
class State:
    """Where a run stands, beside its tensors.

    step: updates made.  samples, tokens: consumed by them.  elapsed_s: spent training, over all attempts.
    best: lowest validation loss so far (nats).  stale: evaluations since then.  skipped: non-finite steps so far.
    owed: the log row of this step, if a stop request left out its validation.
    spent: what it has cost so far, as pipelines.lib.cost keeps it.
    plan: hash of the data order.  data: fingerprints of the token folders.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    skipped: int = 0
    owed: dict[str, float] | None = None
    spent: dict[str, Any] = field(default_factory=dict)
    plan: str = ""
    data: list[str] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run, as their writer sees them.

    keep_last: how many of the newest to keep besides `best`; 0 keeps all.  keep_every: also keep each multiple of this.
    tokenizer: folder whose files go into every checkpoint, or None.
    """

    def __init__(
        self,
        run: Run,
        keep_last: int = 2,
        keep_every: int = 0,
        tokenizer: Path | None = None,
        say: Callable[[str], None] = print,
    ):
        self.run, self.keep_last, self.keep_every = run, keep_last, keep_every
        self.tokenizer, self.say = tokenizer, say
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def clear_unfinished(self) -> None:
        """Remove what a killed writer left behind."""
        for path in self.run.checkpoints.glob(".writing_*"):
            shutil.rmtree(path, ignore_errors=True)

    def save(self, model: Any, optimizers: Optimizers, state: State, best: bool, wait: bool = False) -> None:
        """Snapshot now, write in the background. The error of an earlier write is raised here (or by `wait`)."""
        self.wait()
        copies: dict[int, torch.Tensor] = {}
        weights = {  # a tied weight is copied once, so transformers sees that it is shared
            k: copies.setdefault(id(v), v.detach().to("cpu", copy=True))
            for k, v in model.state_dict(keep_vars=True).items()
        }
        tensors, rest = split(optimizers, {id(p): n for n, p in model.named_parameters()})
        tensors = {k: v.to("cpu", copy=True).contiguous() for k, v in tensors.items()}
        record = {"format_version": FORMAT_VERSION, "state": asdict(state), "optimizers": rest}
        self._thread = threading.Thread(
            target=self._write,
            args=(model, weights, tensors, record, state.step, best),
            name="checkpoint",
            daemon=False,
        )
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, model: Any, weights: dict, tensors: dict, record: dict, step: int, best: bool) -> None:
        name = f"step_{step}"
        temporary, final = self.run.checkpoints / f".writing_{name}", self.run.checkpoints / name
        need = sum(t.nbytes for t in [*weights.values(), *tensors.values()])
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / STATE).mkdir(parents=True)
            free = shutil.disk_usage(temporary).free
            if free < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            disable_progress_bar()  # transformers draws one per weight file
            model.save_pretrained(temporary, state_dict=weights)
            if self.tokenizer is not None:
                for path in self.tokenizer.iterdir():
                    if path.is_file():
                        shutil.copyfile(path, temporary / path.name)
            save_file(tensors, temporary / STATE / "optimizer.safetensors")
            (temporary / STATE / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            for path in temporary.rglob("*.safetensors"):  # written for their owner alone
                path.chmod((temporary / "config.json").stat().st_mode)
            files = {}
            for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
                with open(path, "rb") as f:
                    os.fsync(f.fileno())
                entry = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                files[path.relative_to(temporary).as_posix()] = entry
            shutil.rmtree(final, ignore_errors=True)  # there only if it was damaged, or its writer was killed
            os.rename(temporary, final)
            write_atomic(final / MANIFEST, json.dumps({"format_version": FORMAT_VERSION, "step": step, "files": files}))
            self.run.point("last", name)
            if best:
                self.run.point("best", name)
            self._prune()
        except BaseException as error:
            self._error = self._explain(error, temporary, need)
            shutil.rmtree(temporary, ignore_errors=True)

    def _explain(self, error: BaseException, path: Path, need: int) -> BaseException:
        text = str(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text
        if not full:
            return error
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(self.run.path).free:,}"
        good = self.run.pointed("last")
        kept = f"checkpoint {good} is intact" if good else "no earlier checkpoint exists"
        return InputError(
            f"disk full while writing {path}: {need:,} bytes are needed, {free} are free; {kept}; "
            f"free some space and run the same command again"
        )

    def _prune(self) -> None:
        if not self.keep_last:
            return
        keep = {self.run.pointed("best"), self.run.pointed("last")}
        steps = self.run.steps()
        keep |= {f"step_{s}" for s in steps[: self.keep_last]}
        for s in steps:
            spared = self.keep_every and s % self.keep_every == 0
            if f"step_{s}" not in keep and not spared:
                self.run.drop(f"step_{s}")


def read_state(checkpoint: Path) -> State:
    """Where the run stood at a checkpoint. Raises InputError if this program cannot read its form."""
    record = json.loads((checkpoint / STATE / "state.json").read_text(encoding="utf-8"))
    if record["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{checkpoint}: training state of format {record['format_version']}; this program reads {FORMAT_VERSION}"
        )
    return State(**record["state"])


def restore(checkpoint: Path, model: Any, optimizers: Optimizers) -> State:
    """Put weights and optimizer state back, bit for bit, in place."""
    state = read_state(checkpoint)
    record = json.loads((checkpoint / STATE / "state.json").read_text(encoding="utf-8"))
    load_weights(checkpoint, model)
    tensors = load_file(checkpoint / STATE / "optimizer.safetensors")
    join(optimizers, {id(p): n for n, p in model.named_parameters()}, tensors, record["optimizers"])
    return state


def load_weights(folder: Path, model: Any) -> None:
    """Copy the weights of an HF folder into a model of the same shape; tied copies may be absent, nothing else."""
    weights = load_file(folder / "model.safetensors")
    own = dict(model.state_dict(keep_vars=True))
    tied = {k for k, v in own.items() if k not in weights and any(own[w] is v for w in weights if w in own)}
    missing, extra = sorted(set(own) - set(weights) - tied), sorted(set(weights) - set(own))
    if missing or extra:
        raise InputError(f"{folder}: its weights are not this model's (missing {missing[:3]}, unknown {extra[:3]})")
    with torch.no_grad():
        for k, v in weights.items():
            if own[k].shape != v.shape:
                raise InputError(f"{folder}: {k} has shape {tuple(v.shape)}, this model's has {tuple(own[k].shape)}")
            own[k].copy_(v)
