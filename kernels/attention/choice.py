"""Which path attention takes, by what table.py measured.

Where a kind of device has no rows in measured.py (no GPU has any yet: unmeasured), the rule is: PyTorch's fused
attention for the triangle alone, norm and rotation before it or not, since its library kernels are hard to beat there;
Triton where a dense mask or a padded key would be needed, or where PyTorch has no fused form at all: window, segments,
sink, soft-cap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import measured
from kernels.attention.forward import WIDEST
from kernels.op import triton

FEATURES = ("causal", "window", "segments", "sink", "softcap")
# Forward and backward count together; a path other than PyTorch's must win by this much to be taken.
MARGIN = 1.1


class Row(NamedTuple):
    """ms: of forward and backward together, by path. window: T / 4 where the feature is a window."""

    device: str
    dtype: str
    size: int
    T: int
    feature: str
    ms: dict[str, float]
    day: str

    @property
    def best(self) -> str:
        """The fastest path, PyTorch's where the difference is small."""
        fastest = min(self.ms, key=self.ms.__getitem__)
        return "sdpa" if self.ms.get("sdpa", float("inf")) < MARGIN * self.ms[fastest] else fastest


ROWS = [Row(*row) for row in measured.ROWS]


def feature_of(window: int | None, softcap: float | None, sink: bool, segments: bool) -> str:
    """The one that decides, where there are several: what PyTorch's fused form is worst at."""
    if softcap is not None:
        return "softcap"
    return "sink" if sink else "segments" if segments else "window" if window is not None else "causal"


def fits(q: Tensor, v: Tensor) -> bool:
    """Whether the Triton kernels take these heads."""
    return q.dtype in (torch.float32, torch.float16, torch.bfloat16) and max(q.shape[-1], v.shape[-1]) <= WIDEST


def choice(q: Tensor, v: Tensor, window: int | None, softcap: float | None, sink: bool, segments: bool) -> str:
    """The path for these arguments: triton, cpu, sdpa or reference."""
    feature = feature_of(window, softcap, sink, segments)
    device = q.device.type
    able = (
        {"cpu"} if device == "cpu" else {"triton"} if device == "cuda" and triton is not None and fits(q, v) else set()
    )
    able |= {"sdpa"} if softcap is None else {"reference"}
    kind = "cpu" if device == "cpu" else gpu_name() if device == "cuda" else ""
    # float64 is not measured and follows float32.
    dtype = "float32" if q.dtype == torch.float64 else str(q.dtype).removeprefix("torch.")
    rows = [r for r in ROWS if (r.device, r.dtype, r.feature) == (kind, dtype, feature)]
    if rows:
        sizes = sorted({r.size for r in rows})
        size = next((s for s in sizes if s >= q.shape[-1]), sizes[-1])
        rows = sorted((r for r in rows if r.size == size), key=lambda r: r.T)
        best = next((r.best for r in rows if q.shape[2] <= r.T), rows[-1].best)
        if best in able:
            return best
    own = "cpu" if device == "cpu" else "triton"
    if own in able and feature != "causal":
        return own
    return "sdpa" if softcap is None else "reference"


@torch.compiler.assume_constant_result
def gpu_name() -> str:
    return torch.cuda.get_device_name()
