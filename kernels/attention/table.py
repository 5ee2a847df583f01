"""Which path attention takes, by what was measured, and the command that measures.

    python -m kernels.attention.table

measures this machine's device and writes its rows of measured.py anew. Rows of other devices stay. Where a kind of
device has no rows (no GPU has yet), the rule is: PyTorch's fused attention for the triangle alone, norm and rotation
before it or not, since its library kernels are hard to beat there; Triton where a dense mask or a padded key would be
needed, or where PyTorch has no fused form at all: window, segments, sink, soft-cap.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention import measured
from kernels.attention.forward import WIDEST
from kernels.op import triton

FEATURES = ("causal", "window", "segments", "sink", "softcap")
# Forward and backward count together; a path other than PyTorch's must win by this much to be taken.
MARGIN = 1.05


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


def cases(device: str) -> list[tuple[torch.dtype, int, int, int, int]]:
    """dtype, B, H, T, h: sizes that a training step has there."""
    if device == "cuda":
        return [
            (dtype, max(1, 16384 // T), 12, T, h)
            for dtype in (torch.bfloat16, torch.float32)
            for h in (64, 128)
            for T in (256, 1024, 2048, 4096)
        ]
    return [
        (dtype, max(1, 1024 // T), 4, T, h)
        for dtype in (torch.float32, torch.bfloat16)
        for h in (32, 64)
        for T in (64, 256, 512, 1024)
    ]


def arguments(feature: str, dtype: torch.dtype, B: int, H: int, T: int, h: int, device: str) -> dict[str, Any]:
    """Random q, k and v with gradients, and the one option. Documents have T / 4 tokens on average."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, h, generator=generator).to(device, dtype).requires_grad_() for _ in range(3))
    args: dict[str, Any] = {"q": q, "k": k, "v": v}
    if feature == "window":
        args["window"] = T // 4
    elif feature == "softcap":
        args["softcap"] = 50.0
    elif feature == "sink":
        args["sink"] = torch.zeros(H, device=device).requires_grad_()
    elif feature == "segments":
        args["segments"] = (torch.rand(B, T, generator=generator) < 4 / T).cumsum(1).to(device)
    return args


def measure(device: str, rounds: int = 7) -> list[Row]:
    """Every path of every case by turns, the least of `rounds` times each: other work on the machine only adds."""
    from kernels.attention import attention

    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found = []
    for dtype, B, H, T, h in cases(device):
        for feature in FEATURES:
            args = arguments(feature, dtype, B, H, T, h, device)
            leaves = [a for a in args.values() if isinstance(a, Tensor) and a.requires_grad]
            paths = ["triton" if device == "cuda" else "cpu", "reference" if feature == "softcap" else "sdpa"]

            def step(path: str, args: dict[str, Any] = args, leaves: list[Tensor] = leaves) -> None:
                torch.autograd.grad(attention(**args, impl=path).sum(), leaves)

            best = dict.fromkeys(paths, float("inf"))
            for n in range(rounds + 1):
                for path in paths:
                    took = seconds(functools.partial(step, path), device)
                    if n:  # the first one compiles and touches memory
                        best[path] = min(best[path], took)
            ms = {path: round(1000 * s, 3) for path, s in best.items()}
            found.append(Row(kind, str(dtype).removeprefix("torch."), h, T, feature, ms, date.today().isoformat()))
            print(*found[-1], flush=True)
    return found


def seconds(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> int:
    rows = measure("cuda" if torch.cuda.is_available() else "cpu")
    kept = [row for row in ROWS if row.device != rows[0].device]
    lines = "".join(f"    {tuple(row)!r},\n".replace("'", '"') for row in kept + rows)
    head = '"""What table.py measured: device, dtype, head size, T, feature, milliseconds by path, day.\n\n'
    head += 'Written by `python -m kernels.attention.table`.\n"""\n\nfrom __future__ import annotations\n\n'
    Path(measured.__file__).write_text(f"{head}ROWS: tuple[tuple, ...] = (\n{lines})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
