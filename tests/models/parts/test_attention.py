"""Attention against loops, against transformers' own, fused against written out; and the faults of the originals."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Config, Qwen3RotaryEmbedding

from models.check import CHECKS, stirred
from models.families import create
from models.gpt.config import GPT
from models.memory import At, Slots
from models.parts import attend as attend_file
from models.parts.attend import Seen, attend, attention_weights, repeat_heads
from models.parts.attention import Attention, Causal, CausalAttention, Infinite
from models.parts.gate import ElementwiseGate, HeadGate
from models.parts.linear import Linear
from models.parts.mla import MLA
from models.parts.mlp import Plain
from models.parts.norm import RMSNorm
from models.parts.position import FIRE, ALiBi, Learned, NoPosition, Rotary
from models.parts.qk_norm import L2QKNorm, RMSQKNorm
from models.parts.sink import FixedSink, HeadSink, LearnedSink
from models.parts.softmax import PlainSoftmax, Softmax
from models.spec import ConfigError, build
from tests.models.parts.attending import Call, block_of, causal_by_loops, mixer_of, prepared, turned
from tests.models.parts.exact import agree

OPTIONS = {
    "default": Causal(n_heads=2),
    "grouped": Causal(n_heads=2, n_kv_heads=1),
    "uneven groups": Causal(n_heads=5, n_kv_heads=3, head_dim=2),
    "values of another size": Causal(n_heads=2, v_head_dim=3),
    "window": Causal(n_heads=2, window=2),
    "qk l2": Causal(n_heads=2, qk_norm=L2QKNorm(scale=3.0)),
    "qk l2 fixed": Causal(n_heads=2, qk_norm=L2QKNorm(scale="length", learned=False)),
    "qk rms": Causal(n_heads=2, n_kv_heads=1, qk_norm=RMSQKNorm()),
    "v norm": Causal(n_heads=2, v_norm=True),
    "softcap": Causal(n_heads=2, softcap=0.7),
    "sink fixed": Causal(n_heads=2, sink=FixedSink()),
    "sink learned": Causal(n_heads=2, sink=LearnedSink(0.5)),
    "sink per head": Causal(n_heads=2, n_kv_heads=1, sink=HeadSink(-0.5)),
    "gate per head": Causal(n_heads=2, gate=HeadGate()),
    "gate per channel": Causal(n_heads=2, v_head_dim=3, gate=ElementwiseGate()),
    "heads summed": Infinite(n_heads=3, n_kv_heads=2, head_dim=2, v_head_dim=5),
    "heads side by side": Infinite(n_heads=3, head_dim=2, v_head_dim=5, merge="concat"),
    "all": Infinite(
        n_heads=3,
        n_kv_heads=2,
        head_dim=4,
        v_head_dim=3,
        window=3,
        qk_norm=L2QKNorm(scale=2.0),
        v_norm=True,
        softcap=1.5,
        sink=HeadSink(0.3),
        gate=ElementwiseGate(),
    ),
}


def alibi(heads):
    from models.parts.score_bias import alibi_slopes

    slopes = alibi_slopes(heads)
    return lambda i, t, s: -slopes[i] * (t - s)


WITH_POSITIONS = ("default", "uneven groups", "qk rms", "softcap", "sink per head", "all")


@pytest.mark.parametrize(
    "name, place", [(n, "none") for n in OPTIONS] + [(n, p) for n in WITH_POSITIONS for p in ("rotary", "alibi")]
)
def test_every_option_equals_loops_in_value_and_gradient(name, place):
    spec = OPTIONS[name]
    H = spec.heads()[0]
    position = {"none": NoPosition(), "rotary": Rotary(base=20.0), "alibi": ALiBi()}[place]
    block = block_of(spec, position, bias=name in ("default", "grouped"))
    window = spec.window or 99
    loop = causal_by_loops(
        spec,
        block,
        seen=lambda t, s: t - window < s <= t,
        bias=alibi(H) if place == "alibi" else None,
        turn=turned(20.0) if place == "rotary" else None,
    )
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    single = place == "alibi" and H & (H - 1)  # slopes of such head counts are not exact in float32
    agree(Call(mixer_of(block)), loop, x, 1e-7 if single else 1e-10)


# ---- fused and written out

CHOICES = {
    "qk_norm": (Causal().qk_norm, L2QKNorm(scale=3.0), RMSQKNorm()),
    "sink": (Causal().sink, FixedSink(0.7), HeadSink(0.2)),
    "window": (None, 3),
    "n_kv_heads and v_head_dim": ((4, 4), (3, 4), (1, 6)),
}
PLACES = (NoPosition(), Rotary(), ALiBi(), FIRE(width=4))


def outputs(mixer, x, ats, fused):
    """Values and gradients of calls over whole rows, over documents, and of one token after memory."""
    mixer.scores.fused = fused
    mixer.zero_grad()
    found = []
    for at in ats:
        y = mixer(x, prepared(mixer, at))[0]
        y.square().sum().backward()
        found.append(y.detach())
    memory = Slots([mixer.memory()], 2, 8, torch.float64)
    with torch.no_grad():
        T = x.shape[1]
        for start, n in ((0, T - 1), (T - 1, 1)):
            at = prepared(mixer, At.full(2, n, start=start), cached=True)
            found.append(mixer(x[:, start : start + n], at, memory[0])[0])
    return found + [p.grad.clone() for p in mixer.parameters()]


@pytest.mark.parametrize("position", PLACES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("sink", CHOICES["sink"], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("qk_norm", CHOICES["qk_norm"], ids=lambda p: type(p).__name__)
def test_fused_and_written_out_agree_in_every_combination(qk_norm, sink, position):
    """In value, in gradient and in decoding: whole rows, packed documents, one token after memory."""
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    doc = torch.tensor([[0, 0, 0, 1, 1, 2]]).expand(2, 6)
    pos = torch.tensor([[0, 1, 2, 0, 1, 0]]).expand(2, 6)
    ats = (At.full(2, 6), At(pos, upto=6, doc=doc))
    for window, (K, v) in itertools.product(CHOICES["window"], CHOICES["n_kv_heads and v_head_dim"]):
        spec = Causal(n_heads=4, n_kv_heads=K, v_head_dim=v, window=window, qk_norm=qk_norm, sink=sink)
        mixer = mixer_of(block_of(spec, position, d_model=16))
        assert mixer.scores.fused
        for a, b in zip(outputs(mixer, x, ats, True), outputs(mixer, x, ats, False), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_written_out_bfloat16_errs_no_more_than_twice_the_fused_form():
    block = block_of(Causal(n_heads=4, sink=HeadSink()), ALiBi(), d_model=32)
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    mixer = mixer_of(block, stir=0.1)

    def run(dtype, fused):
        mixer.scores.fused = fused
        return nn.Module.to(mixer, dtype)(x.to(dtype), prepared(mixer, At.full(2, 16)))[0].double()

    exact, fused, written = run(torch.float64, True), run(torch.bfloat16, True), run(torch.bfloat16, False)
    assert (written - exact).abs().max() <= 2 * (fused - exact).abs().max() + 1e-5


def test_plain_attention_builds_no_mask_and_layers_share_the_one_they_need(monkeypatch):
    made = []
    original = attend_file.triangle
    monkeypatch.setattr(attend_file, "triangle", lambda *args: made.append(1) or original(*args))
    base = GPT(vocab_size=9, d_model=16, n_layers=3, seq_len=8, attention=Causal(n_heads=4))
    narrow = Causal(n_heads=4, window=2, sink=HeadSink(), softcap=5.0)
    for attention, position, masks in (
        (Causal(n_heads=4), Rotary(), 0),
        (narrow, Rotary(), 0),
        (Causal(n_heads=4), ALiBi(), 1),
        (narrow, ALiBi(), 1),
    ):
        made.clear()
        model = create(dataclasses.replace(base, attention=attention, position=position))
        model(torch.zeros(1, 5, dtype=torch.long))
        assert len(made) == masks


def test_attention_weights_are_those_that_the_output_is_made_of():
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for spec in (Causal(n_heads=4), Causal(n_heads=4, n_kv_heads=3, softcap=2.0, window=2), MLA(n_heads=4)):
        mixer = mixer_of(block_of(spec, Rotary(), d_model=16))
        at = prepared(mixer, At.full(2, 5))
        weights = mixer.weights(x, at)
        assert weights.shape == (2, 4, 5, 5) and (weights.triu(1) == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))
        if isinstance(mixer, CausalAttention):
            y = weights @ repeat_heads(mixer.project(x, at)[2], 4)
            torch.testing.assert_close(mixer.out(y.transpose(1, 2).flatten(2)), mixer(x, at)[0])
    sunk = mixer_of(block_of(Causal(n_heads=4, sink=FixedSink()), d_model=16))
    assert (sunk.weights(x, prepared(sunk, At.full(2, 5))).sum(-1) < 1).all()


# ---- outside implementations


def test_rms_qk_norm_before_rotation_is_qwen3s_attention():
    config = Qwen3Config(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        attn_implementation="eager",
    )
    theirs = nn.Module.to(Qwen3Attention(config, 0), torch.float64).eval()
    for p in theirs.parameters():
        p.data.add_(torch.randn_like(p) * 0.3)
    spec = Causal(n_heads=4, n_kv_heads=2, head_dim=6, qk_norm=RMSQKNorm(eps=config.rms_norm_eps))
    ours = mixer_of(block_of(spec, Rotary(base=50.0), d_model=16))
    with torch.no_grad():
        ours.qkv.weight.copy_(torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]))
        ours.out.weight.copy_(theirs.o_proj.weight)
        ours.qk_norm.q.copy_(theirs.q_norm.weight)
        ours.qk_norm.k.copy_(theirs.k_norm.weight)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    mask = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    cos_sin = Qwen3RotaryEmbedding(config)(x, torch.arange(7)[None])
    want = theirs(x, tuple(t.double() for t in cos_sin), mask)[0]
    got = ours(x, prepared(ours, At.full(2, 7)))[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # their tables and norms are in float32


@pytest.mark.parametrize("fused", [True, False])
def test_head_sinks_are_those_of_gpt_oss(fused):
    q, k, v = (torch.randn(2, n, 5, 4, dtype=torch.float64) for n in (4, 2, 2))
    sink = torch.randn(4, dtype=torch.float64)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    module = SimpleNamespace(num_key_value_groups=2, sinks=sink, training=False)
    want, weights = gpt_oss_attention(module, q, k, v, mask, 0.5)
    seen, column = Seen(None, True).written_out(5, q.device), sink.view(1, 4, 1, 1)
    if fused:
        got = attend(q, k, v, seen, scale=0.5, sink=column)
    else:
        ours = attention_weights(q, k, seen, PlainSoftmax().build(4), 0.5, sink=column)
        torch.testing.assert_close(ours, weights)
        got = ours @ repeat_heads(v, 4)
    torch.testing.assert_close(got.transpose(1, 2), want)


def test_softcap_is_that_of_gemma2():
    q, k, v = (torch.randn(2, n, 5, 4, dtype=torch.float64) for n in (4, 2, 2))
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    want = gemma2_attention(module, q, k, v, mask, scaling=2.0, softcap=1.3)[1]
    ours = attention_weights(q, k, Seen(None, True).written_out(5, q.device), PlainSoftmax().build(4), 2.0, 1.3)
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6)  # theirs is in float32


# ---- faults of the originals


@pytest.mark.parametrize("fused", [True, False])
def test_learned_scale_is_the_score_scale_on_both_paths(fused):
    """The original multiplied by g d^(1/4) / sqrt(d) where it was fused. Two keys, cosines 1 and 0: e^g / (e^g + 1)."""
    spec = Causal(n_heads=1, head_dim=8, qk_norm=L2QKNorm(scale=3.0))
    mixer = mixer_of(block_of(spec), stir=0.0)
    mixer.scores.fused = fused
    q = torch.zeros(1, 1, 2, 8, dtype=torch.float64)
    q[..., 1, 0], k = 5.0, q.clone()
    k[..., 0, 1], k[..., 1, 0] = 0.2, 7.0
    q, k = (t.transpose(1, 2) for t in mixer.qk_norm(torch.cat([q, k], 1).transpose(1, 2), 1))
    v = torch.eye(2, dtype=torch.float64)[None, None]
    y = mixer.scores(q, k, v, prepared(mixer, At.full(1, 2)), False)
    share = math.exp(3) / (math.exp(3) + 1)
    torch.testing.assert_close(y[0, 0, 1], torch.tensor([1 - share, share], dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale, want", [(10.0, 10.0), ("inv_sqrt", 0.25), ("length", math.log2(256**2 - 256))])
def test_where_the_learned_scale_starts(scale, want):
    spec = GPT(
        vocab_size=9,
        d_model=32,
        n_layers=1,
        seq_len=256,
        attention=Causal(n_heads=2, qk_norm=L2QKNorm(scale=scale)),
    )
    assert create(spec).blocks[0].mixer.qk_norm.g.item() == pytest.approx(want)


def test_l2_norm_and_rotation_may_stand_in_either_order():
    block = block_of(Causal(n_heads=2, qk_norm=L2QKNorm()), Rotary())
    mixer = mixer_of(block)
    at = prepared(mixer, At.full(1, 4))
    qk = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    tables = at.tables[mixer.rotation.key]
    torch.testing.assert_close(mixer.qk_norm(qk, 2, *tables), mixer.qk_norm(mixer.rotation(qk, tables), 2))


def test_zero_queries_and_keys_have_finite_norms_and_gradients():
    for norm in (L2QKNorm(), RMSQKNorm()):
        module = norm.build(4, 16)
        x = torch.zeros(1, 1, 2, 4, requires_grad=True)
        sum(t.sum() for t in module(x, 1)).backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("sink", [FixedSink(), LearnedSink(), HeadSink()])
def test_with_a_sink_a_token_sees_itself_and_position_0_is_not_zero(sink, fused):
    """The original's extra column shifted the triangle: token i saw 0 .. i - 1, and position 0 returned zeros."""
    mixer = mixer_of(block_of(Causal(n_heads=1, head_dim=8, sink=sink)), stir=0.0)
    mixer.scores.fused = fused
    q = torch.zeros(1, 1, 3, 8, dtype=torch.float64)
    y = mixer.scores(q, q, torch.eye(3, dtype=torch.float64)[None, None], prepared(mixer, At.full(1, 3)), False)
    want = torch.tensor([[1 / 2, 0, 0], [1 / 3, 1 / 3, 0], [1 / 4, 1 / 4, 1 / 4]], dtype=torch.float64)
    torch.testing.assert_close(y[0, 0], want)  # scores 0 and l = 0: one part in i + 2 for each, one for nothing


