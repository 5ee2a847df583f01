"""From hidden states and the head to the loss and both gradients, beside full logits and the chunked public ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.row import Row
from kernels.linear_cross_entropy import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits, made wide as a training loop makes them."""
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def full_narrow(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits in the dtype of the product."""
    return F.cross_entropy(F.linear(x, weight), targets)


def ours(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(x, weight, targets, reduction="mean")[0]


def peers(device: str, dtype: torch.dtype) -> dict[str, Loss]:
    found: dict[str, Loss] = {"full logits": full}
    if dtype != torch.float32:
        found["full logits, not widened"] = full_narrow
    try:
        options = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy, chunked"] = lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options)
    except AttributeError:
        pass  # since torch 2.13
    if device == "cuda":
        found["full logits, compiled"] = torch.compile(full, dynamic=False)
        try:
            from liger_kernel.ops.fused_linear_cross_entropy import (  # type: ignore[import-not-found]
                LigerFusedLinearCrossEntropyFunction,
            )

            def liger(accumulator: torch.dtype | None) -> Loss:
                return lambda x, w, t: LigerFusedLinearCrossEntropyFunction.apply(
                    x, w, t, None, None, -100, 0.0, 0.0, "mean", None, False, accumulator
                )[0]

            found |= {"liger": liger(None), "liger, float32 sums": liger(torch.float32)}
        except ImportError:
            pass
        try:
            from cut_cross_entropy import linear_cross_entropy as cut  # type: ignore[import-not-found]

            found["cut_cross_entropy, exact"] = lambda x, w, t: cut(x, w, t, impl="cce_exact")
        except ImportError:
            pass
        try:
            from quack.linear_cross_entropy import chunked_linear_cross_entropy  # type: ignore[import-not-found]

            found["quack"] = lambda x, w, t: chunked_linear_cross_entropy(x, w, t)
        except ImportError:
            pass
    return found


def row(device: str, N: int, D: int, V: int, dtype: torch.dtype, goal: str = "") -> Row:
    torch.manual_seed(0)
    x = torch.randn(N, D, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, D, device=device) / D**0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), device=device)

    def call(loss: Loss) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(x, weight, targets), (x, weight))

    def check() -> None:
        few = min(N, 1024)  # more than one chunk of a large vocabulary; all of them would be 16 GiB of logits
        part = x[:few].detach().requires_grad_()
        truth, found = full(part, weight, targets[:few]), ours(part, weight, targets[:few])
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=0)
        near = 1e-5 if dtype == torch.float32 else 0.02
        for a, b in zip(
            torch.autograd.grad(found, (part, weight)), torch.autograd.grad(truth, (part, weight)), strict=True
        ):
            torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), rtol=0, atol=near)

    return Row(
        "linear_cross_entropy",
        f"forward and backward N={N} D={D} V={V} {str(dtype).removeprefix('torch.')}",
        call(ours),
        check,
        {name: call(peer) for name, peer in peers(device, dtype).items()},
        flops=6.0 * N * D * V,
        bytes=2.0 * (N * D + V * D) * x.element_size(),
        dtype=str(dtype).removeprefix("torch."),
        goal=goal,
    )


def rows(device: str) -> Iterator[Row]:
    if device == "cuda":
        for D in (768, 1152):
            for V in (32768, 50304, 131072, 262144):
                yield row(device, 16384, D, V, torch.bfloat16, "1.35x floor, 2x liger")
        yield row(device, 16384, 768, 50257, torch.bfloat16)
        yield row(device, 16384, 768, 50304, torch.float32)
    else:
        for dtype in (torch.float32, torch.bfloat16):
            yield row(device, 2048, 128, 4096, dtype, "no slower than full logits")
            yield row(device, 2048, 256, 4096, dtype, "no slower than full logits")
            yield row(device, 2048, 768, 4096, dtype, "no slower than full logits")
            yield row(device, 2048, 256, 50304, dtype, "no slower than full logits, a quarter of its peak memory")
        yield row(device, 2048, 768, 50304, torch.bfloat16, "no slower than full logits, a quarter of its peak memory")
        yield row(device, 512, 128, 65, torch.float32)
