"""Mixtures over depth equal loops of their formulas, and start where they say."""

from __future__ import annotations

import math

import pytest
import torch

from models.parts.depth import Attended, Routed, Weighted
from models.spec import ConfigError

L, D = 3, 5


def sources():
    return [torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True) for _ in range(L + 1)]


def loop(kind, module, xs):
    out = torch.zeros(2, 4, D, dtype=torch.float64)
    for b in range(2):
        for t in range(4):
            tokens = [x[b, t].tolist() for x in xs]
            if isinstance(kind, Weighted):
                weights = module.weight.tolist()
            elif isinstance(kind, Routed):
                scores = [sum(w * a for w, a in zip(row, tokens[-1], strict=True)) for row in module.weight.tolist()]
                best = sorted(range(L + 1), key=lambda i: -scores[i])[: kind.top_k]
                total = sum(math.exp(scores[i]) for i in best)
                weights = [math.exp(scores[i]) / total if i in best else 0.0 for i in range(L + 1)]
            else:
                q, scores = module.query.tolist(), []
                for x in tokens:
                    rms = math.sqrt(sum(a * a for a in x) / D + 1e-6)
                    scores.append(sum(a * b for a, b in zip(q, x, strict=True)) / rms / math.sqrt(D))
                total = sum(math.exp(s) for s in scores)
                weights = [math.exp(s) / total for s in scores]
            for i in range(D):
                out[b, t, i] = sum(w * x[i] for w, x in zip(weights, tokens, strict=True))
    return out


@pytest.mark.parametrize("kind", [Weighted(), Routed(), Routed(top_k=3), Attended()])
def test_a_mixture_is_its_formula_in_value_and_gradient(kind):
    module, xs = kind.build(L, D).double(), sources()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    torch.testing.assert_close(module(xs), loop(kind, module, xs))
    assert torch.autograd.gradcheck(lambda *x: module(x), xs)
    assert sum(p.numel() for p in module.parameters()) == kind.n_parameters(L, D)


def test_where_mixtures_start():
    from models.roles import initialise

    xs = sources()
    for kind, want in ((Weighted(), xs[-1]), (Attended(), sum(xs) / (L + 1))):
        module = kind.build(L, D).double()
        initialise(module, 0.02, 2)
        torch.testing.assert_close(module(xs), want)


def test_every_router_row_can_learn():
    """The original's top-1 router got no gradient: a softmax over one choice is constant."""
    module, xs = Routed().build(L, D).double(), sources()
    module(xs).square().sum().backward()
    assert bool((module.weight.grad.abs().sum(-1) > 0).sum() >= 2)
    with pytest.raises(ConfigError, match="cannot learn"):
        Routed(top_k=1)
