"""Learning-rate schedules: a multiplier of the peak as a function of how far the run is.

Every schedule rises linearly over `warmup_steps` updates, so that update number 0 already moves: (step + 1) / warmup.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from models.spec import Part


@dataclass(frozen=True)
class Schedule(Part):
    """warmup_steps: updates of linear rise from 0 to the peak"""

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} is negative")
        share = getattr(self, "min_ratio", 0.0)
        if not 0 <= share <= 1:
            raise ValueError(f"min_ratio={share} is outside [0, 1]; try 0.1")

    def __call__(self, step: int, total: float) -> float:
        """The multiplier for update `step` (from 0) of a run of `total` updates."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step, total)

    def after_warmup(self, step: int, total: float) -> float:
        raise NotImplementedError

    def progress(self, step: int, total: float) -> float:
        """0 at the end of the warm-up, 1 at the run's last update (and after it)."""
        return min(1.0, (step - self.warmup_steps) / max(1.0, total - 1 - self.warmup_steps))


@dataclass(frozen=True)
class Constant(Schedule):
    """Stays at the peak after the warm-up."""

    def after_warmup(self, step: int, total: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the peak down to min_ratio of it (SGDR, arXiv:1608.03983).

    min_ratio: where it ends, as a share of the peak
    """

    min_ratio: float = 0.1

    def after_warmup(self, step: int, total: float) -> float:
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * self.progress(step, total)))


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from the peak down to min_ratio of it.

    min_ratio: where it ends, as a share of the peak
    """

    min_ratio: float = 0.0

    def after_warmup(self, step: int, total: float) -> float:
        return 1 - (1 - self.min_ratio) * self.progress(step, total)


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay: at the peak until the last `decay_share` of the run (arXiv:2404.06395).

    decay_share: share of all updates that decay
    shape: of the decay; 1-sqrt is 1 - sqrt(progress) (arXiv:2405.18392)
    min_ratio: where it ends, as a share of the peak
    """

    decay_share: float = 0.2
    shape: Literal["linear", "1-sqrt", "cosine"] = "1-sqrt"
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"decay_share={self.decay_share} is outside [0, 1]; try 0.2")

    def after_warmup(self, step: int, total: float) -> float:
        decay = self.decay_share * total
        begin = total - decay
        if step < begin or decay == 0:
            return 1.0
        done = min(1.0, (step + 1 - begin) / decay)
        fall = {
            "linear": 1 - done,
            "1-sqrt": 1 - math.sqrt(done),
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        }[self.shape]
        return self.min_ratio + (1 - self.min_ratio) * fall


Schedule.kinds = {"constant": Constant, "cosine": Cosine, "linear": Linear, "wsd": WSD}