def test_a_sink_is_softmax_times_the_sigmoid_of_logsumexp_minus_l():
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    l = torch.randn(1, 3, 1, 1, dtype=torch.float64)  # noqa: E741
    seen = Seen(None, True).written_out(5, q.device)
    scores = (q @ k.mT / 2).masked_fill(~seen.mask, -torch.inf)
    want = attend(q, k, v, Seen(None, True)) * torch.sigmoid(scores.logsumexp(-1, keepdim=True) - l)
    torch.testing.assert_close(attend(q, k, v, seen, sink=l), want)


@pytest.mark.parametrize("gate", [HeadGate(), ElementwiseGate()])
def test_the_gate_is_kept_saved_and_trained(gate):
    """The original drew a new random layer on every forward."""
    mixer = mixer_of(block_of(Causal(n_heads=2, gate=gate)))
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    at = prepared(mixer, At.full(1, 4))
    y = mixer(x, at)[0]
    torch.testing.assert_close(y, mixer(x, at)[0], rtol=0, atol=0)
    y.sum().backward()
    assert "gate.linear.weight" in mixer.state_dict() and mixer.gate.linear.weight.grad.abs().sum() > 0


def test_soft_caps_take_any_number_and_hold_scores():
    """The original's caps were booleans, so only 1.0 could be said."""
    spec = build(Attention, {"kind": "causal", "n_heads": 2, "softcap": 7.5})
    assert spec.softcap == 7.5
    q = torch.randn(1, 1, 4, 8, dtype=torch.float64) * 100
    seen = Seen(torch.ones(1, 1, 4, 4, dtype=torch.bool), False)
    weights = attention_weights(q, q, seen, PlainSoftmax().build(1), softcap=0.5)
    assert (weights.amax(-1) / weights.amin(-1)).max() <= math.exp(1.0) + 1e-9


