"""What a stage will take, said before it runs: tokens, memory, disk, time, money.

`python -m pipelines.STAGE ... --estimate` measures a few seconds of the work on this machine, prints a table and leaves
nothing behind. What follows from a pace is one function for training, `estimate`, whether the pace comes from such a
probe or from a run's own first updates. Torch is imported only where something is measured or counted.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.lib.prices import Prices
from pipelines.lib.training import TrainConfig

if TYPE_CHECKING:
    from pipelines.lib.counting import Counted
    from pipelines.lib.probe import Probe
    from pipelines.lib.run import Run
    from pipelines.lib.shards import TokenFolder

GIB = 2**30
MANY_S = 1.0  # for the updates of each probe where there are several
FIRST_UPDATES = 5  # after so many a run's own pace is known; the first, which warms up, does not count
# On a CPU, freed tensors leave gaps that later ones do not fit into: resident memory beyond what is counted, in parts
# of it, up to ten million parameters (benchmarks/results/estimate.md). glibc gives back 32 MiB and more at once.
GAPS = 1 / 3
RETURNED_BYTES = 32 * 2**20
BESIDE_BYTES = 6 * 2**20  # resident beside all tensors: buffers of libraries, log, writer (measured: 4 to 10 MiB)
DURATIONS = (("min", 60, "s", 1, 3600), ("h", 3600, "min", 60, 86400), ("d", 86400, "h", 3600, math.inf))
ROW_BYTES = 400  # of a line of metrics.jsonl (measured; 580 with a validation)


@dataclass(frozen=True)
class Estimate:
    """What a piece of work takes; the keys are those of a run's cost.json. None: not known.

    tokens: that pass through it
    seconds: of work, without the start of processes
    memory_gb: peak of one worker, GiB
    disk_gb: left on the disk, GiB
    parts: what memory_gb or seconds is made of, by name, in its unit
    workers: processes
    notes: what was not counted, and what a figure rests on
    """

    tokens: int
    seconds: float | None = None
    memory_gb: float | None = None
    disk_gb: float | None = None
    parameters: int | None = None
    macs_per_token: float | None = None
    flops: float | None = None
    step_time_s: float | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, float]:
        """The figures that are known, as cost.json names them."""
        names = "parameters macs_per_token memory_gb disk_gb step_time_s tokens flops seconds".split()
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Pace:
    """How fast a run goes.

    tokens_per_s: of its updates, over all workers
    val_tokens_per_s: of validation (None: three times that, for it makes a third of the FLOPs)
    measure_s: beside each validation: statistics and samples
    save_s: of a checkpoint
    start_s: once: what the first update and the first validation take longer
    """

    tokens_per_s: float
    val_tokens_per_s: float | None = None
    measure_s: float = 0.0
    save_s: float = 0.0
    start_s: float = 0.0


@dataclass(frozen=True)
class Length:
    """How much a run does, by arithmetic. steps: None where its length is in seconds."""

    steps: int | None
    val_tokens: int  # of one validation over all workers, with the padding of the last blocks

    def validations(self, config: TrainConfig, steps: int) -> int:
        return -(-steps // config.eval_every)

    def saves(self, config: TrainConfig, steps: int) -> int:
        """Checkpoints written, if every validation is the best so far."""
        often = config.save_every or config.eval_every
        both = math.lcm(often, config.eval_every)
        due = steps // often + steps // config.eval_every - steps // both
        return due + (steps % often != 0 and steps % config.eval_every != 0)


def length(config: TrainConfig, folders: Sequence[TokenFolder]) -> Length:
    from pipelines.lib.loop import Batches, validation_windows

    epochs = config.epochs is not None
    steps = config.total_steps(Batches(config, list(folders)).order.samples_per_epoch if epochs else 0)
    rows = config.micro_batch
    starts = [len(validation_windows(f.split("val"), config.context, config.eval_tokens)) for f in folders]
    return Length(steps, sum(-(-n // rows) * rows * config.context for n in starts))


def estimate(
    config: TrainConfig,
    folders: Sequence[TokenFolder],
    pace: Pace | None = None,
    gaps: float | None = None,
    notes: tuple[str, ...] = (),
) -> Estimate:
    """What a training run takes.

    config: with its vocabulary and batch known (pipelines.train.resolve_config).  folders: its token folders.
    pace: None leaves the time open.  gaps: what an allocator wastes, in parts of what is alive (None: as usual).
    """
    from pipelines.lib.counting import count

    counted, size = count(config), length(config, folders)
    steps, seconds = size.steps, None
    if pace is not None:
        steps, seconds = _time(config, size, pace)
    elif config.seconds is not None:
        seconds = config.seconds
    steps = steps or 0
    memory = memory_bytes(config, counted, gaps)
    tokens = steps * config.batch_tokens
    flops = 6 * counted.macs_per_token
    return Estimate(
        tokens=tokens,
        seconds=seconds,
        memory_gb=sum(memory.values()) / GIB,
        disk_gb=disk_bytes(config, folders, counted, size.saves(config, steps), steps) / GIB,
        parameters=counted.parameters,
        macs_per_token=counted.macs_per_token,
        flops=flops * tokens,
        step_time_s=config.batch_tokens / pace.tokens_per_s if pace else None,
        parts={name: _size(n) for name, n in memory.items()} | {"logits (of the activations)": _size(counted.logits)},
        workers=max(1, config.num_workers),
        notes=notes + _cautions(config),
    )


def _time(config: TrainConfig, size: Length, pace: Pace) -> tuple[int, float]:
    """Updates and seconds of a run at a pace."""
    step_s = config.batch_tokens / pace.tokens_per_s
    val_s = size.val_tokens / (pace.val_tokens_per_s or 3 * pace.tokens_per_s) + pace.measure_s
    if size.steps is None:
        assert config.seconds is not None
        each = step_s + (val_s + pace.save_s) / config.eval_every
        return max(1, int((config.seconds - pace.start_s) / each)), config.seconds + val_s
    steps = size.steps
    rest = size.validations(config, steps) * val_s + size.saves(config, steps) * pace.save_s
    return steps, steps * step_s + rest + pace.start_s


def memory_bytes(config: TrainConfig, counted: Counted, gaps: float | None = None) -> dict[str, float]:
    """Peak memory of a worker by what it is for, in bytes."""
    on_cpu = device_kind(config) == "cpu"
    if gaps is None:
        gaps = GAPS if on_cpu else 0.0
    several = config.micros > max(1, config.num_workers) or config.num_workers > 1
    alive = counted.peak(several)
    rest = alive - counted.weights - counted.optimizer
    gradients = counted.gradients if several else 0
    return {
        "weights": counted.weights,
        "gradients": gradients,
        "optimizer state": counted.optimizer,
        "activations": rest - gradients,
        "gaps between tensors": gaps * gappy(counted, alive),
        "beside tensors": BESIDE_BYTES if on_cpu else 0,
    }


def gappy(counted: Counted, alive: int) -> int:
    """Of the bytes that are alive at once, those whose place an allocator keeps when they are freed."""
    return alive - (counted.logits if counted.logits // 2 >= RETURNED_BYTES else 0)


def checkpoint_bytes(folders: Sequence[TokenFolder], counted: Counted) -> int:
    """Weights, optimizer state and the tokenizer's files."""
    folder = folders[0].tokenizer_dir
    tokenizer = sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) if folder is not None else 0
    return counted.weights + counted.optimizer + tokenizer


