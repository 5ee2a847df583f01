"""What a run has cost, as measured while it trained: RUN/cost.json."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch

from models.families import Family, create
from models.gpt.config import GPT
from models.loss import Loss
from models.optim.groups import AdamW
from pipelines.lib.energy import Meter, counters
from pipelines.lib.run import write_atomic
from pipelines.lib.world import World

GIB = 2**30
PACES = 512  # step times that are kept of a run, however long it is
READ_ENERGY_S = 30.0  # RAPL's counters come round after some ten minutes at full power


class Memory:
    """Peak memory of one piece of work inside a process that may have done others before.

    On a GPU what torch's allocator held, on Linux what was resident, both less what was there at the start; elsewhere
    the process's largest resident size so far, whatever it did before.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.how = "GPU memory allocated"
            self.start = torch.cuda.memory_allocated(device)
        else:
            if sys.platform == "linux":
                with contextlib.suppress(AttributeError):  # glibc's; without it what earlier work freed is not seen
                    ctypes.CDLL(None).malloc_trim(0)
            self.how = "resident memory of the process, above its start" if self.restart() else "largest resident size"
            self.start = _status("VmRSS") if self.how.startswith("resident") else 0
        self.restart()

    def restart(self) -> bool:
        """Forget the peak so far, but not the start. Returns whether this system can."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM
            return _status("VmHWM") > 0
        except OSError:
            return False

    def gb(self) -> float:
        """The peak in GiB."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.start) / GIB
        if self.how.startswith("resident"):
            return max(0, _status("VmHWM") - self.start) / GIB
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def operations(family: Family, T: int) -> dict[str, float]:
    """What a forward pass per token at context T asks of hardware, by name (models/cost.py); {} if no one says."""
    try:
        return family.ops(T).counts()
    except NotImplementedError:  # a family or part of somebody's own that counts nothing
        return {}


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


@functools.cache
def settle(device: torch.device) -> None:
    """One update of a very small model: what a process's first update loads is no part of a run's memory.

    Else the first run of a reused process would seem to need more than the same run after it.
    """
    before = torch.get_rng_state()
    model = create(GPT(vocab_size=16, d_model=24, n_layers=1, seq_len=16)).to(cast(Any, device))
    ids = torch.zeros(1, 16, dtype=torch.int64, device=device)
    Loss(model)(ids, ids)[0].backward()
    for optimizer in AdamW().build(model).values():
        optimizer.step()
    torch.set_rng_state(before)


class Cost:
    """The meters of one attempt at a run, going on from what the attempts before it had spent.

    Memory and step time are rank 0's. Energy is that of rank 0's machine: its processors, and its GPUs that the run
    uses; None of it on other machines.
    """

    def __init__(self, world: World):
        settle(world.device)
        self.memory = Memory(world.device)
        devices = [world.device]
        if world.size > 1 and world.device.type == "cuda":  # Ray Train shows a worker all GPUs of its machine's workers
            devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        self.meter = Meter(counters(devices))
        self.earlier: dict[str, Any] = {}
        self.paces: list[float] = []
        self.stride, self.seen = 1, 0
        self.read_at = time.monotonic()

    def resume(self, spent: dict[str, Any]) -> None:
        """Go on from the figures of a checkpoint."""
        self.earlier = dict(spent)
        self.paces, self.stride, self.seen = list(spent["paces"]), spent["stride"], spent["seen"]

    def count(self, seconds: float) -> None:
        """One update, without what came after it (validation, saving)."""
        if self.seen % self.stride == 0:
            self.paces.append(seconds)
        self.seen += 1
        if len(self.paces) == PACES:  # every second one from here on, so that those kept cover the whole run evenly
            self.paces, self.stride = self.paces[::2], 2 * self.stride
        if time.monotonic() - self.read_at > READ_ENERGY_S:
            self.read_at = time.monotonic()
            self.meter.joules()

    def spent(self) -> dict[str, Any]:
        """What a checkpoint must hold for `resume`."""
        return {
            "memory_gb": max(self.memory.gb(), self.earlier.get("memory_gb", 0.0)),
            "energy_j": self.joules(),
            "paces": self.paces,
            "stride": self.stride,
            "seen": self.seen,
        }

    def joules(self) -> float | None:
        """Energy over all attempts; None where any of them could not read it."""
        now = self.meter.joules()
        earlier = self.earlier.get("energy_j", 0.0)
        return None if now is None or earlier is None else now + earlier

    def figures(self) -> dict[str, float]:
        """The measured part of cost.json."""
        spent = self.spent()
        found = {"memory_gb": spent["memory_gb"]}
        if self.paces:
            found["step_time_s"] = statistics.median(self.paces)
        if spent["energy_j"] is not None:
            found["energy_j"] = spent["energy_j"]
        return found

    def write(self, path: Path, counted: dict[str, float]) -> None:
        """Write cost.json. counted: the figures that no meter gives (parameters, tokens, ...)."""
        how = {"memory_gb": self.memory.how, "energy_j": self.meter.names}
        write_atomic(path, json.dumps({**counted, **self.figures(), "how": how}, indent=1) + "\n")
