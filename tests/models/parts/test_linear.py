"""Linear layers against formulas on single numbers, and the faults that earlier programs had."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.parts.linear import AdaptiveBits, Binary, BitNet, Dense, Linear, Quantised, UnitRows
from models.roles import initialise, role_of
from models.spec import ConfigError, build
from tests.models.parts.exact import agree, exact

N, M = 6, 4  # inputs, outputs


# What each kind makes of a matrix (rows of numbers) and of one token (numbers).


def same(values):
    return values


def ternary(W):
    flat = [abs(w) for row in W for w in row]
    s = max(sum(flat) / len(flat), 1e-5)
    return [[s * max(-1, min(1, round(w / s))) for w in row] for row in W]


def binary(W):
    flat = [w for row in W for w in row]
    mean = sum(flat) / len(flat)
    s = sum(abs(w - mean) for w in flat) / len(flat)
    return [[-s if w < mean else s for w in row] for row in W]


def absmax(bits):
    def f(values):
        step = max(abs(v) for v in values) / (2 ** (bits - 1) - 1)
        return [round(v / step) * step for v in values]

    return f


def least_to_greatest(bits):
    def f(values):
        low, high = min(*values, 0.0), max(*values, 0.0)
        step = (high - low) / (2**bits - 1)
        zero = round(low / step)  # so that 0 is one of the values
        return [(max(0, min(2**bits - 1, round(v / step) - zero)) + zero) * step for v in values]

    return f


def rowwise(f):
    return lambda W: [f(row) for row in W]


def whole(f):
    def g(W):
        flat = f([w for row in W for w in row])
        return [flat[i * N : (i + 1) * N] for i in range(M)]

    return g


def even_values(bits):
    def f(values):
        top = max(abs(v) for v in values)
        step = 2 * top / (2**bits - 1)
        return [round((v + top) / step) * step - top for v in values]

    return f


ROUNDED = [
    ({"kind": "dense"}, same, same),
    ({"kind": "bitnet"}, ternary, absmax(8)),
    ({"kind": "bitnet", "activation_bits": 4}, ternary, absmax(4)),
    ({"kind": "binary"}, binary, absmax(8)),
    ({"kind": "binary", "activation_bits": 6}, binary, absmax(6)),
    ({"kind": "quantised"}, rowwise(absmax(8)), absmax(8)),
    ({"kind": "quantised", "weight_bits": 3, "activation_bits": None}, rowwise(absmax(3)), same),
    ({"kind": "quantised", "weight_bits": 4, "per_channel": False}, whole(absmax(4)), absmax(8)),
    ({"kind": "quantised", "method": "affine", "weight_bits": 4}, rowwise(least_to_greatest(4)), least_to_greatest(8)),
    (
        {"kind": "quantised", "method": "affine", "per_channel": False, "activation_bits": 3},
        whole(least_to_greatest(8)),
        least_to_greatest(3),
    ),
    ({"kind": "adaptive_bits"}, whole(even_values(6)), absmax(8)),
    ({"kind": "adaptive_bits", "bits": 1.2, "activation_bits": 4}, whole(even_values(1)), absmax(4)),
    ({"kind": "adaptive_bits", "bits": 3.0, "low": 2, "high": 12}, whole(even_values(3)), absmax(8)),
]


def make(options, bias=True):
    layer = exact(build(Linear, options).build(N, M, bias, "matrix"))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(M, N) + 0.1)
        if bias:
            layer.bias.copy_(torch.randn(M))
    return layer


@pytest.mark.parametrize("options, weights, inputs", ROUNDED, ids=lambda v: str(v) if isinstance(v, dict) else "")
@pytest.mark.parametrize("bias", [False, True])
def test_rounding_layers_equal_their_formulas_and_pass_gradients_straight_through(options, weights, inputs, bias):
    """y = Q(x) Q(W)^T + b; as if Q were the identity, dx = dy Q(W) and dW = dy^T Q(x)."""
    layer = make(options, bias)
    x = torch.randn(2, 3, N, dtype=torch.float64, requires_grad=True)
    W = torch.tensor(weights(layer.weight.tolist()), dtype=torch.float64)
    rows = torch.tensor([inputs(row) for row in x.view(-1, N).tolist()], dtype=torch.float64)
    y = layer(x)
    want = torch.zeros(6, M, dtype=torch.float64)
    for i in range(6):
        for j in range(M):
            want[i, j] = sum(a * b for a, b in zip(rows[i].tolist(), W[j].tolist(), strict=True))
            want[i, j] += layer.bias[j].item() if bias else 0.0
    torch.testing.assert_close(y.detach().view(6, M), want, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    (y * dy).sum().backward()
    flat = dy.view(6, M)
    torch.testing.assert_close(x.grad.view(6, N), flat @ W, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, flat.T @ rows, rtol=1e-12, atol=1e-12)
    if bias:
        torch.testing.assert_close(layer.bias.grad, flat.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_unit_rows_equal_a_loop_in_value_and_gradient(eps):
    def loop(x, p):
        rows = []
        for row in x.reshape(-1, N):
            y = []
            for j in range(M):
                length = (sum(p["weight"][j, i] ** 2 for i in range(N)) + eps).sqrt()
                y.append(sum(p["weight"][j, i] * row[i] for i in range(N)) / length + p["bias"][j])
            rows.append(torch.stack(y))
        return torch.stack(rows).view(*x.shape[:-1], M)

    agree(make({"kind": "unit_rows", "eps": eps}), loop, torch.randn(2, 2, N))
    lengths = make({"kind": "unit_rows"})
    torch.testing.assert_close(
        lengths(torch.eye(N, dtype=torch.float64)) - lengths.bias,
        F.normalize(lengths.weight, dim=-1).T.detach(),
        rtol=1e-5,
        atol=1e-5,
    )


def test_every_kind_has_a_formula():
    assert {options["kind"] for options, *_ in ROUNDED} | {"unit_rows"} == Linear.kinds.keys()


KINDS = list(Linear.kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_or_row_has_a_say_in_another(kind):
    """The originals scaled inputs by the maximum of a whole batch, future tokens included."""
    layer = make({"kind": kind})
    x = torch.randn(2, 5, N, dtype=torch.float64)
    changed = x.clone()
    changed[0, 3:] *= 1000
    changed[1] = 1e6
    torch.testing.assert_close(layer(changed)[0, :3], layer(x)[0, :3], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_training_computes_what_evaluation_does(kind):
    layer = make({"kind": kind})
    x = torch.randn(3, N, dtype=torch.float64)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_follow_the_formula_and_have_roles(kind, bias):
    spec = Linear.kinds[kind]()
    layer = spec.build(N, M, bias, "residual")
    assert sum(p.numel() for p in layer.parameters()) == spec.n_parameters(N, M, bias)
    assert layer.weight.shape == (M, N) and isinstance(layer, nn.Linear)
    assert role_of(layer, "weight").init == "residual"
    fresh = {name: p.detach().clone() for name, p in layer.named_parameters() if name not in ("weight", "bias")}
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(float("nan"))
    initialise(layer, 0.02, 2)
    assert all(p.isfinite().all() for p in layer.parameters())
    for name, p in fresh.items():
        torch.testing.assert_close(getattr(layer, name).detach(), p, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_give_no_nan(kind):
    layer = make({"kind": kind})
    with torch.no_grad():
        layer.weight.zero_()
    x = torch.zeros(2, N, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains(kind):
    """An original held nothing but integer buffers, and learned nothing."""
    torch.manual_seed(1)
    layer = Linear.kinds[kind]().build(16, 4, True, "matrix")
    x = torch.randn(64, 16)
    target = x @ torch.randn(16, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(200):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Rows of length 1 cannot reach the target's size, and signs no matrix of real numbers.
    assert losses[-1] < (0.8 if kind in ("unit_rows", "binary") else 0.3) * losses[0], losses[-1] / losses[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_bfloat16_stays_near_float64(kind, how):
    """An original failed with an error of dtypes. Values that rounding moves to the next step may differ by it."""
    layer = Linear.kinds[kind]().build(64, 32, True, "matrix")
    initialise(layer, 0.1, 2)
    x = torch.randn(4, 64).to(torch.bfloat16)
    if how == "cast":
        layer = nn.Module.to(layer, torch.bfloat16)
        ours = layer(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            ours = layer(x)
    want = exact(layer)(x.double())
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("options, values", [({"kind": "bitnet"}, 3), ({"kind": "binary"}, 2)], ids=str)
def test_matrices_have_as_many_values_as_they_say(options, values):
    """The original binary layer had no scale, and its outputs were rescaled by the largest of the batch."""
    layer = make(options, bias=False)
    W = layer.weights(layer.weight)
    assert len(W.unique()) == values
    assert W.abs().max() < layer.weight.abs().max()


def test_ternary_weights_stay_ternary_in_bfloat16():
    layer = nn.Module.to(BitNet().build(64, 32, False, "matrix"), torch.bfloat16)
    assert len(layer.weights(layer.weight.float()).to(torch.bfloat16).unique()) == 3


def test_the_learned_bits_have_a_gradient_from_the_task():
    """In the original they had one from a penalty only. Against the chain rule: step on bits, matrix on step."""
    layer = make({"kind": "adaptive_bits", "bits": 4.3, "activation_bits": 16}, bias=False)
    x, dy = torch.randn(5, N, dtype=torch.float64), torch.randn(5, M, dtype=torch.float64)
    (layer(x) * dy).sum().backward()
    dW = dy.T @ layer.inputs(x)
    top, b = layer.weight.abs().max().item(), 4
    step = 2 * top / (2**b - 1)
    dstep = 0.0
    for j in range(M):
        for i in range(N):
            place = (layer.weight[j, i].item() + top) / step
            dstep += dW[j, i].item() * (round(place) - place)
    share = (4.3 - 1) / 7
    want = dstep * (-2 * top * math.log(2) * 2**b / (2**b - 1) ** 2) * 7 * share * (1 - share)
    assert layer.width.grad.item() == pytest.approx(want, rel=1e-6) and want != 0


def test_the_learned_bits_stay_within_their_range_and_are_whole():
    layer = make({"kind": "adaptive_bits", "low": 2, "high": 5, "bits": 3.0})
    for width, bits in ((-100.0, 2), (0.0, 4), (100.0, 5)):  # 3.5 rounds to the even 4
        layer.width.data.fill_(width)
        assert layer.bits().item() == bits
    assert len(layer.weights(layer.weight).unique()) > 4


def test_more_bits_err_less():
    x = torch.randn(50, 64, dtype=torch.float64)
    dense = exact(Dense().build(64, 32, False, "matrix"))
    errors = []
    for bits in (2, 4, 8, 16):
        layer = exact(Quantised(weight_bits=bits, activation_bits=bits).build(64, 32, False, "matrix"))
        layer.load_state_dict(dense.state_dict())
        errors.append(((layer(x) - dense(x)).norm() / dense(x).norm()).item())
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.3 and errors[2] < 0.01 and errors[3] < 1e-4


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kind": "bitnet", "activation_bits": 1}, "activation_bits=1 must lie in [2, 16]"),
        ({"kind": "binary", "activation_bits": 32}, "activation_bits=32 must lie in [2, 16]"),
        ({"kind": "quantised", "weight_bits": 1}, "weight_bits=1 must lie in [2, 16]"),
        ({"kind": "quantised", "activation_bits": 0}, "activation_bits=0 must lie in [2, 16]"),
        ({"kind": "adaptive_bits", "bits": 8.0}, "low=1 < bits=8.0 < high=8"),
        ({"kind": "adaptive_bits", "low": 0}, "low=0 < bits=6.0"),
        ({"kind": "adaptive_bits", "activation_bits": 1}, "activation_bits=1"),
        ({"kind": "unit_rows", "eps": 0.0}, "eps=0.0 must be above 0"),
        ({"kind": "quantised", "method": "afine"}, "did you mean 'affine'?"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_in_one_line(options, words):
    with pytest.raises(ConfigError) as error:
        build(Linear, options, "linear")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_layer_states_its_operations():
    dense, ternary, eight = (spec.ops(64, 32, True) for spec in (Dense(), BitNet(), Quantised()))
    assert dense.multiplies == 64 * 32 and dense.bit_operations == 64 * 32 * 16 * 16
    assert ternary.multiplies == 64 + 32 and ternary.additions >= 64 * 32  # scales only
    assert ternary.bit_operations == pytest.approx(64 * 32 * math.log2(3) * 8)
    assert eight.bit_operations == 64 * 32 * 8 * 8 and eight.weight_bits < 0.6 * dense.weight_bits
    assert Binary().ops(64, 32, False).weight_bits == 64 * 32 + 16
    assert AdaptiveBits().ops(64, 32, False).bit_operations == 64 * 32 * 6 * 8
    assert UnitRows().ops(64, 32, False) == Dense().ops(64, 32, False)


def test_all_layers_compile_into_one_graph():
    layers = [cls().build(N, M, True, "matrix") for cls in Linear.kinds.values()]
    layers.append(Quantised(method="affine", per_channel=False).build(N, M, True, "matrix"))
    x = torch.randn(2, 3, N)
    f = lambda x: [layer(x) for layer in layers]
    for a, b in zip(torch.compile(f, fullgraph=True, backend="eager")(x), f(x), strict=True):
        torch.testing.assert_close(a, b)
