"""The Walsh-Hadamard transform and SRHT beside a radix-2 loop, two products of matrices and public kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.row import Row
from kernels.hadamard import SRHT, fwht, fwht_reference, srht, srht_reference


def radix_2(x: Tensor) -> Tensor:
    """The usual loop, writing between two buffers."""
    P, scale = x.shape[-1], x.shape[-1] ** -0.5
    a, b, h = x, torch.empty_like(x), 1
    while h < P:
        pair, to = a.view(-1, P // (2 * h), 2, h), b.view(-1, P // (2 * h), 2, h)
        torch.add(pair[:, :, 0], pair[:, :, 1], out=to[:, :, 0])
        torch.sub(pair[:, :, 0], pair[:, :, 1], out=to[:, :, 1])
        a, b, h = b, torch.empty_like(x) if a is x else a, 2 * h
    return a * scale


def two_products(P: int, device: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    A = 1 << ((P.bit_length() - 1) // 2)
    a, b = (fwht_reference(torch.eye(n, device=device)).to(dtype) for n in (A, P // A))
    return lambda x: (a @ (x.view(-1, A, P // A) @ b)).view(x.shape)


def transform(device: str, rows: int, P: int, dtype: torch.dtype) -> Row:
    torch.manual_seed(0)
    x = torch.randn(rows, P, device=device, dtype=dtype)
    peers: dict[str, Callable[[], Any]] = {"radix-2 loop": lambda: radix_2(x)}
    products = two_products(P, device, dtype)
    peers["two products"] = lambda: products(x)
    if device == "cuda":
        out = torch.empty_like(x)
        peers["copy"] = lambda: out.copy_(x)
        try:
            from fast_hadamard_transform import hadamard_transform  # type: ignore[import-not-found]

            peers["fast_hadamard_transform"] = lambda: hadamard_transform(x, P**-0.5)
        except ImportError:
            pass

    def check() -> None:
        some = x[:2]
        error = (fwht(some).double() - fwht_reference(some.double())).abs().max()
        assert error <= (1e-5 if dtype == torch.float32 else 4e-2), error

    return Row(
        "fwht", f"{rows} x {P:,} {str(dtype).removeprefix('torch.')}", lambda: fwht(x), check, peers,
        rows * P * (P.bit_length() - 1), 2 * x.numel() * x.element_size(), "float32",
        "0.85 of copy bandwidth up to 4,096" if device == "cuda" else "4 times the radix-2 loop",
    )  # fmt: skip


def sketch(device: str, rows: int, n: int, target: int, dtype: torch.dtype) -> Row:
    torch.manual_seed(0)
    x = torch.randn(rows, n, device=device, dtype=dtype)
    tables = [t.to(device) for t in SRHT.draw(n, target, torch.Generator().manual_seed(0))]

    def check() -> None:
        exact = srht_reference(x[:2].double(), *tables, block=256)
        error = (srht(x[:2], *tables, block=256).double() - exact).abs().max()
        assert error <= (1e-4 if dtype == torch.float32 else 5e-2), error

    return Row(
        "srht", f"{rows} x {n:,} to {target:,}, block 256, {str(dtype).removeprefix('torch.')}",
        lambda: srht(x, *tables, block=256), check, {"reference": lambda: srht_reference(x, *tables, block=256)},
        rows * tables[0].numel() * (tables[0].shape[1].bit_length() - 1),
        (x.numel() + rows * target) * x.element_size(), "float32",
    )  # fmt: skip


def rows(device: str) -> Iterator[Row]:
    if device == "cuda":
        for dtype in (torch.bfloat16, torch.float32):
            for log in range(12, 18):
                yield transform(device, (1 << 28) >> log, 1 << log, dtype)
        yield sketch(device, 4096, 65536, 32768, torch.bfloat16)
        yield sketch(device, 16384, 11264, 8192, torch.bfloat16)
        return
    for log in (10, 12, 14, 16, 17):
        yield transform(device, (1 << 21) >> log, 1 << log, torch.float32)
    yield sketch(device, 32, 65536, 32768, torch.float32)
    yield sketch(device, 128, 11264, 8192, torch.float32)
