"""Position schemes against loops, against transformers, beyond their context; and the faults of the originals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from models.check import CHECKS, stirred
from models.families import create
from models.gpt.config import GPT
from models.memory import At
from models.parts.attention import Attention, Causal, Infinite
from models.parts.mlp import Plain
from models.parts.norm import RMSNorm
from models.parts.position import (
    FIRE,
    ALiBi,
    Cyclic,
    Learned,
    Mixed,
    NoPosition,
    Position,
    Rotary,
    Sinusoidal,
    Soap,
    stretched,
)
from models.parts.rotation import LinearScaling, Llama3Scaling, NTKScaling, RopeScaling, Rotation, Unscaled, YarnScaling
from models.parts.score_bias import AlibiBias, alibi_slopes
from models.spec import ConfigError, build
from tests.models.parts.attending import block_of, turned
from tests.models.parts.exact import exact

GPT_BASE = GPT(
    vocab_size=31,
    d_model=16,
    n_layers=2,
    seq_len=16,
    attention=Causal(n_heads=4, n_kv_heads=2),
    mlp=Plain(hidden=24),
    norm=RMSNorm(),
)


def model_of(position, **changes):
    torch.manual_seed(0)
    return create(dataclasses.replace(GPT_BASE, position=position, **changes)).eval()


def started(module):
    """A bare module, initialised as a model would."""
    for part in module.modules():
        for name, start in getattr(part, "initial", {}).items():
            if (p := getattr(part, name, None)) is not None:
                start(p.data) if callable(start) else p.data.fill_(start)
    return module


# ---- added to the embedding


def test_sinusoids_are_their_formula():
    for d in (8, 7):
        module = Sinusoidal(base=50.0, scale=0.3).embedding(d, 16)
        x = torch.randn(1, 5, d, dtype=torch.float64)
        got = module(x, At(torch.tensor([[0, 1, 2, 9, 300]]))) - x
        for t, p in enumerate((0, 1, 2, 9, 300)):
            for i in range(d):
                wave = math.sin if i % 2 == 0 else math.cos
                assert got[0, t, i].item() == pytest.approx(0.3 * wave(p / 50 ** ((i - i % 2) / d)), abs=1e-12)


def test_cyclic_positions_are_sums_of_tables():
    module = exact(Cyclic(lengths=(2, 3, 5)).embedding(4, 16))
    tables = module.weight.split([2, 3, 5])
    x = torch.zeros(1, 4, 4, dtype=torch.float64)
    for start in (0, 28):
        got = module(x, At.full(1, 4, start=start))[0]
        want = [sum(table[(start + t) % len(table)] for table in tables) for t in range(4)]
        torch.testing.assert_close(got, torch.stack(want))
    torch.testing.assert_close(module(x, At.full(1, 4, start=3)), module(x, At.full(1, 4, start=33)))  # 30 = lcm


def test_a_random_phase_is_one_per_row_drawn_in_training_by_the_generator():
    module = Cyclic(random_phase=True).embedding(4, 16)
    fixed = Cyclic().embedding(4, 16)
    fixed.load_state_dict(module.state_dict())
    x, at = torch.zeros(64, 3, 4), At.full(64, 3)
    torch.testing.assert_close(module.eval()(x, at), fixed(x, at))
    module.train()
    torch.manual_seed(5)
    first = module(x, at)
    torch.manual_seed(5)
    torch.testing.assert_close(module(x, at), first, rtol=0, atol=0)
    assert not torch.equal(module(x, at), first)
    every = fixed(torch.zeros(1, 2313, 4), At.full(1, 2313))[0]
    phases = [(every.unfold(0, 3, 1).transpose(1, 2) - row).abs().amax((1, 2)).argmin().item() for row in first]
    for row, phase in zip(first, phases, strict=True):
        torch.testing.assert_close(row, every[phase : phase + 3])  # a row's tokens stay neighbours
    assert len(set(phases)) > 40


# ---- turning

SCALINGS = {
    "linear": (LinearScaling(factor=3.0), {"factor": 3.0}),
    "yarn": (YarnScaling(factor=4.0, original=32), {"factor": 4.0, "original_max_position_embeddings": 32}),
    "yarn with all options": (
        YarnScaling(factor=16.0, original=256, fast=20.0, slow=2.0, attention=1.3),
        {
            "factor": 16.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "attention_factor": 1.3,
        },
    ),
    "llama3": (
        Llama3Scaling(factor=8.0, low=1.0, high=4.0, original=64),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
}


@pytest.mark.parametrize("base", [100.0, 10000.0, 500000.0])
@pytest.mark.parametrize("h", [8, 32, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_are_those_of_transformers(name, h, base):
    ours, theirs = SCALINGS[name]
    kind = name.split()[0]
    config = LlamaConfig(
        hidden_size=2 * h,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": kind, "rope_theta": base, **theirs},
    )
    want, magnitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    plain = base ** -(torch.arange(0, h, 2, dtype=torch.float64) / h)
    torch.testing.assert_close(ours.frequencies(plain, base).float(), want, rtol=2e-6, atol=0)
    assert ours.magnitude() == pytest.approx(magnitude)


@pytest.mark.parametrize("factor", [2.0, 4.0, 7.5])
def test_ntk_frequencies_are_transformers_dynamic_ones_at_the_stretched_length(factor):
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=1000,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0},
    )
    want, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=int(1000 * factor))
    plain = 10000.0 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    ours = NTKScaling(factor=factor).frequencies(plain, 10000.0)
    torch.testing.assert_close(ours.float(), want, rtol=2e-6, atol=0)
    assert ours[0] == 1 and ours[-1] == pytest.approx(plain[-1].item() / factor)


@pytest.mark.parametrize("fraction, r", [(1.0, 8), (0.5, 4), (0.25, 2)])
def test_partial_rotary_turns_the_leading_channels_and_leaves_the_rest(fraction, r):
    rotation = Rotary(base=30.0, fraction=fraction).rotation(8)
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    got = rotation(x, rotation.tables(At.full(1, 5), torch.float64))
    turn = turned(30.0, r)
    want = torch.stack([torch.stack([turn(x[0, t, n], t) for n in range(2)]) for t in range(5)])
    torch.testing.assert_close(got[0], want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[..., r:], x[..., r:], rtol=0, atol=0)


def test_yarn_multiplies_scores_by_its_magnitude_squared():
    x = torch.randn(1, 3, 1, 8, dtype=torch.float64)
    rotation = Rotary(scaling=YarnScaling(attention=1.5)).rotation(8)
    y = rotation(x, rotation.tables(At.full(1, 3), torch.float64))
    torch.testing.assert_close(y.norm(dim=-1), 1.5 * x.norm(dim=-1))


def test_soap_turns_all_pairs_by_one_angle_and_keeps_no_state():
    """The original rolled its table on every forward, so that phases depended on how often it had been called."""
    rotation = Soap(steps=12).rotation(4)
    x = torch.randn(1, 1, 1, 4, dtype=torch.float64)

    def at(p):
        return rotation(x, rotation.tables(At(torch.tensor([[p]])), torch.float64))[0, 0, 0]

    for p in (0, 1, 5, 11):
        z = torch.polar(torch.ones((), dtype=torch.float64), torch.tensor(2 * math.pi * p / 12, dtype=torch.float64))
        for m in range(2):
            want = torch.complex(x[0, 0, 0, m], x[0, 0, 0, m + 2]) * z
            torch.testing.assert_close(torch.complex(at(p)[m], at(p)[m + 2]), want)
    torch.testing.assert_close(at(3), at(15))
    torch.testing.assert_close(at(3), at(3), rtol=0, atol=0)
    model, ids = model_of(Soap()), torch.zeros(1, 5, dtype=torch.long)
    torch.testing.assert_close(model(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert model.state_dict().keys() == model_of(NoPosition()).state_dict().keys()


def test_rotation_tables_stay_in_float32_for_bfloat16_models():
    cos, _ = Rotation(8, 10000.0).tables(At.full(1, 3, start=4000), torch.bfloat16)
    assert cos.dtype == torch.float32


def test_layers_with_different_rotations_do_not_share_tables():
    positions = (Rotary(), Rotary(fraction=0.5), Rotary(scaling=LinearScaling()), Soap())
    keys = {position.rotation(8).key for position in positions}
    assert len(keys) == len(positions)
    assert Rotary().rotation(8).key == Rotary().rotation(8).key


# ---- added to scores


def fire_by_loops(spec, p, H, pos, keys):
    """[H, T, S] from the paper's formula, one entry at a time."""
    c = (1 + p["raw"].exp()).log()

    def psi(u):
        return (c * u + spec.b + spec.eps).log()

    out = []
    for head in range(H):
        rows = []
        for i in pos:
            start = (p["m"] * spec.threshold).abs()
            place = start if start > i else torch.tensor(float(i), dtype=torch.float64)
            row = []
            for j in keys:
                y = [psi(abs(i - j) + spec.eps) / psi(place + spec.eps)]
                for n in range(spec.hidden + 1):
                    W, last = p[f"layers.{n}.weight"], n == spec.hidden
                    if last:
                        W = W[head : head + 1]
                    y = [sum(w * v for w, v in zip(line, y, strict=True)) for line in W]
                    if not last:
                        y = [v + b for v, b in zip(y, p[f"layers.{n}.bias"], strict=True)]
                    if not last or spec.final_relu:
                        y = [v.clamp(min=0) for v in y]
                row.append(y[0])
            rows.append(torch.stack(row))
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.parametrize(
    "spec",
    [
        FIRE(width=3, threshold=3.5),
        FIRE(width=3, hidden=2, final_relu=True, c=0.5, b=1.5, eps=1e-2, threshold=2.0),
        FIRE(hidden=0),
    ],
    ids=["one hidden layer", "two and a last ReLU", "linear"],
)
def test_fire_equals_loops_in_value_and_gradient(spec):
    block = block_of(Causal(n_heads=2), spec)
    torch.manual_seed(1)
    module = exact(started(spec.make_bias(block)), 0.2)
    p = dict(module.named_parameters())
    for at, n_keys, cached in ((At.full(1, 6), 6, False), (At(torch.tensor([[4], [7]]), upto=9), 9, True)):
        got = module(at, n_keys, cached)
        rows = [at.pos[b].tolist() for b in range(len(got))]
        want = torch.stack([fire_by_loops(spec, p, 2, pos, range(n_keys) if cached else pos) for pos in rows])
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
        weight = torch.randn_like(want)
        ours, theirs = (
            torch.autograd.grad((y * weight).sum(), list(p.values()), allow_unused=True) for y in (got, want)
        )
        for a, b in zip(ours, theirs, strict=True):
            b = torch.zeros_like(a) if b is None else b
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_fires_c_stays_positive_however_far_it_is_pushed():
    """The original's c could go negative: the logarithm of a negative number."""
    spec = FIRE()
    module = started(spec.make_bias(block_of(Causal(n_heads=2), spec)))
    for raw in (-50.0, 0.0, 50.0):
        module.zero_grad()
        module.raw.data.fill_(raw)
        bias = module(At.full(1, 700), 700, False)
        bias.sum().backward()
        assert bias.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters())


