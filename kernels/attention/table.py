"""Measures the paths of attention on this machine's device and writes its rows of measured.py, which choice.py reads.

    python -m kernels.attention.table

Rows of other devices stay. On a GPU the paths are Triton and PyTorch's fused attention.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.attention import attention, measured
from kernels.attention.choice import FEATURES, ROWS, Row


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
        for T in (64, 128, 256, 512, 1024)
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
