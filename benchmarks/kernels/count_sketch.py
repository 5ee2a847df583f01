"""CountSketch, forward and forward with backward, beside index_add_ and scatter_add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.row import Row
from kernels.count_sketch import CountSketch, count_sketch, count_sketch_reference


def row(device: str, way: str, rows: int, n: int, m: int, dtype: torch.dtype) -> Row:
    """way: "forward" or "both"."""
    torch.manual_seed(0)
    x = torch.randn(rows, n, device=device, dtype=dtype, requires_grad=way == "both")
    dy = torch.randn(rows, m, device=device, dtype=dtype)
    tables = CountSketch.draw(n, m, torch.Generator().manual_seed(0))
    moved = [t.to(device) for t in tables]
    buckets, signs = tables.buckets.long().to(device), tables.signs.to(device, dtype)

    def index_add(x: Tensor) -> Tensor:
        return torch.zeros(rows, m, device=device, dtype=dtype).index_add_(1, buckets, x * signs)

    def scatter_add(x: Tensor) -> Tensor:
        return torch.zeros(rows, m, device=device, dtype=dtype).scatter_add_(1, buckets.expand(rows, n), x * signs)

    def call(f: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return (lambda: f(x)) if way == "forward" else (lambda: torch.autograd.grad(f(x), x, dy))

    def check() -> None:
        some = x[:2].detach()
        error = (count_sketch(some, *moved).double() - count_sketch_reference(some.double(), *moved)).abs().max()
        assert error <= (1e-4 if dtype == torch.float32 else 1e-1), error

    return Row(
        "count_sketch", f"{way}, {rows} x {n:,} to {m:,} {str(dtype).removeprefix('torch.')}",
        call(lambda x: count_sketch(x, *moved)), check,
        {"index_add_": call(index_add), "scatter_add_": call(scatter_add)},
        2 * x.numel() * (1 if way == "forward" else 2),
        (x.numel() + dy.numel()) * x.element_size() * (1 if way == "forward" else 2), "float32",
        f"{10 if device == 'cuda' else 5} times index_add_",
    )  # fmt: skip


def rows(device: str) -> Iterator[Row]:
    cuda = device == "cuda"
    for way in ("forward", "both"):
        for n, m in ((98560, 65536), (11264, 8192)):
            yield row(device, way, 1024 if cuda else 32, n, m, torch.bfloat16 if cuda else torch.float32)
