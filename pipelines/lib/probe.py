"""Measure a few seconds of a training run, for its estimate."""

from __future__ import annotations

import dataclasses as dc
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipelines.lib.cluster import usable_cpus
from pipelines.lib.counting import count
from pipelines.lib.estimate import BESIDE_BYTES, GIB, Pace, device_kind, gappy
from pipelines.lib.loop import Trainer, samples
from pipelines.lib.run import Run
from pipelines.lib.runlog import Log
from pipelines.lib.shards import TokenFolder
from pipelines.lib.training import TrainConfig
from pipelines.lib.world import World, choose_device

PROBE_S = 2.0  # for the updates; validation, saving and samples are measured once each


@dataclass(frozen=True)
class Probe:
    """A few seconds of a run, measured. gaps: memory beyond what was counted, in parts of it."""

    pace: Pace
    gaps: float
    notes: tuple[str, ...]


def probe(config: TrainConfig, folders: Sequence[TokenFolder] | None = None, seconds: float = PROBE_S) -> Probe:
    """Train, validate and save for a moment in a folder that is removed again.

    config, folders: as for `estimate`.  Workers beyond the first are not started: their share is counted.
    """
    before = torch.get_num_threads()
    micros = min(2, config.micros)
    with tempfile.TemporaryDirectory(prefix="novella-estimate-") as scratch:
        small = dc.replace(
            config, out=scratch, batch_tokens=micros * config.micro_batch * config.context, steps=10**6, tokens=None,
            epochs=None, seconds=None, num_workers=0, threads=threads_of(config), verify="size", init_from=None,
            nonfinite="skip", max_skipped=10**6,
        )  # fmt: skip
        try:
            world = World(device=choose_device(config.device))
            trainer = Timed(small, Run(scratch), world, Log(None), list(folders) if folders else None)
            first, usual, apply_s = _updates(trainer, seconds)
            val_first, val_s, statistics_s = _validation(trainer, usual / micros)
            began = time.perf_counter()
            if config.sample_prompts and config.sample_tokens:
                samples(trainer)
            statistics_s += time.perf_counter() - began
            began = time.perf_counter()
            trainer.save(best=False)
            trainer.update(stop=False, measure=False)  # as in a run: the writer has its copies, and training goes on
            trainer.checkpoints.wait()
            save_s = max(0.0, time.perf_counter() - began - usual)
            memory = trainer.cost.memory.gb() * GIB
        finally:
            torch.set_num_threads(before)
    counted = count(small)
    beside = BESIDE_BYTES if world.device.type == "cpu" else 0
    alive = counted.peak(micros > 1)
    gaps = max(0.0, (memory - beside - alive) / gappy(counted, alive))
    workers, notes = _workers(config)
    micro_s = (usual - apply_s) / micros
    update_s = -(-config.micros // workers) * micro_s + apply_s
    pace = Pace(
        tokens_per_s=config.batch_tokens / update_s,
        val_tokens_per_s=workers * config.micro_batch * config.context / val_s,
        measure_s=statistics_s,
        save_s=save_s,
        start_s=max(0.0, first - usual) + max(0.0, val_first - val_s),
    )
    return Probe(pace, gaps, notes)


def threads_of(config: TrainConfig) -> int | None:
    """CPU threads of a worker; None: the machine's own choice, as in-process training leaves it."""
    return config.threads or (max(1, int(config.cpus_per_worker)) if config.num_workers else None)


class Timed(Trainer):
    """A trainer that remembers how long its optimizer's part of each update took."""

    def _apply(self, scale: float, loss: float, measure: bool) -> tuple[float, bool]:
        self.wait()
        began = time.perf_counter()
        found = super()._apply(scale, loss, measure)
        self.wait()
        self.applied = [*getattr(self, "applied", ()), time.perf_counter() - began]
        return found

    def wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)


def _updates(trainer: Timed, seconds: float) -> tuple[float, float, float]:
    """Seconds of the first update, of a usual one, and of the optimizer's part of it."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < seconds + times[0] and len(times) < 50):
        at = time.perf_counter()
        trainer.update(stop=False, measure=False)
        times.append(time.perf_counter() - at)
    return times[0], statistics.median(times[1:]), statistics.median(trainer.applied[1:])


def _validation(trainer: Trainer, micro_s: float) -> tuple[float, float, float]:
    """Seconds of the first block of validation, of a usual one, and of the statistics beside it."""
    rows = trainer.config.micro_batch
    starts = trainer.val_starts
    blocks = max(1, min(-(-len(starts[0]) // rows), int(0.3 / max(micro_s, 1e-9)), 20))

    def score(n: int) -> float:
        trainer.val_starts = [starts[0][: n * rows]] + [s[:0] for s in starts[1:]]
        began = time.perf_counter()
        trainer.evaluate()
        return time.perf_counter() - began

    first, one = score(1), score(1)
    if blocks == 1:
        block = one
    else:
        block = (score(blocks) - one) / (blocks - 1)
    block = min(max(block, 0.1 * micro_s), one)
    trainer.val_starts = starts
    return first, block, one - block


def _workers(config: TrainConfig) -> tuple[int, tuple[str, ...]]:
    """Workers that truly work at the same time, with what must be said of them."""
    workers = max(1, config.num_workers)
    if workers == 1:
        return 1, ()
    notes = [f"measured with one worker; {workers} share the micro-batches, and what they tell each other is not timed"]
    here = max(1, usable_cpus() // (threads_of(config) or 1))
    if device_kind(config) == "cpu" and here < workers and "RAY_ADDRESS" not in os.environ:
        notes.append(f"{here} of them at a time: this machine has {usable_cpus()} CPUs")
        workers = here
    return workers, tuple(notes)
