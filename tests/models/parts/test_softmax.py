"""Softmaxes against loops in float64 over the visible keys, other implementations, and the originals' faults."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from models.parts.rows import LARGEST
from models.parts.softmax import (
    ArgMax,
    ConSmax,
    ConSmaxQuantised,
    Entmax15,
    ExpPolyMax,
    PFLAMax,
    PlainSoftmax,
    PolyMax,
    ReLU2Max,
    ReLUMax,
    SigmoidMax,
    Softmax,
    SparseMax,
    SquarePlusMax,
    StrongerMax,
)
from models.roles import initialise
from models.spec import ConfigError, build
from tests.models.parts.exact import agree, exact

H, T, S = 2, 3, 6


def softplus(x):
    return (1 + x.exp()).log()


def phi(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def over_sum(w):
    def row(xs, p, h):
        weights = [w(x) for x in xs]
        return [v / sum(weights) for v in weights]

    return row


def each(w, divisor=1.0):
    return lambda xs, p, h: [w(x) / divisor for x in xs]


def per_key(w):
    return lambda xs, p, h: [w(x) / len(xs) for x in xs]


def consmax(base=math.e, cap=80.0, heads=False, shared=None):
    def row(xs, p, h):
        beta, gamma = p.get("beta", shared and shared[0]), p.get("gamma", shared and shared[1])
        if heads:
            beta, gamma = 2.5 * beta[h, 0, 0], 100 * gamma[h, 0, 0]
        exponents = [(x - beta) * math.log(base) for x in xs]
        return [(e if e < cap else cap + 0 * e).exp() / gamma for e in exponents]

    return row


def stronger(base=math.e, temperature=None, obo=0.0, divisor=1.0):
    def row(xs, p, h):
        t = p["log_temperature"].exp() if "log_temperature" in p else (temperature or 1.0)
        o = obo
        if "log_obo" in p:
            o = p["log_obo"].exp() if p["log_obo"].dim() == 0 else p["log_obo"][h, 0, 0].exp()
        weights = [(x * math.log(base) / t).exp() for x in xs]
        return [w / (o + sum(weights)) / divisor for w in weights]

    return row


def guessed(guess):
    def row(xs, p, h):
        g = max(xs, key=lambda x: x.item()) if guess is None else guess
        return [((x - g) * math.log(2)).exp() / 3 for x in xs]

    return row


def poly(a, y0, power, divisor, reverse=False):
    def w(x):
        if x < a:
            return 0 * x
        if x <= 0:
            return y0 + (y0 / a) * x * (1 if reverse else -1)
        return x**power + y0

    return each(w, divisor)


def exp_poly(base, power, divisor):
    s = (math.log(base) / power) ** (1 / (power - 1))

    def w(x):
        return base**x if x < 0 else (x + s) ** power + 1 - s**power

    return each(w, divisor)


def pfla(knots, span, finish):
    def row(xs, p, h):
        heights, total = [], 1e-12
        for raw in p["rises"]:
            total = total + softplus(raw)
            heights.append(total)
        step = 2 * span / (knots - 1)

        def f(x):
            if x < -span:
                return heights[0] + 0 * x
            i = min(int((x.item() + span) / step), knots - 2)
            return heights[i] + (heights[i + 1] - heights[i]) * (x - (-span + i * step)) / step

        return finish([f(x) for x in xs])

    return row


def threshold(power):
    """The largest t with sum max(x - t, 0)^power = 1 by bisection tells which keys count; t is then solved for."""

    def row(xs, p, h):
        xs = [x / 2 if power == 2 else x for x in xs]
        low, high = max(x.item() for x in xs) - 2, max(x.item() for x in xs)
        for _ in range(200):
            t = (low + high) / 2
            total = sum(max(x.item() - t, 0) ** power for x in xs)
            low, high = (t, high) if total >= 1 else (low, t)
        counted = [x for x in xs if x > low]
        k, first = len(counted), sum(counted)
        if power == 1:
            t = (first - 1) / k
        else:
            second = sum(x * x for x in counted)
            t = (first - (first * first - k * (second - 1)).sqrt()) / k
        return [(x - t) ** power if x > low else 0 * x for x in xs]

    return row


def arg_max(xs, p, h):
    """1 at the greatest; the gradient is softmax's, which is added and taken away."""
    soft = over_sum(torch.exp)(xs, p, h)
    best = max(range(len(xs)), key=lambda i: xs[i].item())
    return [(1.0 if i == best else 0.0) + y - y.detach() for i, y in enumerate(soft)]


