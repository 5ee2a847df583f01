"""Training objectives equal loops of their formulas; plain cross-entropy is reported whatever is trained on."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

from kernels.op import record
from models.families import create, preset
from models.loss import (
    Attenuated,
    BitBalanced,
    Confident,
    CrossEntropy,
    Flatness,
    Focal,
    Loss,
    Margin,
    Objective,
    PerByte,
    Rank,
    Ratio,
    Scheduled,
    Smoothed,
    Stage,
    Sum,
    Term,
)
from models.memory import At
from models.parts.attention import Causal
from models.parts.linear import AdaptiveBits, AdaptiveLinear
from models.parts.mlp import Plain
from models.parts.norm import RMSNorm
from models.parts.softmax import StrongerMax
from models.spec import ConfigError, build, plain

V = 7


def loop(rule: Objective, z: list[float], t: int, share: float) -> float:
    if isinstance(rule, Sum):
        return sum(term.weight * loop(term.loss, z, t, share) for term in rule.terms)
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
    if isinstance(rule, Ratio):
        ratio = max(a for i, a in enumerate(p) if i != t) / p[t]
        return nll + rule.weight * (ratio if ratio < 1 else 1 + math.log(ratio))
    if isinstance(rule, Rank):
        rank = sorted(z, reverse=True).index(z[t]) + 1
        return nll * (1 + rule.weight * math.log(rank) / math.log(len(z)))
    if isinstance(rule, PerByte):
        return nll * share
    if isinstance(rule, (CrossEntropy, BitBalanced)):
        return nll
    entropy = sum(-a * math.log(a) for a in p)
    if isinstance(rule, Flatness):
        return nll * (1 + rule.weight * entropy / math.log(len(z)))
    assert isinstance(rule, Confident)
    return nll + rule.weight * entropy


RULES = [
    Smoothed(),
    Focal(),
    Focal(gamma=0.5),
    Attenuated(),
    Attenuated(factor=0.0),
    Margin(),
    Ratio(),
    Confident(weight=-0.1),
    Rank(),
    Flatness(weight=2.0),
    PerByte(),
    Sum(),
    Sum((Term(weight=0.5), Term(PerByte(), 0.3), Term(Rank(3.0), -0.2))),
]


@pytest.mark.parametrize("rule", RULES)
def test_an_objective_is_its_formula_in_value_and_gradient(rule):
    torch.manual_seed(0)
    z = torch.randn(9, V, dtype=torch.float64, requires_grad=True)
    target = torch.arange(9) % V
    target[0] = z[0].argmax()
    share = torch.rand(9, dtype=torch.float64)

    def ours(z):
        return rule.of(z, target, F.cross_entropy(z, target, reduction="none"), share)

    want = [loop(rule, *row) for row in zip(z.tolist(), target.tolist(), share.tolist(), strict=True)]
    torch.testing.assert_close(ours(z), torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    if isinstance(rule, Flatness):  # its weight is a constant for the gradient
        weight = torch.tensor(want, dtype=torch.float64) / F.cross_entropy(z, target, reduction="none")
        own = torch.autograd.grad(ours(z).sum(), z)[0]
        torch.testing.assert_close(own, weight[:, None].detach() * (z.softmax(-1) - F.one_hot(target, V)))
    else:
        assert torch.autograd.gradcheck(ours, z)


def test_label_smoothing_is_torchs():
    z, target = torch.randn(9, V, dtype=torch.float64), torch.arange(9) % V
    ours = Smoothed(0.2).of(z, target, F.cross_entropy(z, target, reduction="none"))
    torch.testing.assert_close(ours, F.cross_entropy(z, target, label_smoothing=0.2, reduction="none"))


@pytest.mark.parametrize("believed", [2, 3])
def test_an_objective_is_finite_where_the_model_is_certain_rightly_or_wrongly(believed):
    z = torch.zeros(1, V, requires_grad=True)
    with torch.no_grad():
        z[0, believed] = 1e4
    for rule in RULES:
        z.grad = None
        target = torch.tensor([2])
        loss = rule.of(z, target, F.cross_entropy(z, target, reduction="none"), torch.ones(1))
        loss.sum().backward()
        assert loss.isfinite().all() and z.grad.isfinite().all(), rule


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
    n_bytes = torch.tensor([0, 1, 1, 2, 3, 7, 4])  # a token without text weighs one byte
    loss, nll = Loss(model, z_loss, rule, n_bytes)(ids, targets)
    logits = model(ids).logits.flatten(0, 1)
    plain = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(nll, plain.detach())
    real = targets.flatten() != -100
    z = z_loss * torch.logsumexp(logits, -1)[real].square().sum()
    if rule is None or isinstance(rule, CrossEntropy):
        torch.testing.assert_close(loss, plain + z)
    else:
        each = F.cross_entropy(logits, targets.flatten(), reduction="none")[real]
        share = (torch.tensor([1, 1, 1, 2, 3, 7, 4]) / (19 / V))[targets.flatten()[real]]
        own = rule.of(logits[real], targets.flatten()[real], each, share)
        torch.testing.assert_close(loss, own.sum() + z)


@pytest.mark.parametrize(
    ("rule", "changes", "path"),
    [
        (None, {}, "fast"),
        (None, {"logit_softcap": 4.0}, "fast"),
        (Smoothed(), {}, "fast"),
        (None, {"output_softmax": StrongerMax(base=3.0)}, "reference"),
        (Focal(), {}, None),
    ],
)
def test_a_training_step_takes_the_operation_that_never_builds_all_logits(rule, changes, path):
    model = small(**changes).float()
    model.resize_token_embeddings(9000)
    ids = torch.randint(9000, (4, 16), generator=torch.Generator().manual_seed(0))
    with record() as ran:
        loss, _ = Loss(model, 1e-4, rule)(ids, ids)
    loss.backward()
    expected = "triton" if ids.is_cuda else "cpu"
    wanted = [] if path is None else [expected if path == "fast" else path]
    assert [way for op, way in ran if op == "linear_cross_entropy"] == wanted
    assert model.head.weight.grad.any()


def test_learned_bits_are_weighed_by_the_size_of_their_matrix_and_fall():
    linear = AdaptiveBits(bits=4.0)
    model = small(attention=Causal(n_heads=2, linear=linear), mlp=Plain(hidden=24, linear=linear))
    layers = [m for m in model.modules() if isinstance(m, AdaptiveLinear)]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.width.fill_(i - 2.0)
    ids = torch.arange(24).reshape(2, 12) % V
    targets = ids.roll(-1, 1)
    targets[0, :5] = -100
    loss, nll = Loss(model, 0.0, BitBalanced(weight=0.7))(ids, targets)
    plain, _ = Loss(model)(ids, targets)
    bits = [round(1 + 7 / (1 + math.exp(2.0 - i))) for i in range(len(layers))]
    sizes = [layer.weight.numel() for layer in layers]
    assert len(set(sizes)) > 1 and len(set(bits)) > 2
    mean = sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)
    torch.testing.assert_close(loss, plain + 0.7 * mean * 19)
    torch.testing.assert_close(nll, plain.detach())
    summed, _ = Loss(model, 0.0, Sum((Term(BitBalanced(weight=0.7), 2.0), Term(weight=-1.0))))(ids, targets)
    torch.testing.assert_close(summed, plain + 1.4 * mean * 19)
    pushes = [torch.autograd.grad(x, [layer.width for layer in layers], retain_graph=True) for x in (loss, plain)]
    assert all(a > b for a, b in zip(*pushes, strict=True)), "the penalty pulls every matrix to fewer bits"


def test_an_objective_that_has_nothing_to_work_on_is_refused():
    with pytest.raises(ConfigError, match=r"loss=bit_balanced: .*adaptive_bits"):
        Loss(small(), 0.0, Sum((Term(BitBalanced()),)))
    with pytest.raises(ConfigError, match="loss=per_byte: the data's tokenizer does not say"):
        Loss(small(), 0.0, Scheduled((Stage(CrossEntropy(), 5), Stage(PerByte()))))


def test_each_stage_of_a_schedule_is_its_objective_and_torch_compile_makes_a_graph_of_each():
    schedule = Scheduled((Stage(Smoothed(), 2), Stage(Sum(), 5), Stage()))
    assert [schedule.stage(step) for step in range(7)] == [0, 0, 1, 1, 1, 2, 2]
    model = small()
    ids = torch.arange(24).reshape(2, 12) % V
    targets = ids.roll(-1, 1)
    torch._dynamo.reset()
    eager, graphs = Loss(model, 0.01, schedule), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(eager, dynamic=False, fullgraph=True, backend=graphs)
    for step in range(7):
        stage = schedule.stage(step)
        want = Loss(model, 0.01, schedule.rules()[stage])(ids, targets)
        for loss in (eager, compiled):
            for ours, theirs in zip(loss(ids, targets, stage=stage), want, strict=True):
                torch.testing.assert_close(ours, theirs)
    assert graphs.frame_count == 3


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "sum", "terms": []}, "terms=[]"),
        ({"kind": "sum", "terms": [{"loss": "focal", "weight": 0}]}, "weight=0 of focal"),
        ({"kind": "sum", "terms": [{"loss": "schedule"}]}, "stands outermost"),
        ({"kind": "schedule", "stages": []}, "stages: every one but the last"),
        ({"kind": "schedule", "stages": [{"loss": "focal", "until": 5}]}, "the last has none"),
        ({"kind": "schedule", "stages": [{"loss": "focal"}, {"loss": "rank"}]}, "needs `until`"),
        ({"kind": "schedule", "stages": [{"until": 5}, {"until": 5, "loss": "rank"}, {}]}, "until=5, 5 must grow"),
        ({"kind": "schedule", "stages": [{"until": 0}, {}]}, "until=0 must grow, from 1"),
        ({"kind": "schedule", "stages": [{"until": 5, "loss": "schedule"}, {}]}, "stands outermost"),
    ],
)
def test_a_sum_or_schedule_that_makes_no_sense_is_refused(tree, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(Objective, tree)


def test_a_schedule_of_sums_comes_back_from_plain_data():
    tree = {
        "kind": "schedule",
        "stages": [
            {"until": 500, "loss": {"kind": "sum", "terms": [{"loss": "smoothed"}, {"loss": "rank", "weight": 0.5}]}},
            {"loss": "cross_entropy"},
        ],
    }
    rule = build(Objective, tree)
    assert rule == Scheduled((Stage(Sum((Term(Smoothed()), Term(Rank(), 0.5))), 500), Stage()))
    assert build(Objective, plain(rule)) == rule


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
    "rule, words",
    [
        (Focal, "gamma"),
        (Smoothed, "epsilon"),
        (Attenuated, "factor"),
        (Confident, "weight"),
        (Rank, "weight"),
        (Flatness, "weight"),
        (BitBalanced, "weight"),
    ],
)
def test_an_objective_that_is_plain_cross_entropy_is_refused(rule, words):
    neutral = {"gamma": 0.0, "epsilon": 0.0, "factor": 1.0, "weight": 0.0}[words]
    with pytest.raises(ValueError, match="cross_entropy"):
        rule(**{words: neutral})
