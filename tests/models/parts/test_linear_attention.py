"""Attention without a softmax against loops in float64; what it remembers; and the mixer that mixes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models.parts.linear_attention as file
from models.families import create
from models.gpt.config import GPT
from models.memory import At, Mem
from models.parts.attention import Attention, Causal
from models.parts.linear_attention import Diagonal, LinearAttention, NoMixing, chunkwise
from models.parts.position import ALiBi, NoPosition, Rotary
from models.spec import ConfigError


def mixer(spec, d=6, position=None, seed=0):
    model = GPT(
        vocab_size=5, d_model=d, n_layers=1, seq_len=64, attention=spec, position=position or NoPosition(), bias=True
    )
    block = model.blocks()[0]
    module = nn.Module.to(block.attention.build(block), torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.6)
    return module, block


def at_of(module, B, T, doc=None, pos=None):
    at = At.full(B, T) if doc is None else At(pos if pos is not None else torch.arange(T).expand(B, T), upto=T, doc=doc)
    at = at._replace(tables={})
    module.prepare(at, False, torch.float64)
    return at


def heads(m, x):
    """phi(q), phi(k) and v of one row, [T][H] vectors."""
    q, k, v = (x @ m.qkv.weight.T + m.qkv.bias).view(len(x), 3, m.H, m.h).unbind(1)
    phi = lambda t: torch.where(t * m.scale > 0, t * m.scale + 1, torch.exp((t * m.scale).clamp(max=0)))
    return phi(q), phi(k), v


def turned(vector, position, base=10000.0):
    """Rotary on pairs (i, i + h/2), by complex numbers."""
    half = len(vector) // 2
    out = list(vector)
    for i in range(half):
        a = position * base ** (-2 * i / len(vector))
        out[i] = vector[i] * math.cos(a) - vector[i + half] * math.sin(a)
        out[i + half] = vector[i + half] * math.cos(a) + vector[i] * math.sin(a)
    return torch.stack(out)


def by_loops(m, x, kind, doc=None, rotary=False, pos=None):
    """y_t of one row x [T, D], from all pairs of tokens: no state, no chunk."""
    q, k, v = heads(m, x)
    rows = []
    for t in range(len(x)):
        seen = [s for s in range(t + 1) if doc is None or doc[s] == doc[t]]
        parts = []
        for n in range(m.H):
            divisor = sum((q[t, n] * k[s, n]).sum() for s in seen)
            if kind == "diagonal":
                total = sum(q[t, n] * k[s, n] * v[s, n] for s in seen)
                parts.append(total / (divisor if divisor > 1e-3 else 1e-3))
                continue
            turn = (lambda u, p: turned(u, pos[p] if pos is not None else p)) if rotary else (lambda u, p: u)
            total = sum((turn(q[t, n], t) * turn(k[s, n], s)).sum() * v[s, n] for s in seen)
            parts.append(total / (divisor + m.eps))
        rows.append(m.out.weight @ torch.cat(parts) + m.out.bias)
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [2, 64])
@pytest.mark.parametrize(
    "kind, spec, position",
    [
        ("linear", LinearAttention(n_heads=2), NoPosition()),
        ("linear", LinearAttention(n_heads=3, head_dim=4), Rotary()),
        ("diagonal", Diagonal(n_heads=2), NoPosition()),
    ],
)
def test_value_and_gradients_equal_loops_in_float64(kind, spec, position, chunk, monkeypatch):
    monkeypatch.setattr(file, "CHUNK", chunk)
    m, _ = mixer(spec, position=position)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 6, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(7, 6, dtype=torch.float64, generator=generator)
    leaves = [x, *m.parameters()]
    ours = m(x[None], at_of(m, 1, 7))[0][0]
    want = by_loops(m, x, kind, rotary=isinstance(position, Rotary))
    torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-12)
    got = torch.autograd.grad((ours * weight).sum(), leaves)
    for g, w in zip(got, torch.autograd.grad((want * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-10)


def test_the_state_of_linear_attention_is_the_outer_product_and_diagonal_keeps_its_diagonal():
    """ReaLLM-Forge's `linear` kept the elementwise one; a value's channel then never reaches another channel."""
    m, _ = mixer(LinearAttention(n_heads=2))
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    mem = Mem(m.memory(), 1, 8, torch.float64, "cpu")
    m(x, at_of(m, 1, 5), mem)
    _, k, v = heads(m, x[0])
    outer = sum(torch.einsum("ni,nj->nij", k[t], v[t]) for t in range(5))
    torch.testing.assert_close(mem.tensors["s"][0], outer)
    torch.testing.assert_close(mem.tensors["z"][0], k.sum(0))
    d, _ = mixer(Diagonal(n_heads=2))
    mem = Mem(d.memory(), 1, 8, torch.float64, "cpu")
    d(x, at_of(d, 1, 5), mem)
    torch.testing.assert_close(mem.tensors["s"][0, 0], torch.diagonal(outer, dim1=-2, dim2=-1))


def test_linear_attention_equals_the_quadratic_form_of_the_paper():
    """softmax's exponential replaced by phi(q).phi(k), all pairs at once (Katharopoulos et al., eq. 9)."""
    m, _ = mixer(LinearAttention(n_heads=2))
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    q, k, v = (x @ m.qkv.weight.T + m.qkv.bias).view(2, 9, 3, 2, 3).unbind(2)
    similarity = torch.einsum("bthi,bshi->bhts", F.elu(q * m.scale) + 1, F.elu(k * m.scale) + 1).tril()
    y = torch.einsum("bhts,bshi->bthi", similarity / similarity.sum(-1, keepdim=True), v).flatten(2)
    torch.testing.assert_close(m(x, at_of(m, 2, 9))[0], y @ m.out.weight.T + m.out.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec, position", [(LinearAttention(n_heads=2), Rotary()), (Diagonal(n_heads=2), None)])
@pytest.mark.parametrize("chunk", [2, 3, 64])
def test_documents_are_sums_of_their_own(spec, position, chunk, monkeypatch):
    """Boundaries inside chunks, at their ends, and chunks that hold several documents or none to the end."""
    monkeypatch.setattr(file, "CHUNK", chunk)
    m, _ = mixer(spec, d=8, position=position)
    kind = "linear" if isinstance(spec, LinearAttention) else "diagonal"
    doc = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 2, 3, 3, 4, 4, 4], [0, 1, 1, 1, 1, 1, 1, 1, 1]])
    pos = torch.stack([torch.cat([torch.arange(n) for n in row.bincount()[row.bincount() > 0]]) for row in doc])
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    got = m(x, at_of(m, 3, 9, doc, pos))[0]
    for row in range(3):
        want = by_loops(m, x[row], kind, doc[row].tolist(), position is not None, pos[row].tolist())
        torch.testing.assert_close(got[row], want, rtol=1e-11, atol=1e-12)