four = 4 * math.log(2) ** 2
LOOPS = [
    ({"kind": "softmax"}, over_sum(torch.exp)),
    ({"kind": "softermax"}, over_sum(lambda x: 2**x)),
    ({"kind": "sigsoftmax"}, over_sum(lambda x: x.exp() / (1 + (-x).exp()))),
    ({"kind": "sigsoftmax", "base": 3.0}, over_sum(lambda x: 3**x / (1 + (-x).exp()))),
    ({"kind": "stablemax"}, over_sum(lambda x: x + 1 if x >= 0 else 1 / (1 - x))),
    ({"kind": "strongermax"}, stronger()),
    ({"kind": "strongermax", "base": 2.0, "temperature": 0.7, "divisor": 4.0}, stronger(2.0, 0.7, 0.0, 4.0)),
    ({"kind": "strongermax", "obo": 1.5, "base": 3.0}, stronger(3.0, obo=1.5)),
    ({"kind": "strongermax", "learn_temperature": True, "temperature": 2.0}, stronger()),
    ({"kind": "strongermax", "obo": 1.0, "learn_obo": True}, stronger()),
    ({"kind": "strongermax", "obo": 2.0, "learn_obo": True, "obo_per_head": True}, stronger()),
    ({"kind": "strongermax", "normalise": False, "base": 2.0, "divisor": 3.0}, guessed(None)),
    ({"kind": "strongermax", "normalise": False, "base": 2.0, "divisor": 3.0, "max_guess": 1.5}, guessed(1.5)),
    ({"kind": "sparsemax"}, threshold(1)),
    ({"kind": "entmax15"}, threshold(2)),
    ({"kind": "ste_argmax"}, arg_max),
    ({"kind": "pfla"}, pfla(30, 10.0, lambda w: [v / sum(w) for v in w])),
    ({"kind": "pfla", "knots": 4, "span": 2.0, "obo": 0.5}, pfla(4, 2.0, lambda w: [v / (0.5 + sum(w)) for v in w])),
    ({"kind": "pfla", "normalise": False, "divisor": 5.0}, pfla(30, 10.0, lambda w: [v / 5 for v in w])),
    ({"kind": "consmax"}, consmax()),
    ({"kind": "consmax", "base": 2.0, "beta": -1.0, "gamma": 7.0}, consmax(2.0)),
    ({"kind": "consmax_v2"}, consmax(heads=True)),
    ({"kind": "saturatingconsmax", "saturation": 1.0, "beta": 0.3}, consmax(cap=1.0)),
    (
        {"kind": "saturatingconsmax", "learn_beta": False, "learn_gamma": False, "base": 2.0},
        consmax(2.0, 11 * math.log(2), shared=(2.5, 100.0)),
    ),
    ({"kind": "polymax", "start": -1.5, "height": 0.7}, poly(-1.5, 0.7, 2, 1000)),
    ({"kind": "polymax", "power": 3.0, "divisor": 10.0}, poly(-100, 1.0, 3, 10)),
    ({"kind": "vpolymax", "start": -1.5}, poly(-1.5, 1.0, 2, 1000, reverse=True)),
    ({"kind": "exppolymax"}, exp_poly(math.e, 2, 1000)),
    ({"kind": "exppolymax", "base": 4.0, "power": 3.0, "divisor": 2.0}, exp_poly(4.0, 3, 2)),
    ({"kind": "relumax"}, each(lambda x: x.clamp(min=0), 256)),
    ({"kind": "relu2max"}, each(lambda x: x.clamp(min=0) ** 2, 256)),
    ({"kind": "relumax", "divisor": 3.0}, each(lambda x: x.clamp(min=0), 3)),
    ({"kind": "relumax", "per_key": True}, per_key(lambda x: x.clamp(min=0))),
    ({"kind": "sigmoid"}, each(lambda x: 1 / (1 + (-x).exp()), 256)),
    ({"kind": "softplus"}, each(softplus, 256)),
    ({"kind": "softplus2"}, each(lambda x: softplus(x) ** 2, 256)),
    ({"kind": "softplus2", "per_key": True, "divisor": 2.0}, per_key(lambda x: softplus(x) ** 2 / 2)),
    ({"kind": "squareplus"}, each(lambda x: (x + (x * x + four).sqrt()) / 2, 100)),
    ({"kind": "softshrink"}, each(lambda x: x - 0.5 if x > 0.5 else x + 0.5 if x < -0.5 else 0 * x, 64)),
    ({"kind": "softshrink", "threshold": 0.1}, each(lambda x: x.sign() * (x.abs() - 0.1).clamp(min=0), 64)),
    ({"kind": "gelumax"}, each(lambda x: x * phi(x), 64)),
]


