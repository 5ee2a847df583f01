"""Norm, gain and rotation of queries and keys, from a slice of one wide matrix to what library attention reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.row import Row
from kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference

Form = Callable[..., tuple[Tensor, Tensor]]


def row(device: str, way: str, B: int, T: int, H: int, K: int, h: int, norm: str | None, dtype: torch.dtype) -> Row:
    """way: "forward" or "both"."""
    torch.manual_seed(0)
    width = (H + K) * h
    qkv = torch.randn(B, T, width + K * h, device=device, dtype=dtype, requires_grad=way == "both")
    gains = [torch.rand(h, device=device, requires_grad=way == "both") if norm else None for _ in range(2)]
    angle = torch.arange(T, device=device)[None, :, None, None] * 10000.0 ** (-torch.arange(0, h, 2, device=device) / h)
    cos, sin = torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)
    # Attention gives gradients in its own layout.
    grads = tuple(torch.randn(B, n, T, h, device=device, dtype=dtype).transpose(1, 2) for n in (H, K))
    leaves = [t for t in (qkv, *gains) if t is not None]

    def call(form: Form) -> Callable[[], Any]:
        def forward() -> tuple[Tensor, Tensor]:
            qk = qkv[..., :width].view(B, T, H + K, h)
            return form(qk, H, cos, sin, norm=norm, gain_q=gains[0], gain_k=gains[1])

        return forward if way == "forward" else lambda: torch.autograd.grad(forward(), leaves, grads)

    def check() -> None:
        near: dict[str, Any] = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        for a, b in zip(call(qk_norm_rope)(), call(qk_norm_rope_reference)(), strict=True):
            torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), **near)

    size = B * T * width * qkv.element_size()
    flops = 15.0 if norm else 6.0
    return Row(
        "qk_norm_rope",
        f"{norm or 'no norm'} {way} B={B} T={T} H={H} K={K} h={h} {str(dtype).removeprefix('torch.')}",
        call(qk_norm_rope),
        check,
        {
            "PyTorch": call(qk_norm_rope_reference),
            "compiled": call(torch.compile(qk_norm_rope_reference, dynamic=False)),
        },
        flops=flops * (1 if way == "forward" else 3) * B * T * width,
        bytes=float(size * (2 if way == "forward" else 5 if norm else 4)),
        dtype="float32",
        goal="1.1x compiled" if device == "cuda" else "",
    )


def rows(device: str) -> Iterator[Row]:
    if device == "cuda":
        for norm in ("rms", None):
            for way in ("forward", "both"):
                for shape in ((16, 1024, 12, 12, 64), (16, 1024, 16, 4, 64), (8, 2048, 16, 8, 128)):
                    yield row(device, way, *shape, norm, torch.bfloat16)
    else:
        for norm in ("rms", None):
            for dtype in (torch.float32, torch.bfloat16):
                yield row(device, "both", 4, 512, 4, 4, 64, norm, dtype)
