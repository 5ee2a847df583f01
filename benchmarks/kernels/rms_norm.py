"""RMSNorm and add + norm, forward, backward, and both, beside PyTorch's own, its compiler's, Liger's and QuACK's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.row import Row
from kernels.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-5
Norm = Callable[..., Any]


def peers(device: str, D: int) -> dict[str, Norm]:
    """Norms of one tensor: (x, gain) -> y."""

    def plain(x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, (D,), gain.to(x.dtype), EPS)

    found: dict[str, Norm] = {"F.rms_norm": plain, "compiled": torch.compile(plain, dynamic=False)}
    if device == "cuda":
        try:
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # type: ignore[import-not-found]

            found["liger"] = lambda x, gain: LigerRMSNormFunction.apply(x, gain, EPS, 0.0, "llama", False)
        except ImportError:
            pass
        try:
            from quack import rmsnorm  # type: ignore[import-not-found]

            found["quack"] = lambda x, gain: rmsnorm(x, gain, eps=EPS)
        except ImportError:
            pass
    return found


def sum_peers(D: int) -> dict[str, Norm]:
    """Sum and norm: (x, gain, residual) -> y, s."""

    def plain(x: Tensor, gain: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        s = x + residual
        return F.rms_norm(s, (D,), gain.to(x.dtype), EPS), s

    return {"sum, F.rms_norm": plain, "compiled": torch.compile(plain, dynamic=False)}


def ours(x: Tensor, gain: Tensor, residual: Tensor | None = None) -> Any:
    return rms_norm(x, gain, eps=EPS, residual=residual)


def row(device: str, way: str, N: int, D: int, dtype: torch.dtype, summed: bool = False) -> Row:
    """way: "forward", "backward" or "both"."""
    torch.manual_seed(0)
    x, residual, *dy = (torch.randn(N, D, device=device, dtype=dtype) for _ in range(4 if summed else 3))
    x.requires_grad_(way != "forward")
    gain = torch.rand(D, device=device, requires_grad=way != "forward")
    given = (x, gain, residual.requires_grad_(way != "forward")) if summed else (x, gain)
    leaves = given

    def call(norm: Norm) -> Callable[[], Any]:
        if way == "forward":
            return lambda: norm(*given)
        if way == "both":
            return lambda: torch.autograd.grad(norm(*given), leaves, dy)
        torch._functorch.config.donated_buffer = False  # or compiled code refuses to run backward twice
        made = norm(*given)
        return lambda: torch.autograd.grad(made, leaves, dy, retain_graph=True)

    def check() -> None:
        def reference(*arguments: Tensor) -> Any:
            first, weight, *other = arguments
            return rms_norm_reference(first, weight, eps=EPS, residual=other[0] if other else None)

        near: dict[str, Any] = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(ours(*given), reference(*given), **near)
        if way != "forward":
            got, want = (torch.autograd.grad(norm(*given), leaves, dy) for norm in (ours, reference))
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), **near)

    tensors = {"forward": 4 if summed else 2, "backward": 4 if summed else 3, "both": 8 if summed else 5}[way]
    name = f"{'sum + norm, ' if summed else ''}{way} N={N} D={D} {str(dtype).removeprefix('torch.')}"
    others = sum_peers(D) if summed else peers(device, D)
    return Row(
        "rms_norm",
        name,
        call(ours),
        check,
        {k: call(v) for k, v in others.items()},
        flops=8.0 * N * D,
        bytes=float(tensors * N * D * x.element_size()),
        dtype="float32",
        goal="0.85 of the copy's rate, 2x liger" if device == "cuda" and way == "backward" else "",
    )


def rows(device: str) -> Iterator[Row]:
    if device == "cuda":
        for D in (768, 1152, 2048, 4096, 8192):
            for way in ("forward", "backward", "both"):
                yield row(device, way, 16384, D, torch.bfloat16)
        for D in (768, 2048):
            for way in ("forward", "backward"):
                yield row(device, way, 16384, D, torch.bfloat16, summed=True)
        yield row(device, "both", 16384, 768, torch.float32)
        yield row(device, "both", 16384 * 12, 64, torch.bfloat16)
    else:
        for dtype in (torch.float32, torch.bfloat16):
            for D in (128, 256, 1024):
                yield row(device, "both", 2048, D, dtype)
        yield row(device, "both", 2048, 256, torch.float32, summed=True)
