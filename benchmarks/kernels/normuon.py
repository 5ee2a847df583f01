"""A whole group's update beside torch.optim.Muon, the same loop with whole products, and stacks of equal shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.newton_schulz import flops
from benchmarks.kernels.row import Row
from kernels.newton_schulz import METHODS, orthogonalise
from kernels.normuon import new_statistic, normuon_update

Shapes = list[tuple[int, int]]


def of_model(layers: int, d: int) -> Shapes:
    """Packed queries, keys and values, the attention's output, and an MLP of four times the width."""
    return layers * [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]


def stacked(params: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
    """Muon's update with torch._foreach and one batch of products for each shape."""
    torch._foreach_lerp_(momenta, grads, 0.05)
    updates = torch._foreach_lerp(grads, momenta, 0.95)
    shapes: dict[torch.Size, list[int]] = {}
    for i, p in enumerate(params):
        shapes.setdefault(p.shape, []).append(i)
    for (m, n), at in shapes.items():
        o = orthogonalise(torch.stack([updates[i] for i in at]), "classic", dtype=torch.bfloat16).float()
        torch._foreach_mul_([params[i] for i in at], 1 - 0.02 * 0.1)
        torch._foreach_add_([params[i] for i in at], list(o.unbind()), alpha=-0.02 * max(1, m / n) ** 0.5)


def update(device: str, shapes: Shapes, name: str, like_muon: bool) -> Row:
    """like_muon: the five classic steps without statistic and caution, else all that NorMuon does, in seven steps."""
    torch.manual_seed(0)
    params, grads, momenta = ([0.02 * torch.randn(s, device=device) for s in shapes] for _ in range(3))
    statistics = [] if like_muon else [new_statistic(p) for p in params]
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "dtype": torch.bfloat16}
    if like_muon:
        settings |= {"cautious": False, "neuron_norm": None, "method": "classic"}
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    for p, g in zip(theirs, grads, strict=True):
        p.grad = g
    peers: dict[str, Callable[[], Any]] = {}
    if hasattr(torch.optim, "Muon"):
        muon = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
        peers["torch.optim.Muon"] = muon.step
    others = [[t.clone() for t in one] for one in (params, momenta, statistics)]
    peers["matrix by matrix, whole products"] = lambda: normuon_update(
        others[0], grads, others[1], others[2], **settings, impl="reference"
    )
    if like_muon:
        copies = [[t.clone() for t in one] for one in (params, momenta)]
        peers["stacks of equal shapes"] = lambda: stacked(copies[0], grads, copies[1])

    def check() -> None:
        """The four shapes once, against the reference in float64: bfloat16 errs by some percent of a step."""
        some = [[t.clone() for t in one[:4]] for one in (params, grads, momenta, statistics)]
        exact = [[t.double() for t in one] for one in some]
        start = [p.clone() for p in exact[0]]
        normuon_update(*some, **settings)
        normuon_update(*exact, **{**settings, "dtype": torch.float64}, impl="reference")
        for ours, want, before in zip(some[0], exact[0], start, strict=True):
            error = (ours.double() - want).norm() / (want - before).norm()
            assert error <= 0.1, error

    steps = len(METHODS["classic" if like_muon else "polar_express"])
    return Row(
        "normuon", f"{name}, {'as torch.optim.Muon' if like_muon else 'all of it'}",
        lambda: normuon_update(params, grads, momenta, statistics, **settings), check, peers,
        sum(flops(1, min(s), max(s), steps) for s in shapes), 20.0 * sum(m * n for m, n in shapes), "bfloat16",
        "1.5 times torch.optim.Muon" if like_muon else "",
    )  # fmt: skip


def rows(device: str) -> Iterator[Row]:
    for layers, d in ((4, 256), (12, 768)):
        kept = layers if device == "cuda" or d < 768 else 2
        name = f"{layers} layers of width {d}" if kept == layers else f"{kept} of {layers} layers of width {d}"
        for like_muon in (True, False):
            yield update(device, of_model(kept, d), name, like_muon)