def make(options, n_heads=H):
    return build(Softmax, options).build(n_heads)


def masked(B=2):
    """Scores [B, H, T, S] and a mask [B, 1, T, S]; one row sees nothing."""
    scores, seen = torch.randn(B, H, T, S, dtype=torch.float64) * 2, torch.rand(B, 1, T, S) > 0.4
    seen[0, 0, 0] = False
    return scores, seen


def by_visible_keys(row):
    def loop(scores, p, seen):
        out = torch.zeros_like(scores)
        for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
            keys = [s for s in range(scores.shape[3]) if seen[b, 0, t, s]]
            if keys:
                weights = row([scores[b, h, t, s] for s in keys], p, h)
                for s, weight in zip(keys, weights, strict=True):
                    out = out.index_put(tuple(torch.tensor(i) for i in (b, h, t, s)), weight)
        return out

    return loop


@pytest.mark.parametrize("options, row", LOOPS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_softmaxes_equal_loops_over_visible_keys_in_value_and_gradient(options, row):
    scores, seen = masked()
    agree(exact(make(options), stir=0.1), by_visible_keys(row), scores, seen=seen)


def test_every_kind_has_a_loop():
    assert {options["kind"] for options, _ in LOOPS} | {"consmax_quantised"} == Softmax.kinds.keys()


def test_plain_softmax_alone_may_be_fused_and_equals_pytorchs():
    assert [kind for kind, cls in Softmax.kinds.items() if cls.fused] == ["softmax"]
    scores = torch.randn(2, H, T, S)
    torch.testing.assert_close(make({"kind": "softmax"})(scores), scores.softmax(-1), rtol=0, atol=0)


KINDS = list(Softmax.kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_no_nan_in_value_or_gradient_whatever_the_scores(kind):
    """Masked or infinite entries made squareplus, gelumax and softshrink NaN or infinite in the originals."""
    for softmax in (Softmax.kinds[kind]().build(H), *per_key_too(kind)):
        scores = torch.randn(2, H, 4, S)
        scores[0, 0, 0] = -torch.inf
        scores[0, 0, 1, :3] = -torch.inf
        scores[0, 1, 0] = 1e30
        scores[0, 1, 1] = -1e30
        scores[1, 0, 0, 0] = torch.inf
        scores[1, 0, 1] = torch.finfo(torch.float32).min
        scores.requires_grad_()
        seen = torch.rand(2, 1, 4, S) > 0.3
        seen[1, 0, 2] = False
        weights = softmax(scores, seen)
        assert weights.isfinite().all()
        hidden = ~seen.expand_as(weights) | (scores == -torch.inf)
        assert (weights[hidden] == 0).all()
        (weights * torch.randn_like(weights)).sum().backward()
        assert scores.grad.isfinite().all() and (scores.grad[hidden] == 0).all()
        assert all(p.grad.isfinite().all() for p in softmax.parameters())


def per_key_too(kind):
    cls = Softmax.kinds[kind]
    return [cls(per_key=True).build(H)] if hasattr(cls(), "per_key") else []


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_its_visible_keys_alone(kind):
    """Keys that come later, or belong to another document, change nothing: one token more gives the same rows.

    The originals' div_by_seq_len divided by the length of the row, visible or not.
    """
    for softmax in (Softmax.kinds[kind]().build(H), *per_key_too(kind)):
        softmax = exact(softmax)
        scores, seen = masked()
        full = softmax(scores, seen)
        for b, t in ((0, 1), (1, 0), (1, 2)):
            keys = seen[b, 0, t].nonzero()[:, 0]
            alone = softmax(scores[b : b + 1, :, t : t + 1, keys], None)
            torch.testing.assert_close(full[b, :, t, keys], alone[0, :, 0], rtol=1e-12, atol=1e-12)
        longer = softmax(F.pad(scores, (0, 5), value=9.0), F.pad(seen, (0, 5)))
        torch.testing.assert_close(longer[..., :S], full, rtol=1e-12, atol=1e-12)


def test_per_key_is_the_mean_over_visible_keys():
    softmax = ReLUMax(per_key=True).build(H)
    seen = torch.ones(S, S).tril().bool()
    weights = softmax(torch.ones(1, H, S, S), seen)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, H, S))
    total = ConSmax(per_key=True).build(H)(torch.full((1, H, 1, 4), 2.5)).sum(-1)
    torch.testing.assert_close(total, torch.full((1, H, 1), 0.01))