def test_weights_are_what_values_are_summed_with_and_add_up_to_one():
    m, _ = mixer(LinearAttention(n_heads=2))
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    at = at_of(m, 2, 6)
    w = m.weights(x, at)
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 2, 6, dtype=torch.float64), rtol=1e-4, atol=0)
    assert (w.triu(1) == 0).all() and (w >= 0).all()
    _, _, v = m.project(x, at)
    y = torch.einsum("bhts,bshi->bthi", w, v).flatten(2) @ m.out.weight.T + m.out.bias
    torch.testing.assert_close(m(x, at)[0], y, rtol=1e-10, atol=1e-12)


def test_bfloat16_autocast_sums_in_float32():
    """4,000 sums of about 1 in bfloat16 would stop growing at 256."""
    T = 4000
    k = torch.ones(1, T, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        m, _ = mixer(LinearAttention(n_heads=1), d=2)
        m = nn.Module.to(m, torch.float32)
        mem = Mem(m.memory(), 1, 1, torch.bfloat16, "cpu")
        m(torch.zeros(1, T, 2), at_of(m, 1, T), mem)
    _, key, value = heads(m, torch.zeros(1, 2))
    want = T * torch.einsum("ni,nj->nij", key[0], value[0])
    torch.testing.assert_close(mem.tensors["s"][0], want, rtol=2e-2, atol=0)
    y, state = chunkwise(k, k, k)
    assert state[0, 0, 0, 0] == T and y[0, -1, 0, 0] == 2 * T


@pytest.mark.parametrize("spec, position", [(LinearAttention(n_heads=2), Rotary()), (Diagonal(n_heads=2), None)])
def test_token_by_token_equals_loops_over_all_pairs(spec, position):
    m, _ = mixer(spec, d=8, position=position)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    mem = Mem(m.memory(), 1, 8, torch.float64, "cpu")
    steps = []
    for t in range(6):
        at = At.full(1, 1, start=t)._replace(tables={})
        m.prepare(at, True, torch.float64)
        steps.append(m(x[:, t : t + 1], at, mem)[0][0])
    kind = "linear" if isinstance(spec, LinearAttention) else "diagonal"
    want = by_loops(m, x[0], kind, rotary=position is not None)
    torch.testing.assert_close(torch.cat(steps), want, rtol=1e-11, atol=1e-12)


def test_pads_add_nothing():
    for spec in (LinearAttention(n_heads=2), Diagonal(n_heads=2)):
        m, _ = mixer(spec)
        x = torch.randn(2, 5, 6, dtype=torch.float64)
        n = torch.tensor([3, 0])
        mem = Mem(m.memory(), 2, 8, torch.float64, "cpu")
        m(x, At(torch.arange(5).expand(2, 5), n, upto=5, tables={}), mem)
        alone = Mem(m.memory(), 1, 8, torch.float64, "cpu")
        m(x[:1, :3], at_of(m, 1, 3), alone)
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(mem.tensors[name][0], tensor[0])
            assert not mem.tensors[name][1].any()


def test_identity_adds_its_norm_and_needs_no_parameter():
    spec = GPT(vocab_size=5, d_model=4, n_layers=1, attention=NoMixing(), position=NoPosition())
    model = create(spec)
    assert sum(p.numel() for p in model.parameters()) == spec.n_parameters()
    x = torch.randn(2, 3, 4)
    y, _ = model.blocks[0].mixer(x, At.full(2, 3))
    assert torch.equal(y, x) and model.blocks[0].mixer.memory() == {}


@pytest.mark.parametrize("kind", ["linear", "diagonal", "identity"])
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_follow_their_formula(kind, bias):
    cls = Attention.kinds[kind]
    options = {} if kind == "identity" else {"n_heads": 2, "head_dim": 5, "bias": bias}
    _, block = mixer(cls(**options), d=8)
    module = block.attention.build(block)
    assert sum(p.numel() for p in module.parameters()) == block.attention.n_parameters(block)
    if kind != "identity":
        assert module.scale.item() == pytest.approx(5**-0.5)
        wide, narrow = block.attention.ops(block, 999), block.attention.ops(block, 1)
        assert wide == narrow  # a state costs the same at every context
        per_head = {"linear": 2 * 5 * 5, "diagonal": 2 * 5}[kind]
        matrices = 8 * 30 + 10 * 8
        assert wide.multiplies == matrices + 2 * per_head + 2 * 10 + 2 * 10 and wide.exponentials == 20


def test_refuses_what_has_no_meaning():
    base = {"vocab_size": 5, "d_model": 8, "n_layers": 1}
    for attention, position, words in (
        (LinearAttention(n_heads=3), NoPosition(), "not divisible by n_heads=3"),
        (LinearAttention(n_heads=0), NoPosition(), "n_heads=0 must be at least 1"),
        (LinearAttention(n_heads=2, eps=0.0), NoPosition(), "eps=0.0 must be above 0"),
        (LinearAttention(n_heads=2), ALiBi(), "adds to attention scores"),
        (Diagonal(n_heads=2), Rotary(), "turns queries and keys"),
        (NoMixing(), Rotary(), "turns queries and keys"),
    ):
        with pytest.raises(ConfigError, match=words):
            GPT(**base, attention=attention, position=position)
    GPT(**base, attention=LinearAttention(n_heads=2), position=Rotary())
    GPT(**{**base, "n_layers": 2}, attention=(Causal(n_heads=2), Diagonal(n_heads=2)), position=NoPosition())
