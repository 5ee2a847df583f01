"""Energy that this machine's processors and GPUs have used, from their own counters.

Processors: RAPL's package counters (Linux, /sys/class/powercap; AMD's answer there too). GPUs: NVML, where the package
nvidia-ml-py is installed. Both count a whole device, whoever uses it: what runs beside a measurement is in it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """A counter of energy.

    name: of what it counts
    joules: reads it
    span: where it starts again from zero, in joules (None: it does not)
    """

    name: str
    joules: Callable[[], float]
    span: float | None = None


def rapl(root: Path = POWERCAP) -> list[Counter]:
    """The packages whose counters this process may read (many systems keep them for the administrator)."""
    found = []
    for zone in sorted(root.glob("intel-rapl:*")):
        # `intel-rapl:0:1` is a part of package 0, `intel-rapl-mmio:0` the same package again, `psys` holds them all.
        if not re.fullmatch(r"intel-rapl:\d+", zone.name):
            continue
        with contextlib.suppress(OSError, ValueError):
            name = (zone / "name").read_text().strip()
            if not name.startswith("package"):
                continue
            counter = Counter(name, partial(_joules, zone / "energy_uj"), _joules(zone / "max_energy_range_uj"))
            counter.joules()
            found.append(counter)
    return found


def _joules(path: Path) -> float:
    return int(path.read_text()) / 1e6


def nvml(devices: Sequence[Any]) -> list[Counter]:
    """The counters of these torch devices that are NVIDIA GPUs (Volta and newer have one)."""
    if not any(device.type == "cuda" for device in devices):
        return []
    import torch

    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver: then there is nothing to read
        return []
    found = []
    for device in devices:
        with contextlib.suppress(pynvml.NVMLError, AttributeError):
            # By its UUID: CUDA's numbers follow CUDA_VISIBLE_DEVICES, NVML's do not.
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            counter = Counter(f"GPU {device.index or 0}", partial(_gpu_joules, handle))
            counter.joules()
            found.append(counter)
    return found


def _gpu_joules(handle: Any) -> float:
    import pynvml

    return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def counters(devices: Sequence[Any] = (), root: Path = POWERCAP) -> list[Counter]:
    """Every counter that can be read here: the machine's packages, and the GPUs among `devices`."""
    return rapl(root) + nvml(devices)


def readable(devices: Sequence[Any] = ()) -> list[str]:
    """Names of what can be measured here, such as `package-0`; empty where nothing can."""
    return [counter.name for counter in counters(devices)]


class Meter:
    """Energy since it was made, or since its `with` began.

    Read it at least every few minutes: a counter that comes round twice between two readings hides a round.
    """

    def __init__(self, of: Sequence[Counter]):
        self.counters = list(of)
        self.restart()

    def restart(self) -> None:
        """Begin again from zero."""
        self._total = 0.0
        self._last = [counter.joules() for counter in self.counters]

    @property
    def names(self) -> list[str]:
        return [counter.name for counter in self.counters]

    def joules(self) -> float | None:
        """The sum over the counters; None where there is none."""
        for i, counter in enumerate(self.counters):
            now = counter.joules()
            used = now - self._last[i]
            self._total += used + (counter.span or 0.0) if used < 0 else used
            self._last[i] = now
        return self._total if self.counters else None

    def __enter__(self) -> Meter:
        self.restart()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.joules()