def test_fire_starts_at_its_options():
    module = model_of(FIRE(c=0.25)).blocks[0].mixer.scores.bias
    assert nn.functional.softplus(module.raw).item() == pytest.approx(0.25) and module.m.item() == 1.0


def test_fire_is_not_rounded_by_autocast():
    spec = FIRE()
    module = started(spec.make_bias(block_of(Causal(n_heads=2), spec)))
    want = module(At.full(1, 40), 40, False)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(At.full(1, 40), 40, False), want, rtol=0, atol=0)


def test_shared_fire_is_one_module_and_equals_equal_ones_in_every_layer():
    shared, own = model_of(FIRE(width=3, shared=True)), model_of(FIRE(width=3))
    state = own.state_dict()
    bias = {k.removeprefix("score_bias."): v for k, v in shared.state_dict().items() if k.startswith("score_bias.")}
    assert len(bias) == 5 and not any("scores.bias" in k for k in shared.state_dict())
    for i in range(2):
        for name, value in bias.items():
            state[f"blocks.{i}.mixer.scores.bias.{name}"] = value
    state.update({k: v for k, v in shared.state_dict().items() if not k.startswith("score_bias.")})
    own.load_state_dict(state)
    ids = torch.randint(0, 31, (2, 9))
    torch.testing.assert_close(shared(ids).logits, own(ids).logits)
    for model in (shared, own):
        assert model.spec.n_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16, 20, 25])