def test_a_window_of_w_tokens_holds_w_tokens():
    mixer = mixer_of(block_of(Causal(n_heads=2, window=3)))
    weights = mixer.weights(torch.randn(1, 6, 8).double(), prepared(mixer, At.full(1, 6)))
    assert [(weights[0, 0, t] > 0).nonzero().flatten().tolist() for t in (0, 2, 5)] == [[0], [0, 1, 2], [3, 4, 5]]


def test_the_first_key_heads_serve_the_extra_query_heads():
    x = torch.arange(3.0).view(1, 3, 1, 1)
    assert repeat_heads(x, 7).flatten().tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert repeat_heads(x, 6).flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert repeat_heads(x[:, :1], 4).flatten().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"window": 2},
        {"softcap": 0.5},
        {"gate": HeadGate()},
        {"sink": HeadSink()},
        {"v_norm": True},
        {"qk_norm": RMSQKNorm()},
        {"softmax": next(c for c in Softmax.kinds.values() if not c.fused)()},
        {"merge": "concat"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_infinite_heads_ignore_no_option(change):
    """The original's "infinite" silently ignored window, soft-cap, gate, FIRE and more."""
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    base = Infinite(n_heads=3, head_dim=4)
    ys = []
    for spec in (base, dataclasses.replace(base, **change)):
        mixer = mixer_of(block_of(spec), stir=0.0)
        ys.append(mixer(x, prepared(mixer, At.full(1, 5)))[0])
    assert (ys[0] - ys[1]).abs().max() > 1e-4


@pytest.mark.parametrize("spec", [Causal(n_heads=4), Infinite(n_heads=3, head_dim=4), MLA(n_heads=4)])
def test_score_biases_act_on_every_kind_of_attention(spec):
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    ys = []
    for position in (NoPosition(), ALiBi(), FIRE(width=4)):
        mixer = mixer_of(block_of(spec, position, d_model=16), stir=0.0)
        ys.append(mixer(x, prepared(mixer, At.full(1, 5)))[0])
    assert min((ys[0] - ys[1]).abs().max(), (ys[0] - ys[2]).abs().max()) > 1e-5


def test_infinite_heads_have_defaults_and_no_redundant_projections():
    assert Infinite().head_dim == 64 and create(GPT(vocab_size=9, d_model=16, n_layers=1, attention=Infinite()))
    with pytest.raises(ConfigError, match="n_cproj"):
        build(Attention, {"kind": "infinite", "n_cproj": 2})


def test_no_written_out_option_is_ignored_beside_a_sink():
    """The original's flash_lobo was ignored whenever the path was not the fused one."""
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    ys = []
    for sink in (Causal().sink, FixedSink()):
        mixer = mixer_of(block_of(Causal(n_heads=2, softcap=3.0, sink=sink)))
        ys.append(mixer(x, prepared(mixer, At.full(1, 5)))[0])
    assert (ys[0] - ys[1]).abs().max() > 1e-3


def test_dropout_acts_on_both_paths_and_keeps_the_mean():
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    for options in ({}, {"sink": FixedSink()}, {"softcap": 2.0}):
        mixer = mixer_of(block_of(Causal(n_heads=2, dropout=0.5, **options)))
        at = prepared(mixer, At.full(1, 6))
        want = mixer(x, at)[0]
        mixer.train()
        torch.manual_seed(0)
        draws = mixer(x.expand(1000, -1, -1), at)[0]  # one draw per row
        assert draws.std(0).min() > 0
        assert ((draws.mean(0) - want[0]).abs() / draws.std(0)).max() < 5 / 1000**0.5


# ---- numbers


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_follow_the_formula(name):
    for position in (NoPosition(), FIRE(width=3, hidden=2), FIRE(shared=True)):
        block = block_of(OPTIONS[name], position, bias=True)
        assert block.attention.n_parameters(block) == sum(p.numel() for p in mixer_of(block).parameters())


def test_operations_of_a_key_and_a_window():
    """Per further key and head: h + v multiply-adds, a scale, and what softmax does with it; none beyond the window."""
    spec = Causal(n_heads=3, head_dim=4, v_head_dim=5)
    block = block_of(spec)
    more = spec.ops(block, 8).multiplies - spec.ops(block, 7).multiplies
    softmax = PlainSoftmax()
    assert more == 3 * (4 + 5 + 1 + softmax.ops(8).multiplies - softmax.ops(7).multiplies)
    windowed = dataclasses.replace(spec, window=3)
    assert windowed.ops(block_of(windowed), 9) == windowed.ops(block_of(windowed), 3)
    assert spec.ops(block, 1).weight_bits == 16 * (8 * 3 * (4 + 4 + 5) + 3 * 5 * 8)


@pytest.mark.parametrize("name", [n for n in OPTIONS if n.split()[0] in ("qk", "v", "softcap", "sink", "gate")])
def test_every_option_that_computes_costs_something(name):
    spec, base = (
        OPTIONS[name],
        Causal(n_heads=2, n_kv_heads=OPTIONS[name].n_kv_heads, v_head_dim=OPTIONS[name].v_head_dim),
    )
    costs, plain = spec.ops(block_of(spec), 8).counts(), base.ops(block_of(base), 8).counts()
    assert all(costs[k] >= plain[k] for k in costs)
    assert costs != plain


# ---- refusals


@pytest.mark.parametrize(
    "attention, words",
    [
        (Causal(n_heads=2, n_kv_heads=3), "n_kv_heads=3 must lie in 1 .. n_heads=2"),
        (Causal(n_heads=2, v_head_dim=0), "v_head_dim=0 must be at least 1"),
        (Causal(n_heads=2, softcap=0.0), "softcap=0.0 must be above 0; 50 is usual, none is no cap"),
        (Causal(n_heads=2, window=0), "window=0 must be at least 1"),
        (Causal(n_heads=2, qk_norm=L2QKNorm(scale=0.0)), "qk_norm=l2: scale=0.0 must be above 0; 10 is usual"),
        (Causal(n_heads=2, qk_norm=RMSQKNorm(eps=0.0)), "qk_norm=rms: eps=0.0 must be above 0"),
        (MLA(n_heads=2, rope_dim=3), "rope_dim=3 must be even"),
        (MLA(n_heads=2, rope_dim=4), "rope_dim=4 channels are turned, but position=none turns nothing"),
        (MLA(n_heads=2, latent_dim=0), "latent_dim=0 must be at least 1"),
    ],
)
def test_impossible_options_are_refused_with_the_reason(attention, words):
    with pytest.raises(ConfigError) as error:
        block_of(attention)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_sink_is_refused_where_weights_are_divided_by_no_sum():
    unnormalised = next(cls for cls in Softmax.kinds.values() if not cls.sums_to_one)
    with pytest.raises(ConfigError, match="divides by no sum"):
        block_of(Causal(n_heads=2, softmax=unnormalised(), sink=FixedSink()))


def test_a_misspelt_word_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'length'"):
        build(Attention, {"kind": "causal", "qk_norm": {"kind": "l2", "scale": "lenght"}})
    with pytest.raises(ConfigError, match="did you mean 'head'"):
        build(Attention, {"kind": "causal", "sink": "heads"})


# ---- the suite, over options in company

QUICK = (
    "cached_equals_full",
    "rows_equal_single",
    "padding_is_unseen",
    "no_look_ahead",
    "documents_are_apart",
    "masked_rows_are_finite",
    "every_parameter_learns",
    "checkpointing_equals_plain",
    "parameters_follow_formula",
)
COMPANY = {
    "uneven, sink, gate, window": (
        Causal(n_heads=4, n_kv_heads=3, v_head_dim=5, sink=HeadSink(), gate=HeadGate(), window=5),
        Rotary(fraction=0.5),
    ),
    "rms, softcap, alibi": (Causal(n_heads=4, qk_norm=RMSQKNorm(), softcap=4.0, gate=ElementwiseGate()), ALiBi()),
    "l2, sink, fire, window": (
        Causal(n_heads=4, n_kv_heads=2, qk_norm=L2QKNorm(), v_norm=True, sink=LearnedSink(), window=4),
        FIRE(width=4),
    ),
    "summed, softcap, sink": (
        Infinite(n_heads=5, n_kv_heads=2, head_dim=6, v_head_dim=7, softcap=3.0, sink=HeadSink()),
        Learned(),
    ),
}


@pytest.mark.parametrize("name", COMPANY)
def test_options_in_company_pass_the_suite(name):
    attention, position = COMPANY[name]
    spec = GPT(
        vocab_size=31,
        d_model=16,
        n_layers=2,
        seq_len=32,
        attention=attention,
        mlp=Plain.small(),
        norm=RMSNorm(),
        position=position,
        dropout=0.1,
    )

    def make():
        torch.manual_seed(0)
        return create(spec)

    for check in QUICK:
        torch.manual_seed(0)
        ok, detail = CHECKS[check](stirred(make))
        assert ok, f"{check}: {detail}"


def test_another_linear_layer_for_the_output_is_used():
    other = next((cls for name, cls in Linear.kinds.items() if name != "dense"), None)
    if other is None:
        pytest.skip("there is one kind of linear layer")
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    ys = []
    for out in (None, other()):
        mixer = mixer_of(block_of(Causal(n_heads=2, out_linear=out)), stir=0.0)
        ys.append(mixer(x, prepared(mixer, At.full(1, 5)))[0])
    assert (ys[0] - ys[1]).abs().max() > 1e-6
