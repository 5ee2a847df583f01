"""Gated linear units, packed as MLPs have them, beside PyTorch's own, its compiler's and Liger's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.row import Row
from kernels.glu import glu, glu_reference

Unit = Callable[[Tensor], Tensor]


def peers(device: str, activation: str) -> dict[str, Unit]:
    def plain(packed: Tensor) -> Tensor:
        return glu_reference(packed, None, activation)

    found: dict[str, Unit] = {"PyTorch": plain, "compiled": torch.compile(plain, dynamic=False)}
    if device == "cuda" and activation in ("silu", "gelu_tanh"):
        try:
            if activation == "silu":
                from liger_kernel.ops.swiglu import LigerSiLUMulFunction as Liger  # type: ignore[import-not-found]
            else:
                from liger_kernel.ops.geglu import LigerGELUMulFunction as Liger  # type: ignore[import-not-found]

            # Its backward writes over its inputs, so they are copies that the chunks make.
            found["liger"] = lambda packed: Liger.apply(*(half.contiguous() for half in packed.chunk(2, -1)))
        except ImportError:
            pass
    return found


def row(device: str, way: str, N: int, M: int, dtype: torch.dtype, activation: str) -> Row:
    torch.manual_seed(0)
    packed = torch.randn(N, 2 * M, device=device, dtype=dtype, requires_grad=way == "both")
    dy = torch.randn(N, M, device=device, dtype=dtype)

    def ours(packed: Tensor) -> Tensor:
        return glu(packed, activation=activation)

    def call(unit: Unit) -> Callable[[], Any]:
        if way == "forward":
            return lambda: unit(packed)
        return lambda: torch.autograd.grad(unit(packed), packed, dy)

    def check() -> None:
        exact = packed.detach().float().requires_grad_()
        want = glu_reference(exact, None, activation)
        torch.testing.assert_close(ours(packed).float(), want, rtol=0.02, atol=0.02)
        if way == "both":
            (a,), (b,) = (torch.autograd.grad(y, x, dy.to(y.dtype)) for y, x in ((ours(packed), packed), (want, exact)))
            torch.testing.assert_close(a.float(), b, rtol=0.03, atol=0.03)

    return Row(
        "glu",
        f"{activation} {way} N={N} F={M} {str(dtype).removeprefix('torch.')}",
        call(ours),
        check,
        {k: call(v) for k, v in peers(device, activation).items()},
        flops=(6.0 if way == "forward" else 20.0) * N * M,
        bytes=float((3 if way == "forward" else 8) * N * M * packed.element_size()),
        dtype="float32",
    )


def rows(device: str) -> Iterator[Row]:
    if device == "cuda":
        for M in (2048, 3072, 8192):
            for way in ("forward", "both"):
                yield row(device, way, 16384, M, torch.bfloat16, "silu")
        for activation in ("gelu", "gelu_tanh", "relu2"):
            yield row(device, "both", 16384, 3072, torch.bfloat16, activation)
    else:
        for dtype in (torch.float32, torch.bfloat16):
            for M in (384, 704):
                yield row(device, "both", 2048, M, dtype, "silu")