@pytest.mark.parametrize("kind", KINDS)
def test_the_flag_says_whether_rows_sum_to_one(kind):
    cls = Softmax.kinds[kind]
    totals = exact(cls().build(H))(torch.randn(4, H, 3, 50, dtype=torch.float64) * 3).sum(-1)
    assert bool(((totals - 1).abs() < 1e-12).all()) == cls.sums_to_one


WEIGHTS_OF_ONE_KEY = [o for o, _ in LOOPS if not Softmax.kinds[o["kind"]].sums_to_one or o.get("normalise") is False]
JUMPS = {"vpolymax"}  # at a, as its docstring says
FALL = {"vpolymax", "gelumax"}


def curve(options, x):
    """Weights of rows of one key, whose number is x."""
    return exact(make(options, 1))(x.view(1, -1, 1)).flatten().detach()


@pytest.mark.parametrize("options", [o for o in WEIGHTS_OF_ONE_KEY if o.get("max_guess", 0) is not None], ids=str)
def test_weights_are_continuous_and_rise_with_the_score(options):
    coarse, fine = (curve(options, torch.linspace(-12, 20, n, dtype=torch.float64)).diff() for n in (40_001, 80_001))
    continuous = fine.abs().max() <= 0.6 * coarse.abs().max() or fine.abs().max() == 0
    assert continuous == (options["kind"] not in JUMPS or options.get("start") is None)
    if options["kind"] not in FALL:
        assert (fine >= -1e-15).all()


@pytest.mark.parametrize("kind", [k for k in KINDS if Softmax.kinds[k].sums_to_one])
def test_in_a_row_greater_scores_have_greater_weights(kind):
    scores = torch.randn(1, H, 5, 30, dtype=torch.float64).sort(-1).values * 3
    assert (exact(Softmax.kinds[kind]().build(H))(scores).diff() >= -1e-15).all()


# ---- faults of the originals


def test_saturating_consmax_stays_where_it_saturates():
    """The original dropped from e^11 / gamma = 599 to 0.135 at that score."""
    before, at, after = curve({"kind": "saturatingconsmax"}, torch.tensor([13.4999, 13.5, 40.0], dtype=torch.float64))
    assert at.item() == pytest.approx(math.exp(11) / 100) and after == at
    assert before == pytest.approx(at.item(), rel=2e-4)


@pytest.mark.parametrize("base, power", [(math.e, 2.0), (4.0, 2.0), (1.5, 3.5)])
def test_exppolymax_has_one_value_and_one_slope_at_zero(base, power):
    """The original jumped from 1 to 1.25 there, and crashed with another base than e."""
    softmax = exact(ExpPolyMax(base=base, power=power, divisor=1.0).build(1))
    x = torch.tensor([-1e-9, 0.0], dtype=torch.float64).requires_grad_()
    y = softmax(x.view(1, 2, 1)).flatten()
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=1e-8)
    torch.testing.assert_close(slope, torch.full_like(slope, math.log(base)), rtol=0, atol=1e-7)


