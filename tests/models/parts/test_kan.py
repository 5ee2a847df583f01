"""Kolmogorov-Arnold networks against loops in float64, and the faults of the originals."""

from __future__ import annotations

import pytest
import torch
from numpy.polynomial.legendre import Legendre
from torch import nn

from models.gpt.config import GPT
from models.memory import At
from models.parts.activation import GELU
from models.parts.kan import KAN, legendre
from models.parts.linear_attention import NoMixing
from models.parts.position import NoPosition
from models.spec import ConfigError, build, plain


def network(spec, d=3, layers=1, seed=0):
    model = GPT(vocab_size=5, d_model=d, n_layers=layers, mlp=spec, position=NoPosition(), attention=NoMixing())
    block = model.blocks()[-1]
    module = nn.Module.to(block.mlp.build(block), torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module, block


CLOSED = [
    lambda x: x,
    lambda x: (3 * x**2 - 1) / 2,
    lambda x: (5 * x**3 - 3 * x) / 2,
    lambda x: (35 * x**4 - 30 * x**2 + 3) / 8,
]


def by_loops(m, x, order, act):
    """One token x [D]: a curve for every pair of input and output, by the closed forms of the polynomials."""
    for layer in m.layers:
        d_in, outputs = len(x), []
        for o in range(len(layer.base.weight)):
            total = layer.curves.bias[o]
            for i in range(d_in):
                squashed = torch.tanh(x[i])
                total = total + layer.base.weight[o, i] * act(x[i])
                for k in range(order):
                    total = total + layer.curves.weight[o, k * d_in + i] * CLOSED[k](squashed)
            outputs.append(total)
        n = len(outputs)
        mean = sum(outputs) / n
        deviation = (sum((y - mean) ** 2 for y in outputs) / n + 1e-5).sqrt()
        normed = [(y - mean) / deviation for y in outputs]
        x = torch.stack([act(y * g + b) for y, g, b in zip(normed, layer.norm.weight, layer.norm.bias, strict=True)])
    return x


silu = lambda x: x / (1 + torch.exp(-x))
gelu = lambda x: x * 0.5 * (1 + torch.erf(x * 0.5**0.5))


@pytest.mark.parametrize(
    "spec, order, act",
    [(KAN(), 3, silu), (KAN(order=1), 1, silu), (KAN(order=4, middle=(2, 5), activation=GELU()), 4, gelu)],
)
def test_value_and_gradients_equal_loops_in_float64(spec, order, act):
    m, _ = network(spec)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    leaves = [x, *m.parameters()]
    ours = m(x[None], At.full(1, 2))[0]
    want = torch.stack([by_loops(m, row, order, act) for row in x])
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-11)
    got = torch.autograd.grad((ours * weight).sum(), leaves)
    for g, w in zip(got, torch.autograd.grad((want * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-9)


def test_polynomials_are_numpys():
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    for k, values in enumerate(legendre(x, 9), start=1):
        torch.testing.assert_close(values, torch.from_numpy(Legendre.basis(k)(x.numpy())), rtol=1e-12, atol=1e-13)


def test_the_squash_does_not_leak_the_future():
    """ReaLLM-Forge scaled each channel by its least and greatest value over all tokens, later ones included."""
    m, _ = network(KAN(middle=(4,)))
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3:] *= 50
    changed[1] = 7
    at = At.full(2, 6)
    assert torch.equal(m(x, at)[0, :3], m(changed, at)[0, :3])
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(m(x, at)[0, 2].sum(), x)
    assert gradient[0, 2].any() and not gradient[0, [0, 1, 3, 4, 5]].any() and not gradient[1].any()


def test_nothing_is_remembered_between_calls():
    """ReaLLM-Forge memoised polynomials of every input it had seen."""
    m, _ = network(KAN())
    held = {id(t) for module in m.modules() for t in vars(module).values()}
    first = m(torch.ones(1, 2, 3, dtype=torch.float64), At.full(1, 2))
    m(torch.randn(1, 5, 3, dtype=torch.float64), At.full(1, 5))
    assert {id(t) for module in m.modules() for t in vars(module).values()} == held
    assert torch.equal(m(torch.ones(1, 2, 3, dtype=torch.float64), At.full(1, 2)), first)


def test_huge_inputs_stay_finite():
    m, _ = network(KAN(order=8))
    x = torch.tensor([[[1e30, -1e30, 0.0]]], dtype=torch.float64, requires_grad=True)
    y = m(x, At.full(1, 1))
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("spec", [KAN(), KAN(order=2, middle=(5, 7))])
def test_parameters_and_multiplications_follow_their_formulas(spec):
    m, block = network(spec, d=8)
    assert sum(p.numel() for p in m.parameters()) == block.mlp.n_parameters(block)
    matrices = sum(p.numel() for p in m.parameters() if p.dim() == 2)
    assert matrices < block.mlp.ops(block).multiplies < matrices + 200


def test_middle_is_a_list_of_its_own_and_order_may_be_one_per_layer():
    spec = KAN((2, 4), middle=(5, 7, 9))
    m, block = network(spec, layers=2)
    assert [len(layer.base.weight) for layer in m.layers] == [5, 7, 9, 3] and block.mlp.order == 4
    assert build(type(spec).__mro__[1], plain(spec)) == spec


def test_refuses_what_is_no_network():
    for spec, words in ((KAN(order=0), "order=0 must be at least 1"), (KAN(middle=(4, 0)), "middle=\\[4, 0\\]")):
        with pytest.raises(ConfigError, match=words):
            network(spec)
