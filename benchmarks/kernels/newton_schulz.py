"""Symmetric products and orthogonalisations beside the library's whole products and torch.optim.Muon's iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.kernels.row import Row
from kernels.newton_schulz import METHODS, orthogonalise, orthogonalise_reference, symmetric_product


def flops(batch: int, m: int, n: int, steps: int) -> float:
    """Of both symmetric products' upper halves and the third product, m <= n."""
    return steps * batch * (m * m * n + m**3 + 2 * m * m * n)


def product(device: str, batch: int, m: int, n: int, dtype: torch.dtype) -> Row:
    torch.manual_seed(0)
    x = (torch.randn(batch, m, n, device=device) / n**0.5).to(dtype)

    def check() -> None:
        error = (symmetric_product(x[:1]).double() - x[:1].double() @ x[:1].double().mT).abs().max()
        assert error <= (1e-5 if dtype == torch.float32 else 2e-2), error

    out = torch.empty(batch, m, m, device=device, dtype=dtype)
    return Row(
        "symmetric_product", f"{batch} x [{m}, {n}] {str(dtype).removeprefix('torch.')}",
        lambda: symmetric_product(x), check, {"torch.bmm": lambda: torch.bmm(x, x.mT, out=out)},
        batch * m * m * n, (x.numel() + out.numel()) * x.element_size(), str(dtype).removeprefix("torch."),
    )  # fmt: skip


def iteration(device: str, batch: int, m: int, n: int) -> Row:
    """Five classic steps in bfloat16, which torch.optim.Muon takes too, one matrix at a time."""
    torch.manual_seed(0)
    u = torch.randn(batch, m, n, device=device)
    method, dtype = METHODS["classic"], torch.bfloat16

    def check() -> None:
        exact = orthogonalise_reference(u[0].double(), method)
        error = (orthogonalise(u[:1], method, dtype=dtype)[0].double() - exact).norm() / exact.norm()
        assert error <= 0.06, error

    peers: dict[str, Callable[[], Any]] = {
        "whole products, batched": lambda: orthogonalise(u, method, dtype=dtype, impl="reference"),
        "the same in float32": lambda: orthogonalise(u, method, dtype=torch.float32),
    }
    try:
        from torch.optim._muon import _zeropower_via_newtonschulz

        peers["torch.optim.Muon's"] = lambda: [_zeropower_via_newtonschulz(one, method[0], 5, 1e-7) for one in u]
    except ImportError:
        pass
    return Row(
        "newton_schulz", f"{batch} x [{m}, {n}], classic, bfloat16", lambda: orthogonalise(u, method, dtype=dtype),
        check, peers, flops(batch, min(m, n), max(m, n), 5), 0.0, "bfloat16",
    )  # fmt: skip


def rows(device: str) -> Iterator[Row]:
    if device == "cuda":
        for batch, m, n in ((12, 768, 768), (12, 768, 3072), (30, 1152, 1152), (30, 1152, 6144), (1, 4096, 4096)):
            yield product(device, batch, m, n, torch.bfloat16)
            yield iteration(device, batch, m, n)
        return
    for dtype in (torch.float32, torch.bfloat16):
        for batch, m, n in ((4, 256, 256), (4, 256, 1024), (2, 768, 768), (1, 768, 3072)):
            yield product(device, batch, m, n, dtype)
    for batch, m, n in ((4, 256, 256), (4, 1024, 256), (1, 768, 768), (1, 3072, 768)):
        yield iteration(device, batch, m, n)