def test_o_of_strongermax_is_a_key_of_score_zero_whatever_the_maximum_is():
    """In the original its meaning changed with the row's maximum, which was subtracted before it was added."""
    scores = torch.randn(1, H, T, S, dtype=torch.float64) + 5
    for base, t, o in ((math.e, 1.0, 1.0), (2.0, 0.5, 3.0)):
        ours = exact(StrongerMax(base=base, temperature=t, obo=o).build(H))(scores)
        extra = torch.full((1, H, T, 1), math.log(o), dtype=torch.float64)
        want = torch.cat([scores * math.log(base) / t, extra], -1).softmax(-1)[..., :S]
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)


def test_pfla_uses_the_piece_that_a_score_lies_in():
    """The original took the wrong one and jumped by up to 0.65; both of its forms with o crashed."""
    softmax = exact(PFLAMax(normalise=False).build(1), stir=1.0)
    places = torch.linspace(-10, 10, 30, dtype=torch.float64)
    heights = F.softplus(softmax.rises).cumsum(0)
    torch.testing.assert_close(softmax(places.view(1, -1, 1)).flatten(), heights, rtol=1e-9, atol=1e-9)
    middle = softmax((places[:-1] + places[1:]).view(1, -1, 1) / 2).flatten()
    torch.testing.assert_close(middle, (heights[:-1] + heights[1:]) / 2, rtol=1e-9, atol=1e-9)
    scores, seen = masked()
    assert exact(PFLAMax(obo=1.0).build(H))(scores, seen).sum(-1).max() < 1


def test_pfla_starts_on_softplus():
    x = torch.linspace(-10, 20, 301, dtype=torch.float64)
    assert (curve({"kind": "pfla", "normalise": False}, x) - F.softplus(x)).abs().max() < 0.06


def test_consmax_quantised_rounds_both_numbers_and_trains_them():
    softmax = exact(ConSmaxQuantised(beta=2.503, gamma=100.04).build(H))
    scores = torch.randn(1, H, T, S, dtype=torch.float64)
    want = (scores - 2.50).exp() / 100.0
    torch.testing.assert_close(softmax(scores), want, rtol=1e-12, atol=1e-12)
    softmax(scores).sum().backward()
    assert softmax.beta.grad.item() == pytest.approx(-want.sum().item())
    assert softmax.gamma.grad.item() == pytest.approx(-want.sum().item() / 100)
    coarse = exact(ConSmaxQuantised(beta=2.7, gamma=107.0, beta_step=0.5, gamma_step=25.0).build(H))
    torch.testing.assert_close(coarse(scores), (scores - 2.5).exp() / 100)


def test_argmax_is_one_hot_in_training_as_in_evaluation():
    scores, seen = masked()
    softmax = exact(ArgMax().build(H))
    weights = softmax.train()(scores, seen)
    torch.testing.assert_close(weights, softmax.eval()(scores, seen), rtol=0, atol=0)
    assert ((weights == 0) | (weights == 1)).all() and (weights.sum(-1) == seen.any(-1)).all()


@pytest.mark.parametrize("spec", [SparseMax(), Entmax15()], ids=str)
def test_sparse_softmaxes_pass_gradcheck_and_have_zeros(spec):
    softmax = exact(spec.build(H))
    scores = (torch.randn(1, H, 2, 7, dtype=torch.float64) * 2).requires_grad_()
    assert torch.autograd.gradcheck(softmax, (scores,))
    weights = softmax(scores)
    assert (weights == 0).any() and (weights >= 0).all()


