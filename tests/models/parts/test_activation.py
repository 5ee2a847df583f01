"""Activations against formulas on single numbers, other implementations, and the faults that earlier programs had."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from torch import nn
from torch.nn import functional as F

from models.parts.activation import (
    PFLA,
    STARTS,
    Activation,
    LearnedSpline,
    PFLAExtended,
    Pieces,
    RReLU,
)
from models.parts.curve import GAP, Curve, inverse_softplus, spline
from models.roles import initialise
from models.spec import ConfigError, build
from tests.models.parts.exact import exact


def gelu(x):
    return x * 0.5 * math.erfc(-x / math.sqrt(2))


def softplus(x):
    return math.log1p(math.exp(x))


def knots(p):
    """Places and heights from what is stored: x_0, raw distances, heights."""
    n = (len(p) - 1 + 1) // 2
    first, gaps, heights = p[0], p[1:n], p[n:]
    places = [first]
    for gap in gaps:
        places.append(places[-1] + softplus(gap) + GAP)
    return places, heights


def pieces(right):
    def f(x, *p):
        xs, ys = knots(p)
        if x <= xs[0]:
            return ys[0]
        if x >= xs[-1]:
            slope = right if right is not None else (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
            return ys[-1] + slope * (x - xs[-1])
        return float(np.interp(x, xs, ys))

    return f


def natural_spline(x, *p):
    xs, ys = knots(p)
    curve = CubicSpline(xs, ys, bc_type="natural")
    if xs[0] <= x <= xs[-1]:
        return float(curve(x))
    end = xs[0] if x < xs[0] else xs[-1]
    return float(curve(end) + curve(end, 1) * (x - end))


def xielu(x, p, n, beta=0.5):
    return softplus(p) * x * x + beta * x if x > 0 else (beta + softplus(n)) * (math.exp(x) - 1 - x) + beta * x


# Each kind at default options, on one number and its parameters.
FORMULAS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "relu_power": lambda x: max(x, 0.0) ** 2,
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "prelu": lambda x, s: x if x > 0 else s * x,
    "rrelu": lambda x: x if x > 0 else (1 / 8 + 1 / 3) / 2 * x,
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "celu": lambda x: x if x > 0 else math.exp(x) - 1,
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * (math.exp(x) - 1)),
    "mish": lambda x: x * math.tanh(softplus(x)),
    "hardswish": lambda x: x * min(max(x + 3, 0.0), 6.0) / 6,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": lambda x: (math.exp(2 * x) - 1) / (math.exp(2 * x) + 1),
    "softplus": softplus,
    "softsign": lambda x: x / (1 + abs(x)),
    "softshrink": lambda x: x - 0.5 if x > 0.5 else x + 0.5 if x < -0.5 else 0.0,
    "identity": lambda x: x,
    "disco": lambda x: x * abs(x),
    "squared_gelu": lambda x: math.copysign(gelu(x) ** 2, x),
    "gelu_shifted": lambda x, s: gelu(x - s),
    "snake": lambda x, a: x + math.sin(math.exp(a) * x) ** 2 / math.exp(a),
    "xielu": xielu,
    "piecewise": pieces(1.0),
    "pfla": pieces(1.0),
    "pfla_le": pieces(None),
    "learned_spline": natural_spline,
}
# Other values of options, so that every option is read.
OPTIONS = [
    ("relu_power", {"power": 2.5}, lambda x: max(x, 0.0) ** 2.5),
    ("relu_power", {"power": 1.0}, lambda x: max(x, 0.0)),
    ("leaky_relu", {"slope": 0.2}, lambda x: x if x > 0 else 0.2 * x),
    ("rrelu", {"lower": 0.1, "upper": 0.5}, lambda x: x if x > 0 else 0.3 * x),
    ("elu", {"alpha": 2.0}, lambda x: x if x > 0 else 2 * (math.exp(x) - 1)),
    ("celu", {"alpha": 2.0}, lambda x: x if x > 0 else 2 * (math.exp(x / 2) - 1)),
    ("softplus", {"beta": 3.0}, lambda x: softplus(3 * x) / 3),
    ("softshrink", {"threshold": 1.1}, lambda x: math.copysign(max(abs(x) - 1.1, 0.0), x)),
    ("xielu", {"start": 1.2, "beta": 0.7}, lambda x, p, n: xielu(x, p, n, 0.7)),
    ("piecewise", {"knots": 5, "span": 3.0, "start": "tanh"}, pieces(1.0)),
    ("learned_spline", {"knots": 4, "span": 2.0, "start": "silu"}, natural_spline),
]
CASES = [(kind, {}, f) for kind, f in FORMULAS.items()] + OPTIONS


@pytest.mark.parametrize("kind, options, f", CASES, ids=lambda v: str(v) if isinstance(v, (str, dict)) else "")
def test_activations_equal_formulas_in_value_and_gradient(kind, options, f):
    """Gradients, of x and of each parameter, against central differences of the formula."""
    act = build(Activation, {"kind": kind, **options}).build()
    parameters = []
    if isinstance(act, nn.Module):
        act = exact(act, stir=0.2).eval()
        parameters = list(act.parameters())
    x = (torch.randn(40, dtype=torch.float64) * 3).requires_grad_()
    flat = [v for p in parameters for v in p.flatten().tolist()]
    y = act(x)
    want = torch.tensor([f(v, *flat) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(y.detach(), want, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(y)
    got = torch.autograd.grad((y * weight).sum(), [x, *parameters])
    h = 1e-5
    slopes = [(f(v + h, *flat) - f(v - h, *flat)) / (2 * h) for v in x.tolist()]
    torch.testing.assert_close(got[0], torch.tensor(slopes, dtype=torch.float64) * weight, rtol=1e-6, atol=1e-6)
    of_parameters = []
    for i in range(len(flat)):
        up, down = ([*flat[:i], flat[i] + s, *flat[i + 1 :]] for s in (h, -h))
        values = zip(x.tolist(), weight.tolist(), strict=True)
        of_parameters.append(sum(w * (f(v, *up) - f(v, *down)) / (2 * h) for v, w in values))
    flat_gradient = torch.cat([g.flatten() for g in got[1:]]) if parameters else torch.zeros(0, dtype=torch.float64)
    torch.testing.assert_close(flat_gradient, torch.tensor(of_parameters, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_every_kind_has_a_formula():
    assert FORMULAS.keys() == Activation.kinds.keys()


@pytest.mark.parametrize(
    "kind, theirs",
    [
        ("celu", nn.CELU()),
        ("elu", nn.ELU()),
        ("gelu", nn.GELU()),
        ("leaky_relu", nn.LeakyReLU()),
        ("mish", nn.Mish()),
        ("prelu", nn.PReLU()),
        ("relu6", nn.ReLU6()),
        ("rrelu", nn.RReLU().eval()),
        ("selu", nn.SELU()),
        ("softplus", nn.Softplus()),
        ("softsign", nn.Softsign()),
        ("softshrink", nn.Softshrink()),
        ("hardswish", nn.Hardswish()),
    ],
)
def test_defaults_are_the_frameworks(kind, theirs):
    act = Activation.kinds[kind]().build()
    act = act.eval() if isinstance(act, nn.Module) else act
    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(act(x), theirs(x))


@pytest.mark.parametrize("kind", Activation.kinds)
def test_parameters_follow_the_formula_and_are_initialised_by_role(kind):
    spec = Activation.kinds[kind]()
    act = spec.build()
    parameters = dict(act.named_parameters()) if isinstance(act, nn.Module) else {}
    assert sum(p.numel() for p in parameters.values()) == spec.n_parameters()
    if parameters:
        fresh = {name: p.detach().clone() for name, p in parameters.items()}
        with torch.no_grad():
            for p in parameters.values():
                p.fill_(float("nan"))
        initialise(act, 0.02, 2)
        for name, p in act.named_parameters():
            torch.testing.assert_close(p.detach(), fresh[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", Activation.kinds)
def test_bfloat16_stays_bfloat16_and_near_float64(kind):
    act = Activation.kinds[kind]().build()
    act = act.eval() if isinstance(act, nn.Module) else act
    x = torch.linspace(-8, 8, 200).to(torch.bfloat16)
    ours = act(x)
    act = exact(act) if isinstance(act, nn.Module) else act
    want = act(x.double())
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - want).abs() <= 2**-6 * want.abs().clamp(min=1)).all()


# ---- learned curves

CURVES = [Pieces(), PFLA(), PFLAExtended(), LearnedSpline(), LearnedSpline(knots=7, span=2.0)]


@pytest.mark.parametrize("spec", CURVES, ids=str)
@pytest.mark.parametrize("stir", [0.0, 1.0])
def test_learned_curves_are_continuous(spec, stir):
    """The originals jumped by 0.1 at the left end (pieces) and by 0.2 between pieces (spline)."""
    curve = exact(spec.build(), stir)

    def largest_jump(n):
        return curve(torch.linspace(-15, 15, n, dtype=torch.float64)).diff().abs().max().item()

    assert largest_jump(200_001) <= 0.6 * largest_jump(100_001)


@pytest.mark.parametrize("spec", CURVES, ids=str)
def test_knots_keep_their_order(spec):
    curve = exact(spec.build(), stir=5.0)
    assert (curve.places().diff() >= GAP).all()
    assert curve(torch.linspace(-50, 50, 999, dtype=torch.float64)).isfinite().all()


def test_splines_have_continuous_slope_and_curvature():
    curve = exact(LearnedSpline(knots=6).build(), stir=0.5)
    h = 1e-6
    for place in curve.places().tolist():
        x = torch.tensor([place - h, place + h], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(curve(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x)
        assert abs(slope[1] - slope[0]) < 1e-4 and abs(bend[1] - bend[0]) < 1e-3


@pytest.mark.parametrize("spec, limit", [(Pieces(), 0.046), (PFLA(), 0.017), (LearnedSpline(), 8e-5)], ids=str)
def test_curves_start_near_gelu_everywhere(spec, limit):
    """The original spline was off by up to 0.2; ours is within what its docstring says."""
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    error = (exact(spec.build())(x) - F.gelu(x)).abs().max().item()
    assert limit / 2 < error <= limit


def test_the_number_of_knots_is_obeyed():
    """The original spline had ten, whatever was asked for."""
    for n in (3, 12, 30):
        assert len(LearnedSpline(knots=n).build().heights) == n
    few, many = (exact(LearnedSpline(knots=n).build()) for n in (6, 40))
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    assert (many(x) - F.gelu(x)).abs().max() < 0.01 * (few(x) - F.gelu(x)).abs().max()


def test_a_curve_goes_through_its_knots():
    for spec in CURVES:
        curve = exact(spec.build(), stir=0.3)
        torch.testing.assert_close(curve(curve.places()), curve.heights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", CURVES, ids=str)
def test_every_knot_learns_from_what_lies_left_and_right_of_it(spec):
    """The original cut the gradient left of the knots."""
    curve = exact(spec.build())
    curve(torch.tensor([-20.0, 20.0], dtype=torch.float64)).sum().backward()
    assert curve.heights.grad[0] != 0 and curve.heights.grad[-1] != 0


@pytest.mark.parametrize("start", STARTS)
def test_curves_start_on_the_named_function(start):
    x = torch.linspace(-4, 4, 401, dtype=torch.float64)
    want = STARTS[start](x)
    assert (exact(LearnedSpline(knots=60, start=start).build())(x) - want).abs().max() < 0.04


def test_the_stored_form_of_distances_is_inverted():
    for y in (1e-6, 0.3, 5.0, 50.0):
        assert F.softplus(torch.tensor(inverse_softplus(y), dtype=torch.float64)).item() == pytest.approx(y, rel=1e-9)


def test_a_spline_equals_scipys_between_uneven_knots():
    xs = torch.tensor([-2.0, -1.9, 0.3, 0.5, 3.0], dtype=torch.float64)
    ys = torch.randn(5, dtype=torch.float64)
    x = torch.linspace(-2, 3, 77, dtype=torch.float64)
    want = CubicSpline(xs.numpy(), ys.numpy(), bc_type="natural")(x.numpy())
    np.testing.assert_allclose(spline(x, xs, ys).numpy(), want, rtol=1e-11, atol=1e-12)


# ---- the rest


def test_rrelu_draws_its_slopes_in_training_only():
    act = RReLU(lower=0.2, upper=0.4).build()
    x = -torch.ones(1000)
    drawn = -act.train()(x)
    assert 0.2 <= drawn.min() < 0.25 and 0.35 < drawn.max() <= 0.4
    torch.testing.assert_close(act.eval()(x), torch.full((1000,), -0.3))


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("elu", {"alpha": 0.0}, "alpha=0.0 must be above 0"),
        ("celu", {"alpha": -1.0}, "alpha=-1.0 must be above 0"),
        ("softplus", {"beta": 0.0}, "beta=0.0 must be above 0"),
        ("softshrink", {"threshold": 0.0}, "threshold=0.0 must be above 0"),
        ("rrelu", {"lower": 0.5, "upper": 0.2}, "lower first"),
        ("relu_power", {"power": 0.5}, "power=0.5 must be at least 1"),
        ("snake", {"frequency": 0.0}, "frequency=0.0 must be above 0"),
        ("xielu", {"start": 0.5}, "beta=0.5 must lie in (0, start=0.5)"),
        ("pfla", {"knots": 1}, "knots=1 must be at least 2"),
        ("pfla", {"span": 0.0}, "span=0.0 must be above 0"),
        ("learned_spline", {"knots": 2}, "knots=2 must be at least 3"),
        ("learned_spline", {"knots": 9000}, "knots=9000 stand closer than 0.002"),
    ],
)
def test_impossible_options_are_refused_in_one_line(kind, options, words):
    with pytest.raises(ConfigError) as error:
        build(Activation, {"kind": kind, **options}, "activation")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", Activation.kinds)
def test_an_activation_states_its_operations(kind):
    total = sum(Activation.kinds[kind]().ops().counts().values())
    assert (total == 0) == (kind == "identity")


def test_all_activations_compile_into_one_graph():
    acts = [cls().build() for kind, cls in Activation.kinds.items() if kind != "rrelu"]
    x = torch.randn(3, 5)
    f = lambda x: [act(x) for act in acts]
    for a, b in zip(torch.compile(f, fullgraph=True, backend="eager")(x), f(x), strict=True):
        torch.testing.assert_close(a, b)
    assert any(isinstance(act, Curve) for act in acts)
