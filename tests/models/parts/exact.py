"""Comparing a part with a loop written from its formula: values and gradients, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def exact(module: nn.Module, stir: float = 0.0) -> nn.Module:
    """The module in float64, with its parameters moved away from where they start."""
    module = nn.Module.to(module, torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * stir)
    return module


def agree(module: nn.Module, loop, x: Tensor, tolerance: float = 1e-11, **more) -> None:
    """module(x, **more) and loop(x, parameters, **more) have equal values and gradients, of x and of every parameter.

    module: in float64.  loop: from x and {name: parameter} to the same shape, with torch numbers one at a time.
    """
    x = x.detach().double().requires_grad_()
    parameters = dict(module.named_parameters())
    ours, want = module(x, **more), loop(x, parameters, **more)
    torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(want)
    leaves = [x, *parameters.values()]
    pairs = [torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True) for y in (ours, want)]
    for name, a, b in zip(["x", *parameters], *pairs, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        assert a.isfinite().all(), name
        scale = max(1.0, b.abs().max().item())
        assert (a - b).abs().max() <= 10 * tolerance * scale, f"{name}: {(a - b).abs().max():.1e} of {scale:.1e}"


def by_rows(x: Tensor, row) -> Tensor:
    """Applies row([numbers]) -> [numbers] to every row of x, one at a time."""
    flat = [torch.stack(row(list(r.unbind()))) for r in x.reshape(-1, x.shape[-1]).unbind()]
    return torch.stack(flat).view(*x.shape[:-1], -1)