def test_sparse_softmaxes_are_right_in_long_rows_and_ties():
    for spec in (SparseMax(), Entmax15()):
        softmax = spec.build(H)
        scores = torch.randn(1, H, 2, 2000) * 5 + 1000
        want = exact(spec.build(H))(scores.double())
        torch.testing.assert_close(softmax(scores).double(), want, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(softmax(torch.full((1, H, 1, 8), 3.0)), torch.full((1, H, 1, 8), 0.125))


# ---- the output softmax

OUTPUT = [kind for kind in KINDS if Softmax.kinds[kind]().refuses_output() is None]


def test_output_softmaxes_are_those_that_give_every_token_a_chance():
    zeros = {"sparsemax", "entmax15", "ste_argmax", "relumax", "relu2max"}
    assert set(KINDS) - set(OUTPUT) == zeros | {"softshrink", "gelumax"}


@pytest.mark.parametrize("kind", OUTPUT)
def test_log_weights_are_the_logarithms_of_the_normalised_weights(kind):
    softmax = exact(Softmax.kinds[kind]().build(None))
    z = torch.randn(3, 5, 11, dtype=torch.float64) * 4
    weights = softmax(z)
    want = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(softmax.log_weights(z).softmax(-1), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", OUTPUT)
def test_log_weights_are_finite_whatever_the_logits(kind):
    softmax = Softmax.kinds[kind]().build(None)
    z = torch.randn(4, 9)
    z[0], z[1], z[2, :4], z[3, 0] = 1e30, -1e30, -torch.inf, torch.inf
    z.requires_grad_()
    logs = softmax.log_weights(z)
    F.cross_entropy(logs, torch.arange(4)).backward()
    assert logs.isfinite().all() and z.grad.isfinite().all()


@pytest.mark.parametrize("kind", OUTPUT)
def test_every_number_of_an_output_softmax_has_a_say(kind):
    """What cancels when a row is normalised is no parameter, and setting it is refused."""
    spec = Softmax.kinds[kind]()
    softmax = exact(spec.build(None))
    assert sum(p.numel() for p in softmax.parameters()) == spec.n_parameters(None)
    z = torch.randn(4, 9, dtype=torch.float64) * 5
    F.cross_entropy(softmax.log_weights(z), torch.arange(4)).backward() if spec.n_parameters(None) else None
    assert all(p.grad.abs().max() > 0 for p in softmax.parameters())


def test_options_that_cancel_are_refused_for_the_output():
    assert "beta=1.0 has no effect" in ConSmax(beta=1.0).refuses_output()
    assert "per_key=True has no effect" in SigmoidMax(per_key=True).refuses_output()
    assert "obo=1.0 has no effect" in StrongerMax(obo=1.0).refuses_output()
    assert ConSmax(base=2.0).refuses_output() is None and StrongerMax(temperature=2.0).refuses_output() is None
    assert "\n" not in ReLU2Max().refuses_output() and "logit below 0" in ReLU2Max().refuses_output()


def test_consmax_holds_exponents_that_would_overflow():
    weights = ConSmax(gamma=1.0).build(H)(torch.tensor([82.0, 83.0, 1e4]).expand(1, H, 1, 3))
    assert weights.isfinite().all() and weights[0, 0, 0, 0] < weights[0, 0, 0, 1] == weights[0, 0, 0, 2]


# ---- the rest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_heads", [H, 5, None])
def test_parameters_follow_the_formula_and_are_initialised_by_role(kind, n_heads):
    spec = Softmax.kinds[kind]()
    softmax = spec.build(n_heads)
    assert sum(p.numel() for p in softmax.parameters()) == spec.n_parameters(n_heads)
    fresh = {name: p.detach().clone() for name, p in softmax.named_parameters()}
    with torch.no_grad():
        for p in softmax.parameters():
            p.fill_(float("nan"))
    initialise(softmax, 0.02, 2)
    for name, p in softmax.named_parameters():
        torch.testing.assert_close(p.detach(), fresh[name], rtol=0, atol=0)


def test_heads_have_numbers_of_their_own_where_that_is_said():
    shapes = {kind: [tuple(p.shape) for p in Softmax.kinds[kind]().build(H).parameters()] for kind in KINDS}
    assert shapes["consmax"] == [(), ()] and shapes["consmax_v2"] == [(H, 1, 1), (H, 1, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_scores_have_float32_statistics(kind):
    softmax = Softmax.kinds[kind]().build(H)
    scores = (torch.randn(2, H, 4, 40) * 4).to(torch.bfloat16)
    ours = softmax(scores)
    want = exact(softmax)(scores.double())
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - want).abs() <= 2**-8 * want.abs() + 1e-6).all()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kind": "sigsoftmax", "base": 1.0}, "base=1.0 must be above 1"),
        ({"kind": "strongermax", "temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"kind": "strongermax", "obo": -1.0}, "obo=-1.0 must be at least 0"),
        ({"kind": "strongermax", "learn_obo": True}, "set obo above 0"),
        ({"kind": "strongermax", "obo": 1.0, "obo_per_head": True}, "with learn_obo only"),
        ({"kind": "strongermax", "obo": 1.0, "normalise": False}, "no sum to stand in"),
        ({"kind": "strongermax", "max_guess": 1.0}, "max_guess=1.0 has no effect with normalise"),
        ({"kind": "strongermax", "divisor": 0.0}, "divisor=0.0 must be above 0"),
        ({"kind": "consmax", "gamma": 0.0}, "gamma=0.0 must be above 0"),
        ({"kind": "saturatingconsmax", "saturation": 60.0, "base": 4.0}, "or float32 overflows"),
        ({"kind": "consmax_quantised", "beta_step": 0.0}, "beta_step=0.0 must be above 0"),
        ({"kind": "polymax", "start": 1.0}, "start=1.0 must be below 0"),
        ({"kind": "polymax", "height": 0.0}, "height=0.0 must be above 0"),
        ({"kind": "polymax", "power": 5.0}, "power=5.0 must lie in [1, 4]"),
        ({"kind": "exppolymax", "power": 1.0}, "power=1 is a line"),
        ({"kind": "relumax", "divisor": -2.0}, "divisor=-2.0 must be above 0"),
        ({"kind": "softshrink", "threshold": -1.0}, "threshold=-1.0 must be at least 0"),
        ({"kind": "pfla", "knots": 1}, "knots=1 must be at least 2"),
        ({"kind": "pfla", "normalise": False, "obo": 1.0}, "no sum to stand in"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_in_one_line(options, words):
    with pytest.raises(ConfigError) as error:
        build(Softmax, options, "softmax")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_softmax_states_its_operations(kind):
    spec = Softmax.kinds[kind]()
    counts = spec.ops(128).counts()
    assert counts["multiplies"] + counts["additions"] >= 128
    needs_row = spec.sums_to_one
    assert (counts["reductions"] > 0) == needs_row


def test_costs_tell_what_the_hardware_argument_for_consmax_is():
    ours, plain = ConSmax().ops(256), PlainSoftmax().ops(256)
    assert (ours.reductions, ours.divisions) == (0, 0) and (plain.reductions, plain.divisions) == (2, 1)
    assert ours.exponentials == plain.exponentials == 256 and ReLUMax().ops(256).exponentials == 0


SPECIAL = ["strongermax", "pfla", "ste_argmax", "entmax15", "consmax_quantised", "relumax"]


@pytest.mark.parametrize("kinds", [SPECIAL, pytest.param(KINDS, marks=pytest.mark.slow)], ids=["special", "all"])
def test_softmaxes_compile_into_one_graph(kinds):
    softmaxes = [Softmax.kinds[kind]().build(H) for kind in kinds]
    output = [Softmax.kinds[kind]().build(None) for kind in kinds if kind in OUTPUT]
    scores, seen = masked()
    scores = scores.float()
    f = lambda x: [s(x, seen) for s in softmaxes] + [s.log_weights(x) for s in output]
    for a, b in zip(torch.compile(f, fullgraph=True, backend="eager")(scores), f(scores), strict=True):
        torch.testing.assert_close(a, b)


def test_scores_are_held_within_numbers_whose_powers_are_finite():
    scores = torch.full((1, H, 1, 1), torch.inf)
    assert PolyMax(power=4.0).build(H)(scores).isfinite().all() and torch.finfo(torch.float32).max > LARGEST**4
    assert (SquarePlusMax().build(H)(-1e30 * torch.ones(1, H, 1, 1)) > 0).all()  # where x + sqrt(x^2 + c) would be 0
