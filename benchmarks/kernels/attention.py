"""Attention: the triangle, norm and rotation, and what PyTorch's fused form lacks: windows, documents, sinks, caps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.row import Row
from kernels.attention import attention, attention_reference

CASES: dict[str, dict[str, Any]] = {
    "triangle": {},
    "rms norm and rotation": {"qk_norm": "rms"},
    "window T/4": {"window": True},
    "documents of T/4": {"segments": True},
    "sink per head": {"sink": True},
    "soft-cap 50": {"softcap": 50.0},
}


def row(device: str, case: str, way: str, B: int, T: int, H: int, K: int, h: int, dtype: torch.dtype) -> Row:
    """way: "forward" or "both"."""
    generator, both = torch.Generator().manual_seed(0), way == "both"

    def draw(heads: int) -> Tensor:
        """[B, heads, T, h] as a projection gives it: heads side by side in memory."""
        made = torch.randn(B, T, heads, h, generator=generator).to(device, dtype)
        return made.requires_grad_(both).transpose(1, 2)

    q, k, v = draw(H), draw(K), draw(K)
    options = dict(CASES[case])
    seen = T * (T + 1) / 2
    if options.get("qk_norm"):
        angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, h, 2) / h)
        options |= {"cos": angle.cos().to(device), "sin": angle.sin().to(device)}
        options |= {f"gain_{name}": torch.ones(h, device=device) for name in "qk"}
    if options.get("window"):
        options["window"] = T // 4
        seen = T * (T // 4)
    if options.get("segments"):
        options["segments"] = (torch.arange(T, device=device) // (T // 4)).expand(B, T)
        seen = T * (T // 4) / 2
    if options.get("sink"):
        options["sink"] = torch.zeros(H, device=device)
    dy = torch.randn(B, T, H, h, generator=generator).to(device, dtype).transpose(1, 2)

    def call(fn: Callable[..., Tensor], **more: Any) -> Callable[[], Any]:
        def forward() -> Tensor:
            return fn(q, k, v, **options, **more)

        return (lambda: torch.autograd.grad(forward(), (q, k, v), dy)) if both else forward

    def check() -> None:
        near: dict[str, Any] = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-4}
        ours, truth = call(attention)(), call(attention_reference)()
        for a, b in zip(ours, truth, strict=True) if both else ((ours, truth),):
            torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), **near)

    peers = {"formula": call(attention_reference)}
    if "softcap" not in options:
        peers["SDPA"] = call(attention, impl="sdpa")
        if device == "cuda":
            peers["compiled, SDPA"] = call(torch.compile(attention, dynamic=False), impl="sdpa")
            peers["compiled, cuDNN"] = cudnn(call(torch.compile(attention, dynamic=False), impl="sdpa"))
    if device == "cuda":
        peers["Triton"] = call(attention, impl="triton")
    size = q.element_size() * B * T * (2 * H + 2 * K) * h
    return Row(
        "attention",
        f"{case} {way} B={B} T={T} H={H} K={K} h={h} {str(dtype).removeprefix('torch.')}",
        call(attention),
        check,
        peers,
        flops=4.0 * B * H * seen * h * (3.5 if both else 1.0),
        bytes=float(size * (3 if both else 1)),
        dtype=str(dtype).removeprefix("torch."),
        goal=("1.0x" if both else "1.1x") + " compiled + cuDNN" if device == "cuda" and T <= 2048 and h == 64 else "",
    )


def cudnn(run: Callable[[], Any]) -> Callable[[], Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forced() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return run()

    return forced


def rows(device: str) -> Iterator[Row]:
    if device == "cuda":
        for case in CASES:
            for way in ("forward", "both"):
                for shape in ((16, 1024, 12, 12, 64), (8, 2048, 16, 4, 64), (8, 2048, 16, 8, 128)):
                    yield row(device, case, way, *shape, torch.bfloat16)
    else:
        for case in CASES:
            for dtype in (torch.float32, torch.bfloat16):
                yield row(device, case, "both", 1, 1024, 4, 4, 64, dtype)
