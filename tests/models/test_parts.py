"""Parts against outside truth: loops in float64, transformers' own classes, and reference arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.gpt.config import GPT
from models.memory import At
from models.parts.attention import Causal, Seen, attend, repeat_heads, what_is_seen
from models.parts.block import BlockSpec
from models.parts.mlp import Plain, SwiGLU
from models.parts.position import NoPosition, Rotary, Rotation


def block(**options) -> BlockSpec:
    base = {"vocab_size": 9, "d_model": 16, "n_layers": 1, "seq_len": 32, "attention": Causal(n_heads=4)}
    return GPT(**{**base, **options}).blocks()[0]


def attention_by_loops(q, k, v, seen):
    """softmax(q k / sqrt(h)) v, one query, head and batch row at a time, in float64."""
    B, H, T, h = q.shape
    groups = H // k.shape[1]
    out = np.zeros((B, H, T, h))
    for b in range(B):
        for head in range(H):
            for t in range(T):
                keys = [s for s in range(k.shape[2]) if seen(b, t, s)]
                scores = [float(q[b, head, t] @ k[b, head // groups, s]) / math.sqrt(h) for s in keys]
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                for weight, s in zip(weights, keys, strict=True):
                    out[b, head, t] += weight / sum(weights) * v[b, head // groups, s].numpy()
    return torch.from_numpy(out)


@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_equals_loops_in_float64(H, K, window):
    B, T, h = 2, 6, 4
    q, k, v = (torch.randn(B, n, T, h, dtype=torch.float64) for n in (H, K, K))
    want = attention_by_loops(q, k, v, lambda b, t, s: s <= t and (window is None or s > t - window))
    got = attend(q, k, v, what_is_seen(At.full(B, T), T, False, window))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_one_token_over_memory_equals_loops_in_float64(window):
    B, H, K, S, h = 2, 4, 2, 6, 4
    q = torch.randn(B, H, 1, h, dtype=torch.float64)
    k, v = (torch.randn(B, K, S, h, dtype=torch.float64) for _ in range(2))
    together = what_is_seen(At.full(B, 1, start=S - 1), 1, True, window)
    assert together.mask is None and not together.causal  # the cheap form: no mask at all
    want = attention_by_loops(q, k, v, lambda b, t, s: window is None or s > S - 1 - window)
    torch.testing.assert_close(attend(q, k, v, together), want, rtol=1e-12, atol=1e-12)
    ends = [3, 5]
    at = At(torch.tensor(ends)[:, None], rows=torch.tensor([1, 0]), upto=S)
    want = attention_by_loops(q, k, v, lambda b, t, s: s <= ends[b] and (window is None or s > ends[b] - window))
    torch.testing.assert_close(attend(q, k, v, what_is_seen(at, 1, True, window)), want, rtol=1e-12, atol=1e-12)


def test_repeated_key_heads_are_those_that_grouped_queries_share():
    q, k, v = (torch.randn(2, n, 5, 4, dtype=torch.float64) for n in (6, 2, 2))
    seen = Seen(torch.rand(2, 1, 5, 5) > 0.3, False)
    torch.testing.assert_close(attend(q, repeat_heads(k, 6), repeat_heads(v, 6), seen), attend(q, k, v, seen))


def test_training_and_unpadded_decoding_build_no_mask():
    assert what_is_seen(At.full(2, 8), 8, False, None) == Seen(None, True)
    assert what_is_seen(At.full(2, 8), 8, False, 8) == Seen(None, True)
    assert what_is_seen(At.full(2, 8), 8, True, None) == Seen(None, True)
    assert what_is_seen(At.full(2, 1, start=8), 1, True, None) == Seen(None, False)
    assert what_is_seen(At.full(2, 8), 8, False, 3) == Seen(None, True, window=3)
    assert what_is_seen(At.full(2, 8), 8, True, 3) == Seen(None, True, window=3)


def test_attention_equals_reference_array(data_dir):
    want = np.load(data_dir / "numerics/test_scaled_dot_product_attention.npz")["array"]
    q, k, v, mask = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        for seed, shape in ((1, (4, 12, 64)), (2, (4, 16, 64)), (3, (4, 16, 64)), (5, (4, 12, 16)))
    )
    got = attend(q[:, None], k[:, None], v[:, None], Seen((mask > 0.5)[:, None], False))[:, 0]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-6)


def test_rotary_equals_reference_array(data_dir):
    """The array holds neighbouring pairs; ours lie half a head apart, so its columns are permuted both ways."""
    want = np.load(data_dir / "numerics/test_rope.npz")["array"]
    x = torch.randn(4, 12, 64, generator=torch.Generator().manual_seed(4))
    order = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
    rotation = Rotation(64, 10000.0)
    turned = rotation(x[..., order][:, :, None], rotation.tables(At.full(4, 12)))[:, :, 0]
    got = torch.empty_like(turned)
    got[..., order] = turned
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-6)


def test_rotary_turns_pairs_by_their_angle():
    """Against complex numbers in float64: pair (i, i + h/2) at position p is multiplied by e^(i p base^(-2i/h))."""
    h, base = 6, 100.0
    rotation = Rotation(h, base)
    x = torch.randn(2, 5, 3, h, dtype=torch.float64)
    pos = torch.tensor([[0, 1, 2, 3, 4], [7, 3, 1, 900, 2]])
    got = rotation(x, rotation.tables(At(pos), torch.float64))
    for b in range(2):
        for t in range(5):
            for i in range(h // 2):
                turn = complex(math.cos(a := pos[b, t].item() * base ** (-2 * i / h)), math.sin(a))
                for n in range(3):
                    z = complex(x[b, t, n, i], x[b, t, n, i + h // 2]) * turn
                    assert abs(z - complex(got[b, t, n, i], got[b, t, n, i + h // 2])) < 1e-12


def test_rotary_scores_depend_on_distance_alone():
    rotation = Rotation(8, 10000.0)
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        at = [rotation.tables(At(torch.tensor([[p]])), torch.float64) for p in (i, j)]
        return (rotation(q, at[0]) * rotation(k, at[1])).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), rtol=1e-10, atol=1e-10)


def test_rotary_tables_are_shared_by_the_layers_of_a_call(monkeypatch):
    from models.families import create, preset

    made = []
    tables = Rotation.tables
    monkeypatch.setattr(Rotation, "tables", lambda self, *args: made.append(1) or tables(self, *args))
    model = create(GPT(vocab_size=9, d_model=16, n_layers=3, attention=Causal(n_heads=4), position=Rotary()))
    model(torch.zeros(1, 4, dtype=torch.long))
    assert len(made) == 1 and preset("tiny").n_layers == 2


def test_plain_mlp_is_its_formula():
    spec = block(mlp=Plain(hidden=24, bias=True))
    mlp = spec.mlp.build(spec)
    x = torch.randn(2, 3, 16)
    want = F.gelu(x @ mlp.up.weight.T + mlp.up.bias) @ mlp.down.weight.T + mlp.down.bias
    torch.testing.assert_close(mlp(x, At.full(*x.shape[:2])), want)


def test_swiglu_is_its_formula_and_gate_comes_first():
    spec = block(mlp=SwiGLU(hidden=24))
    mlp = spec.mlp.build(spec)
    gate, up = mlp.gate_up.weight.split(24)
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(mlp(x, At.full(*x.shape[:2])), (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.T)


def test_default_widths():
    assert Plain().width(768) == 3072
    assert SwiGLU().width(768) == 2048 and SwiGLU().width(576) == 1536 and SwiGLU().width(100) == 320


def test_attention_without_positions_is_blind_to_order():
    """What NoPosition means: swapping two earlier tokens leaves a later token's attention as it was."""
    spec = block(position=NoPosition())
    mixer = spec.attention.build(spec)
    x = torch.randn(1, 4, 16)
    at = At.full(1, 4)._replace(tables={})
    mixer.prepare(at, False, torch.float32)
    swapped = x[:, [1, 0, 2, 3]]
    torch.testing.assert_close(mixer(x, at)[0][:, 3], mixer(swapped, at)[0][:, 3])