def test_alibi_is_that_of_bloom(heads):
    theirs = build_alibi_tensor(torch.ones(1, 9), heads, torch.float32).view(heads, 1, 9)
    ours = AlibiBias(heads)(At.full(1, 9), 9, False)[0]
    difference = (ours - theirs)[:, 8]  # Bloom's rows differ by a constant, which softmax does not see
    torch.testing.assert_close(difference, difference[:, :1].expand(heads, 9), rtol=1e-6, atol=1e-5)
    assert ours.diagonal(dim1=1, dim2=2).abs().max() == 0 and len(set(alibi_slopes(heads))) == heads


def test_alibi_is_made_once_for_all_layers(monkeypatch):
    made = []
    original = AlibiBias.forward
    monkeypatch.setattr(AlibiBias, "forward", lambda self, *args: made.append(1) or original(self, *args))
    model_of(ALiBi())(torch.zeros(1, 4, dtype=torch.long))
    assert len(made) == 1


# ---- all of them

KINDS = {kind: cls() for kind, cls in Position.kinds.items()}
MORE = {
    "cyclic, rotary and shared fire": Mixed(absolute=Cyclic(), bias=FIRE(width=4, shared=True)),
    "half rotary, yarn": Rotary(fraction=0.5, scaling=YarnScaling(original=8)),
    "ntk": Rotary(scaling=NTKScaling()),
    "sinusoidal and soap": Mixed(absolute=Sinusoidal(), rotary=Soap(steps=20)),
}
QUICK = ("cached_equals_full", "rows_equal_single", "padding_is_unseen", "no_look_ahead", "documents_are_apart")


