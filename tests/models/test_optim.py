"""models/optim: schedules against known numbers and their formulas, groups, and AdamW against torch's own."""

from __future__ import annotations

import json
import math

import pytest
import torch

from models.families import create
from models.optim.groups import AdamW, Optim, decay_groups
from models.optim.schedule import WSD, Constant, Cosine, Linear, Schedule
from models.spec import ConfigError, build
from pipelines.lib.optimizer_state import join, split

PEAK = 1e-3


def spec(**changes):
    from models.lm import Family

    tree = {"kind": "gpt", "vocab_size": 31, "d_model": 16, "n_layers": 2, "seq_len": 8, "bias": True}
    return build(Family, {**tree, "attention": {"kind": "causal", "n_heads": 2}, **changes})


def test_every_schedule_rises_linearly_and_moves_from_the_first_update():
    for kind in Schedule.kinds.values():
        schedule = kind(warmup_steps=10)
        assert [schedule(s, 100) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
        assert schedule(10, 100) == pytest.approx(1.0, abs=0.02)


def test_ends_are_where_their_settings_say():
    assert Cosine(5, min_ratio=0.1)(99, 100) == pytest.approx(0.1)
    assert Linear(5, min_ratio=0.0)(99, 100) == pytest.approx(0.0)
    assert Constant(5)(99, 100) == 1.0
    for shape in ("linear", "1-sqrt", "cosine"):
        wsd = WSD(5, decay_share=0.2, shape=shape, min_ratio=0.05)
        assert wsd(79, 100) == 1.0 and wsd(80, 100) < 1.0 and wsd(99, 100) == pytest.approx(0.05)
        values = [wsd(s, 100) for s in range(79, 100)]
        assert values == sorted(values, reverse=True)
    assert WSD(0, 0.5, "1-sqrt")(74, 100) == pytest.approx(1 - math.sqrt(0.5))
    assert Cosine()(1000, 100) == pytest.approx(0.1), "a longer run stays at the end"


@pytest.mark.parametrize("total", [1, 2, 7])
def test_short_runs_have_finite_rates(total):
    for kind in Schedule.kinds.values():
        for warmup in (0, 1, 10):
            assert all(0 <= kind(warmup_steps=warmup)(s, total) <= 1 for s in range(total + 2))


def test_the_cosine_equals_known_numbers_from_elsewhere(data_dir):
    """The origin counts its warm-up from update 0 at rate 0, ours from 1; so ours is theirs one update later."""
    known = json.loads((data_dir / "numerics" / "lr_cosine.json").read_text())
    warmup, cycle = known["warmup_iters"], known["cosine_cycle_iters"]
    low, high = known["min_learning_rate"], known["max_learning_rate"]
    schedule = Cosine(warmup_steps=warmup, min_ratio=low / high)
    for i, rate in enumerate(known["expected_lrs_for_it_0_to_24"]):
        if i < warmup:
            assert high * schedule(i - 1, cycle + 1) == pytest.approx(rate) if i else rate == 0
        else:
            assert high * schedule(i, cycle + 1) == pytest.approx(rate)


def test_groups_hold_every_parameter_once_and_decay_matrices_only():
    for tied in (True, False):
        model = create(spec(tie_embeddings=tied))
        decay, plain = decay_groups(model, 0.1)
        assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
        assert all(p.ndim == 2 for p in decay["params"]) and all(p.ndim == 1 for p in plain["params"])
        ids = [id(p) for g in (decay, plain) for p in g["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_fused_adamw_equals_the_plain_one_and_its_own_formula():
    torch.manual_seed(0)
    models = [create(spec()).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = AdamW(lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1).build(models[0])["adamw"]
    theirs = torch.optim.AdamW(
        [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in decay_groups(models[1], 0.1)],
        lr=PEAK, betas=(0.9, 0.95), foreach=False,
    )  # fmt: skip
    name, p = next((n, p) for n, p in models[0].named_parameters() if p.ndim == 2)
    w = p.detach().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 6):
        x = torch.randint(31, (2, 8))
        for model, optimizer in ((models[0], ours), (models[1], theirs)):
            model(input_ids=x, labels=x).loss.backward()
            if model is models[0]:
                g = p.grad
                m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
                w = w * (1 - PEAK * 0.1)
                w -= PEAK * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert torch.allclose(p, w, atol=1e-12), name


def test_optimizer_state_goes_through_named_tensors_bitwise():
    torch.manual_seed(0)
    model = create(spec())
    optimizers = AdamW().build(model)
    x = torch.randint(31, (2, 8))

    def step(model, optimizer):
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizers["adamw"])
    names = lambda m: {id(p): n for n, p in m.named_parameters()}
    tensors, rest = split(optimizers, names(model))
    other = create(spec())
    other.load_state_dict(model.state_dict())
    again = AdamW().build(other)
    join(again, names(other), {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(rest)))
    step(model, optimizers["adamw"])
    step(other, again["adamw"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    faster = AdamW(lr=1.0, weight_decay=0.3).build(other)  # the settings are the config's, the moments the checkpoint's
    join(faster, names(other), {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(rest)))
    assert [group["lr"] for group in faster["adamw"].param_groups] == [1.0, 1.0]
    assert sorted(group["weight_decay"] for group in faster["adamw"].param_groups) == [0.0, 0.3]
    moments = [state["exp_avg"] for state in faster["adamw"].state.values()]
    assert len(moments) == len(list(other.parameters())) and any(m.any() for m in moments)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "adamw", "lr": 0}, "lr=0.0 is not positive"),
        ({"kind": "adamw", "betas": [0.9, 1.0]}, r"each must be in \[0, 1\)"),
        ({"kind": "adamw", "weight_decay": -1}, "is negative"),
        ("adam", "'adam' does not exist; did you mean 'adamw'"),
    ],
)
def test_settings_that_cannot_be_are_refused(tree, message):
    with pytest.raises(ConfigError, match=message):
        build(Optim, tree)
    with pytest.raises(ConfigError, match="outside"):
        build(Schedule, {"kind": "cosine", "min_ratio": 2})
