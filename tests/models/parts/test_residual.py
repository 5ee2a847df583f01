"""Residual rules equal loops of their formulas in value and gradient, and stay finite where those divide by 0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.parts.residual import Add, Confidence, Residual, ReZero, Scaled, Slerp
from models.spec import ConfigError

D = 6


def looped(rule: Residual, x: list[float], o: list[float], alpha: float, v: list[float]) -> list[float]:
    """The formulas in the docstrings, one token, plain Python."""
    s = [a + b for a, b in zip(x, o, strict=True)]
    gate = sum(a * b for a, b in zip(o, v, strict=True)) / math.sqrt(len(x))
    if isinstance(rule, Slerp):
        cosine = sum(a * b for a, b in zip(x, s, strict=True)) / math.hypot(*x) / math.hypot(*s)
        w = math.acos(cosine)
        near, far = math.sin((1 - alpha) * w) / math.sin(w), math.sin(alpha * w) / math.sin(w)
        return [near * a + far * b for a, b in zip(x, s, strict=True)]
    return [a + (alpha + gate) * b for a, b in zip(x, o, strict=True)]


RULES = [
    (Add(), 1.0, False),
    (Scaled(alpha=0.3), 0.3, False),
    (Scaled(alpha=0.3, learned=True, gated=True), 0.7, True),
    (ReZero(), 0.7, False),
    (Slerp(alpha=0.3), 0.3, False),
    (Slerp(alpha=0.3, learned=True), 0.7, False),
    (Confidence(), 0.7, True),
    (Confidence(constant=0.4, learned=False), 0.4, True),
]


@pytest.mark.parametrize("rule, alpha, gated", RULES)
def test_a_rule_is_its_formula_in_value_and_gradient(rule, alpha, gated):
    module = rule.build(D).double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.full((), alpha) if name == "alpha" else torch.randn(D))
    v = module.direction.detach().tolist() if gated else [0.0] * D
    x, o = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, D, dtype=torch.float64)
    o.requires_grad_()
    want = [[looped(rule, x[b, t].tolist(), o[b, t].tolist(), alpha, v) for t in range(3)] for b in range(2)]
    torch.testing.assert_close(module(x, o), torch.tensor(want, dtype=torch.float64))
    assert torch.autograd.gradcheck(module, (x, o))


@pytest.mark.parametrize("rule", [rule for rule, _, _ in RULES])
def test_parameters_are_counted(rule):
    assert sum(p.numel() for p in rule.build(D).parameters()) == rule.n_parameters(D)


@pytest.mark.parametrize(
    "x, o", [(1.0, 1.0), (1.0, -1.0), (1.0, -0.5), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, -2.0)]
)
def test_slerp_of_parallel_opposite_and_zero_vectors_is_the_line(x, o):
    """The original divided 0 by 0 there (its eps is 0), and its gradient was NaN."""
    a = torch.full((1, D), x, dtype=torch.float64, requires_grad=True)
    b = torch.full((1, D), o, dtype=torch.float64, requires_grad=True)
    y = Slerp(alpha=0.25).build(D)(a, b)
    torch.testing.assert_close(y, a + 0.25 * b)
    y.sum().backward()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


def test_slerp_is_continuous_where_it_becomes_the_line():
    module, x = Slerp(alpha=0.25, eps=1e-3).build(2), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    ys: list[Tensor] = [module(x, torch.tensor([[1.0, 2 * e]], dtype=torch.float64)) for e in (0.99e-3, 1.01e-3)]
    assert (ys[0] - ys[1]).abs().max() < 1e-4


def test_slerp_keeps_the_length_of_two_unit_vectors():
    x = torch.nn.functional.normalize(torch.randn(50, D, dtype=torch.float64), dim=-1)
    y = torch.nn.functional.normalize(torch.randn(50, D, dtype=torch.float64), dim=-1)
    out = Slerp(alpha=0.4).build(D)(x, y - x)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(50, dtype=torch.float64))


def test_a_gated_step_starts_at_its_alpha():
    """The original's `dot` rule began at alpha^2 = 0.0025 instead of alpha = 0.05."""
    module = Scaled(alpha=0.05, gated=True).build(D)
    x, o = torch.randn(3, D), torch.randn(3, D)
    torch.testing.assert_close(module(x, o), x + 0.05 * o)


def test_confidence_does_not_grow_with_the_width():
    """The original's o (o . v) with v = 1 grows like D; ours is divided by its root."""
    sizes = []
    for d in (64, 4096):
        module = Confidence(learned=False).build(d)
        with torch.no_grad():
            module.direction.normal_()
        x, o = torch.zeros(200, d), torch.randn(200, d)
        sizes.append((module(x, o).norm(dim=-1) / o.norm(dim=-1)).median().item())
    assert sizes[1] < 1.5 * sizes[0]


def test_rules_that_can_never_learn_are_refused():
    from models.gpt.config import GPT

    for rule in (Scaled(alpha=0.0), Slerp(alpha=0.0), Slerp(eps=0.0)):
        with pytest.raises(ConfigError, match="residual="):
            GPT(residual=rule)


def test_a_confidence_that_starts_silent_can_wake():
    """The laboratory's default: c is absent and v starts at 0; v gets the first gradient, then the branch."""
    module = Confidence(constant=0.0, learned=False).build(D)
    x, o = torch.randn(3, D), torch.randn(3, D)
    torch.testing.assert_close(module(x, o), x)
    module(x, o).square().sum().backward()
    assert bool((module.direction.grad != 0).all())