@pytest.mark.parametrize("name", [*KINDS, *MORE])
def test_decoding_padding_and_documents_stand_where_they_should(name):
    """The original's rotary restarted at 0 for every decoded token; here every scheme passes the suite."""
    position = {**KINDS, **MORE}[name]
    for check in (*QUICK, "every_parameter_learns", "parameters_follow_formula"):
        torch.manual_seed(0)
        ok, detail = CHECKS[check](stirred(lambda: model_of(position)))
        assert ok, f"{check}: {detail}"


@pytest.mark.parametrize("name", [*KINDS, *MORE])
def test_beyond_the_trained_context_a_scheme_runs_or_refuses_as_it_says(name):
    position = {**KINDS, **MORE}[name]
    model, ids = model_of(position), torch.randint(0, 31, (1, 40))
    words = " ".join(type(position).__doc__.split())
    assert "Beyond the trained context:" in words
    refuses = isinstance(position, Learned) or (isinstance(position, Mixed) and isinstance(position.absolute, Learned))
    if refuses:
        with pytest.raises(ValueError, match="position 39 has no learned vector: this model's seq_len is 16"):
            model(ids)
        assert "refuse" in words
    else:
        assert model(ids).logits.isfinite().all()
        assert isinstance(position, Mixed) or "Beyond the trained context: runs" in words


@pytest.mark.parametrize("name", [*KINDS, *MORE])
def test_operations_are_counted_where_they_happen(name):
    position = {**KINDS, **MORE}[name]
    block = block_of(Causal(n_heads=4), position, d_model=16)
    at8, at9 = position.ops(block, 8), position.ops(block, 9)
    assert (at9 != at8) == position.biases
    assert (position.rotation_ops(block).multiplies > 0) == position.turns
    assert (position.embedding_ops(16).additions > 0) == position.embeds
    added = at9.additions - at8.additions
    assert not position.biases or added >= 4  # one per head for the further key
    assert position.bias_ops(block, 8).multiplies == 0 or position.biases


def test_rotary_operations_are_two_products_and_a_sum_per_channel():
    block = block_of(Causal(n_heads=4, n_kv_heads=2), Rotary(fraction=0.5), d_model=16)
    ops = Rotary(fraction=0.5).rotation_ops(block)
    assert ops.additions == 6 * 2 and ops.exponentials == 2 and ops.multiplies == 6 * 2 * 2 + 1


# ---- longer contexts


def test_a_stretched_model_is_the_same_within_its_context_and_runs_beyond():
    ids = torch.randint(0, 31, (2, 60))
    for position in (Learned(), Mixed(bias=ALiBi()), Rotary(), FIRE(width=3, shared=True), Cyclic(), ALiBi()):
        model = model_of(position)
        for rows in ("cycle", "small"):
            longer = stretched(model, 64, rows)
            assert longer.spec.seq_len == longer.config.seq_len == 64 and model.spec.seq_len == 16
            torch.testing.assert_close(longer(ids[:, :16]).logits, model(ids[:, :16]).logits, rtol=0, atol=0)
            assert longer(ids).logits.isfinite().all()
            assert longer.spec.n_parameters() == sum(p.numel() for p in longer.parameters())


def test_new_rows_of_a_learned_table_are_its_own_again_or_as_small_as_it_started():
    """The original gave them unit variance beside trained rows that had started at 0.02."""
    model = model_of(Learned())
    model.position.weight.data.mul_(3)
    old = model.position.weight.data
    cycle = stretched(model, 40).position.weight
    torch.testing.assert_close(cycle, torch.cat([old, old, old[:8]]), rtol=0, atol=0)
    small = stretched(model, 400, "small").position.weight
    torch.testing.assert_close(small[:16], old, rtol=0, atol=0)
    assert small[16:].std().item() == pytest.approx(0.02, rel=0.05)
    torch.testing.assert_close(small, stretched(model, 400, "small").position.weight, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="seq_len=8 is shorter than the model's 16"):
        stretched(model, 8)