def test_attention_dropout_is_off_in_eval_mode_and_keeps_the_mean():
    spec = block(attention=Causal(n_heads=4, dropout=0.5))
    mixer = spec.attention.build(spec)
    x = torch.randn(1, 6, 16)
    at = At.full(1, 6)._replace(tables={})
    mixer.prepare(at, False, torch.float32)
    want = mixer.eval()(x, at)[0]
    torch.testing.assert_close(mixer(x, at)[0], want, rtol=0, atol=0)
    mean = torch.stack([mixer.train()(x, at)[0] for _ in range(3000)]).mean(0)
    assert (mean - want).abs().max() < 0.05 * want.abs().max() + 0.02


def test_bfloat16_training_on_cpu_errs_no_more_than_pytorch():
    """The float32 detour for small T (see attend) must not be less exact than the fused bfloat16 path."""
    q, k, v = (torch.randn(2, 4, 32, 16, requires_grad=True) for _ in range(3))
    seen = Seen(None, True)

    def outputs(dtype, f):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        y = f(*inputs)
        y.float().square().sum().backward()
        return [y, *(t.grad for t in inputs)]

    exact = outputs(torch.float64, lambda *a: F.scaled_dot_product_attention(*a, is_causal=True))
    plain = outputs(torch.bfloat16, lambda *a: F.scaled_dot_product_attention(*a, is_causal=True))
    ours = outputs(torch.bfloat16, lambda *a: attend(*a, seen))
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert o.dtype == torch.bfloat16
        assert (o.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + 1e-5
