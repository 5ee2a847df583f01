"""Training objectives equal loops of their formulas; plain cross-entropy is reported whatever is trained on."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from models.families import create, preset
from models.loss import Attenuated, Confident, CrossEntropy, Focal, Loss, Margin, Objective, Smoothed
from models.memory import At
from models.parts.norm import RMSNorm

V = 7


def loop(rule: Objective, z: list[float], t: int) -> float:
    total = sum(math.exp(a) for a in z)
    p = [math.exp(a) / total for a in z]
    nll = -math.log(p[t])
    if isinstance(rule, Smoothed):
        return (1 - rule.epsilon) * nll + rule.epsilon * sum(-math.log(a) for a in p) / len(z)
    if isinstance(rule, Focal):
        return (1 - p[t]) ** rule.gamma * nll
    if isinstance(rule, Attenuated):
        return nll * (rule.factor if max(z) == z[t] else 1.0)
    if isinstance(rule, Margin):
        best = max(a for i, a in enumerate(z) if i != t)
        return nll + rule.weight * max(0.0, rule.margin - (z[t] - best))
    return nll + rule.weight * sum(-a * math.log(a) for a in p)


RULES = [Smoothed(), Focal(), Focal(gamma=0.5), Attenuated(), Attenuated(factor=0.0), Margin(), Confident(weight=-0.1)]


@pytest.mark.parametrize("rule", RULES)
def test_an_objective_is_its_formula_in_value_and_gradient(rule):
    z = torch.randn(9, V, dtype=torch.float64, requires_grad=True)
    target = torch.arange(9) % V
    target[0] = z[0].argmax()

    def ours(z):
        return rule.of(z, target, F.cross_entropy(z, target, reduction="none"))

    want = [loop(rule, row, t) for row, t in zip(z.tolist(), target.tolist(), strict=True)]
    torch.testing.assert_close(ours(z), torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    assert torch.autograd.gradcheck(ours, z)


def test_label_smoothing_is_torchs():
    z, target = torch.randn(9, V, dtype=torch.float64), torch.arange(9) % V
    ours = Smoothed(0.2).of(z, target, F.cross_entropy(z, target, reduction="none"))
    torch.testing.assert_close(ours, F.cross_entropy(z, target, label_smoothing=0.2, reduction="none"))


def test_an_objective_is_finite_where_the_model_is_certain():
    z = torch.zeros(1, V, requires_grad=True)
    with torch.no_grad():
        z[0, 2] = 1e4
    for rule in RULES:
        z.grad = None
        target = torch.tensor([2])
        rule.of(z, target, F.cross_entropy(z, target, reduction="none")).sum().backward()
        assert z.grad.isfinite().all(), rule


def small(**changes):
    torch.manual_seed(0)
    return create(dataclasses.replace(preset("tiny"), vocab_size=V, d_model=16, seq_len=16, **changes)).double()


@pytest.mark.parametrize("rule", [None, CrossEntropy(), *RULES])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_plain_cross_entropy_is_reported_beside_every_objective(rule, z_loss):
    """The original validated with the training loss, so its runs could not be compared."""
    model = small(logit_softcap=4.0, head_norm=RMSNorm())
    ids = torch.arange(24).reshape(2, 12) % V
    targets = ids.roll(-1, 1)
    targets[0, :5] = -100
    loss, nll = Loss(model, z_loss, rule)(ids, targets)
    logits = model(ids).logits.flatten(0, 1)
    plain = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(nll, plain.detach())
    real = targets.flatten() != -100
    z = z_loss * torch.logsumexp(logits, -1)[real].square().sum()
    if rule is None or isinstance(rule, CrossEntropy):
        torch.testing.assert_close(loss, plain + z)
    else:
        own = rule.of(
            logits[real], targets.flatten()[real], F.cross_entropy(logits, targets.flatten(), reduction="none")[real]
        )
        torch.testing.assert_close(loss, own.sum() + z)


def test_losses_of_parts_are_added_per_target():
    model = small()
    ids = torch.arange(24).reshape(2, 12) % V
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    without, _ = Loss(model)(ids, targets)
    inner = model.blocks[0].mlp.forward

    def with_loss(x, at: At):
        at.add_loss("balance", x.square().mean() * 0 + 0.5)
        return inner(x, at)

    model.blocks[0].mlp.forward = with_loss
    loss, nll = Loss(model)(ids, targets)
    torch.testing.assert_close(loss, without + 0.5 * 22)
    torch.testing.assert_close(nll, without.detach())


def test_the_soft_cap_bounds_the_logits_and_the_hf_forward_agrees():
    model = small(logit_softcap=0.01)
    ids = torch.arange(10)[None] % V
    out = model(ids, labels=ids)
    assert out.logits.abs().max() <= 0.01
    targets = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    loss, _ = Loss(model)(ids, targets)
    torch.testing.assert_close(out.loss, loss / 9, check_dtype=False)


@pytest.mark.parametrize(
    "rule, words", [(Focal, "gamma"), (Smoothed, "epsilon"), (Attenuated, "factor"), (Confident, "weight")]
)
def test_an_objective_that_is_plain_cross_entropy_is_refused(rule, words):
    neutral = {"gamma": 0.0, "epsilon": 0.0, "factor": 1.0, "weight": 0.0}[words]
    with pytest.raises(ValueError, match="cross_entropy"):
        rule(**{words: neutral})