def test_a_stretched_model_is_saved_and_loaded(tmp_path):
    from models.families import load

    longer = stretched(model_of(Learned()), 32)
    longer.save_pretrained(tmp_path)
    ids = torch.randint(0, 31, (1, 30))
    torch.testing.assert_close(load(tmp_path)(ids).logits, longer(ids).logits)


# ---- refusals


@pytest.mark.parametrize(
    "position, words",
    [
        (Rotary(fraction=0.3), "fraction=0.3 of head_dim=8 is no even number; try 0.25"),
        (Rotary(fraction=0.0), "fraction=0.0 must lie in (0, 1]"),
        (Rotary(base=1.0), "base=1.0 must be above 1"),
        (Rotary(scaling=LinearScaling(factor=1.0)), "scaling=linear: factor=1.0 must be above 1"),
        (Rotary(fraction=0.25, scaling=NTKScaling()), "scaling=ntk: ntk needs a fastest and a slowest pair"),
        (Rotary(scaling=YarnScaling(fast=1.0)), "fast=1.0 must be above slow=1.0"),
        (Rotary(scaling=Llama3Scaling(low=4.0)), "high=4.0 must be above low=4.0"),
        (Soap(steps=1), "steps=1 must be at least 2"),
        (Sinusoidal(scale=0.0), "scale=0.0 must be above 0"),
        (Cyclic(lengths=(3, 3)), "two tables of one length are one table"),
        (Cyclic(lengths=()), "at least one is needed"),
        (FIRE(b=0.5), "b=0.5 must be at least 1"),
        (FIRE(c=0.0), "c=0.0 must be above 0"),
        (FIRE(hidden=0, width=8), "width=8 has no effect with hidden=0"),
        (Mixed(absolute=Rotary()), "absolute=rotary does something else there; there is learned, sinusoidal, cyclic"),
        (Mixed(bias=Learned()), "bias=learned does something else there; there is fire, alibi, none"),
        (Mixed(rotary=Rotary(base=0.5)), "rotary=rotary: base=0.5 must be above 1"),
    ],
)
def test_impossible_positions_are_refused_with_the_reason(position, words):
    with pytest.raises(ConfigError) as error:
        block_of(Causal(n_heads=2), position, d_model=16)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_scheme_is_refused_and_not_left_out():
    """The original took any other word for "no rotation"."""
    with pytest.raises(ConfigError, match="'shortrope' does not exist"):
        build(Position, "shortrope")
    with pytest.raises(ConfigError, match="did you mean 'yarn'"):
        build(Position, {"kind": "rotary", "scaling": "yarm"})


def test_every_scaling_is_a_choice_and_the_default_changes_nothing():
    assert set(RopeScaling.kinds) == {"none", "linear", "ntk", "yarn", "llama3"}
    f = torch.rand(4)
    torch.testing.assert_close(Unscaled().frequencies(f, 10.0), f, rtol=0, atol=0)


def test_positions_reach_infinite_heads():
    x = torch.randint(0, 31, (1, 6))
    for position in (Rotary(), ALiBi()):
        a, b = (model_of(p, attention=Infinite(n_heads=3, head_dim=4)) for p in (position, NoPosition()))
        b.load_state_dict(a.state_dict())
        assert (a(x).logits - b(x).logits).abs().max() > 1e-6


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"position": (FIRE(shared=True), Rotary())}, "position=fire shares one bias among all layers, so it cannot"),
        ({"position": (Mixed(), Mixed())}, "position=mixed is added to the embedding, so it cannot stand in a list"),
        (
            {"attention": Causal(n_heads=(4, 2)), "position": FIRE(shared=True)},
            "position=fire: layers that share one bias need equally many heads",
        ),
    ],
)
def test_what_belongs_to_the_whole_model_is_refused_in_a_list(changes, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(GPT_BASE, **changes)


def test_layers_may_have_schemes_of_their_own():
    model = model_of((Rotary(), FIRE(width=3)))
    assert model.blocks[0].mixer.scores.bias is None and model.blocks[1].mixer.rotation is None
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()


def test_schemes_that_act_on_scores_are_refused_where_there_are_none():
    for name, words in (("ssm", "has none to turn"), ("linear", "adds to attention scores")):
        if name in Attention.kinds:
            attention = Attention.kinds[name]
            attention = getattr(attention, "small", attention)()
            position = Rotary() if name == "ssm" else ALiBi()
            with pytest.raises(ConfigError, match=words):
                block_of(attention, position, d_model=16)