def disk_bytes(config: TrainConfig, folders: Sequence[TokenFolder], counted: Counted, saves: int, steps: int) -> float:
    """The checkpoints that are kept (the newest, and the best if it is none of them) and the log."""
    kept = saves
    if config.keep_last:
        kept = min(saves, config.keep_last + 1 + (steps // config.keep_every if config.keep_every else 0))
    rows = steps // config.log_every + steps // config.eval_every
    return kept * checkpoint_bytes(folders, counted) + rows * ROW_BYTES


def device_kind(config: TrainConfig) -> str:
    from pipelines.lib.world import choose_device

    return choose_device(config.device).type


def _cautions(config: TrainConfig) -> tuple[str, ...]:
    notes = []
    if config.patience is not None:
        notes.append(f"patience={config.patience} may end it earlier")
    if config.compile:
        notes.append("memory is that of the run without compile=true, which needs less")
    return tuple(notes)


# ---- by a probe


def training(config: TrainConfig) -> Estimate:
    """A training run's estimate, by a probe. config: as the user gave it. Raises InputError or ConfigError."""
    from pipelines.lib.probe import probe
    from pipelines.train import resolve_config

    config, batches = resolve_config(config)
    found = probe(config, batches.folders)
    return estimate(config, batches.folders, found.pace, found.gaps, found.notes)


# ---- many at once


def estimate_many(configs: Sequence[TrainConfig], folders: Sequence[TokenFolder] | None = None) -> list[Estimate]:
    """Estimates of many runs, by probes of at most three of them: the least, middle and most FLOPs per token.

    The others' seconds and gaps per FLOP lie between theirs (linear in the logarithm of the FLOPs).
    configs: with vocabulary and batch known.  folders: open token folders that all of them read (None: their own).
    """
    from pipelines.lib.loop import open_data
    from pipelines.lib.probe import probe

    opened: dict[Any, Sequence[TokenFolder]] = {}

    def data(config: TrainConfig) -> Sequence[TokenFolder]:
        if folders is not None:
            return folders
        if config.data not in opened:
            opened[config.data] = open_data([mix.path for mix in config.mixes], "size")
        return opened[config.data]

    work = [_work(config) for config in configs]
    order = sorted(range(len(configs)), key=lambda i: work[i])
    some = {work[i]: configs[i] for i in (order[0], order[len(order) // 2], order[-1])} if order else {}
    for config in list(some.values())[:1]:
        probe(config, data(config), 0.0)  # thrown away: a process's first run loads what those after it find loaded
    probes = {at: probe(config, data(config), MANY_S) for at, config in some.items()}
    found = []
    for config, flops in zip(configs, work, strict=True):
        pace, gaps, notes = _between(probes, flops)
        found.append(estimate(config, data(config), pace, gaps, notes))
    return found


def _work(config: TrainConfig) -> float:
    from pipelines.lib.counting import count

    return 6 * count(config).macs_per_token


def _between(probes: Mapping[float, Probe], flops: float) -> tuple[Pace, float, tuple[str, ...]]:
    """Pace and gaps at so many FLOPs per token, from probes at others."""
    import numpy as np

    at = sorted(probes)
    logs = np.log(at)

    def lie(values: list[float]) -> float:
        return float(np.interp(math.log(flops), logs, values))

    each = [probes[a] for a in at]
    rate = lambda name: math.exp(lie([math.log(getattr(p.pace, name) * a) for p, a in zip(each, at, strict=True)]))
    pace = Pace(
        rate("tokens_per_s") / flops,
        rate("val_tokens_per_s") / flops,
        *(lie([getattr(p.pace, name) for p in each]) for name in ("measure_s", "save_s", "start_s")),
    )
    return pace, lie([p.gaps for p in each]), each[0].notes


# ---- beside a run


class Foretold:
    """Writes RUN/estimate.json from the pace of a run's first updates, once.

    Made before the trainer, so that what counting takes is no part of the run's memory and time.
    """

    def __init__(self, config: TrainConfig, run: Run, say: Callable[[str], None]):
        self.config, self.run = config, run
        self.times: list[float] = []
        self.done = False
        try:
            from pipelines.lib.counting import count

            count(config)
        except Exception as error:  # a part of somebody's own that needs real data costs the estimate, not the run
            say(f"no estimate: {type(error).__name__}: {error}")
            self.done = True

    def count(self, seconds: float, folders: Sequence[TokenFolder], end: int | None) -> None:
        """One more update and what it took. end: the last one; None where the length is in seconds."""
        if self.done:
            return
        self.times.append(seconds)
        if len(self.times) >= min(FIRST_UPDATES, end or FIRST_UPDATES):
            self.done = True
            if not self._is_there(end):
                self._write(folders)

    def _is_there(self, end: int | None) -> bool:
        """Whether an earlier attempt has left it; a run that has grown is foretold anew."""
        if not self.run.estimate.is_file():
            return False
        return end is None or json.loads(self.run.estimate.read_text())["tokens"] == end * self.config.batch_tokens

    def _write(self, folders: Sequence[TokenFolder]) -> None:
        from pipelines.lib.run import write_atomic

        usual = statistics.median(self.times[1:] or self.times)
        pace = Pace(self.config.batch_tokens / usual, start_s=max(0.0, self.times[0] - usual))
        found = estimate(self.config, folders, pace)
        write_atomic(self.run.estimate, json.dumps(found.record(), indent=1) + "\n")


# ---- showing


def show(found: Estimate, prices: Prices) -> None:
    """Print an estimate as a table."""
    from rich.table import Table

    from pipelines.lib.terminal import print_table

    money = prices.cost(found)  # first: a price that cannot be is said alone
    print("estimate; nothing was run or written")
    table = Table()
    table.add_column("what")
    table.add_column("figure", justify="right")
    each = " per worker" if found.workers > 1 else ""
    rows = [
        ("tokens", f"{found.tokens:,}"),
        ("parameters", None if found.parameters is None else f"{found.parameters:,}"),
        ("multiply-accumulates per token", None if found.macs_per_token is None else f"{found.macs_per_token:,.0f}"),
        ("FLOPs", None if found.flops is None else f"{found.flops:.3g}"),
        (f"memory{each}", None if found.memory_gb is None else _size(found.memory_gb * GIB)),
        *((f"  {name}", value) for name, value in found.parts.items() if value != NOTHING),
        ("disk", None if found.disk_gb is None else _size(found.disk_gb * GIB)),
        ("time", None if found.seconds is None else duration(found.seconds)),
        ("  of an update", None if found.step_time_s is None else f"{found.step_time_s:.3g} s"),
        ("money", money),
    ]
    for name, value in rows:
        if value is not None:
            table.add_row(name, value)
    print_table(table)
    for note in (*found.notes, *prices.notes()):
        print(f"note: {note}")


NOTHING = "0 B"


def _size(n: float) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:,.1f} {unit}"
    return f"{n:.0f} B"


def duration(seconds: float) -> str:
    """`0.25 s`, `3.2 s`, `4 min 10 s`, `5 h 20 min`, `3 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    large, unit, small, part = next(row for row in DURATIONS if seconds < row[4])[:4]
    return f"{int(seconds // unit)} {large} {int(seconds % unit // part)} {small}"
