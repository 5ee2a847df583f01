"""How an operation is judged: by its reference in float64, and by what PyTorch errs in the same dtype."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor


def arguments(op, shape, seed=0):
    return op.inputs(shape, torch.Generator().manual_seed(seed + sum(shape)))


def cast(args, dtype, device="cpu"):
    """The arguments on a device, floating ones in a dtype; those that required a gradient are leaves that do."""
    moved = {}
    for name, value in args.items():
        if isinstance(value, Tensor):
            floats = value.is_floating_point()
            value = value.detach().to(device, dtype if floats else value.dtype).requires_grad_(value.requires_grad)
        moved[name] = value
    return moved


def outputs_and_grads(fn, args, seed=1):
    """Outputs, then the gradient of every argument that asks for one, for the same weights of the outputs each time."""
    outputs = fn(**args)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    leaves = [a for a in args.values() if isinstance(a, Tensor) and a.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for o in outputs:
        weight = torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device)
        if o.requires_grad:
            total = total + (o.double() * weight).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True) if isinstance(total, Tensor) and leaves else []
    grads = [torch.zeros_like(a) if g is None else g for g, a in zip(grads, leaves, strict=True)] if grads else []
    return [o.detach() for o in outputs], grads


def check(op, args, dtype, impl="auto", device="cpu", times=2.0, floor=1e-6, fn=None):
    """Asserts that every output and gradient errs at most `times` what the reference errs in `dtype`.

    `args` are in float64; they are rounded to `dtype` first, and what is exact is the reference of the rounded ones.
    floor: of the budget, relative to the largest exact value: float32 sums in another order differ by so much.
    """
    rounded = cast(args, dtype)
    exact = flat(outputs_and_grads(op.reference, cast(rounded, torch.float64)))
    plain = flat(outputs_and_grads(op.reference, cast(rounded, dtype, device)))
    fn = fn or (op.fn if impl == "auto" else partial(op.fn, impl=impl))
    with poisoned():
        ours = flat(outputs_and_grads(fn, cast(rounded, dtype, device)))
    assert len(exact) == len(plain) == len(ours), (len(exact), len(ours))
    for place, (e, p, o) in enumerate(zip(exact, plain, ours, strict=True)):
        assert o.shape == e.shape, f"{op.name}, output {place}: shape {tuple(o.shape)}, expected {tuple(e.shape)}"
        if not e.numel():
            continue
        if place in op.exact:
            assert torch.equal(o.cpu(), e.to(o.dtype)), f"{op.name}, output {place}: not equal"
            continue
        p, o = p.cpu().double(), o.cpu().double()
        assert not o.isnan().any(), f"{op.name} {impl}, output {place}: NaN (an element that was never written?)"
        same = (o == e) | (e.isnan() & o.isnan())
        error = torch.where(same, 0.0, (o - e).abs()).max().item()
        budget = times * torch.where(p == e, 0.0, (p - e).abs()).max().item()
        budget += floor * max(1e-3, e[e.isfinite()].abs().max().item() if e.isfinite().any() else 0.0)
        assert error <= budget, f"{op.name} {impl} {dtype}, output {place}: error {error:.2e}, budget {budget:.2e}"


def flat(both):
    return [*both[0], *both[1]]


@contextmanager
def poisoned():
    """Memory from torch.empty and its kin holds NaN (integers: a large number), so that what is not written shows."""
    originals = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
    method = Tensor.new_empty

    def spoil(made):
        if made.is_floating_point():
            return made.fill_(float("nan"))
        return made if made.dtype == torch.bool else made.fill_(torch.iinfo(made.dtype).max // 3)

    for name, original in originals.items():
        setattr(torch, name, lambda *a, _original=original, **k: spoil(_original(*a, **k)))
    Tensor.new_empty = lambda *a, **k: spoil(method(*a, **k))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)
        Tensor.new_empty = method


def strided(args):
    """The same numbers with other strides: every second element of a wider last axis, rows far apart."""
    moved = {}
    for name, value in args.items():
        if isinstance(value, Tensor) and value.dim():
            gaps = torch.full((*value.shape[:-1], 2 * value.shape[-1] + 3), 7, dtype=value.dtype)
            if value.is_floating_point():
                gaps.fill_(float("nan"))
            spread = gaps[..., 1 : 1 + 2 * value.shape[-1] : 2]
            spread.copy_(value.detach())
            value = spread.requires_grad_(value.requires_grad)
        moved[name] = value
    return moved
