"""Norms against loops in float64, other implementations, and the faults that earlier programs had."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from models.gpt.config import GPT
from models.parts.attention import Causal
from models.parts.norm import (
    Capped,
    DynamicTanh,
    Hypersphere,
    LayerNorm,
    NoNorm,
    Norm,
    PartialRMSNorm,
    RMSNorm,
    SliceRMSNorm,
)
from models.parts.placement import Post
from models.spec import ConfigError, build
from tests.models.parts.exact import agree, by_rows, exact

D = 12


def gained(values, p, name="weight"):
    return [v * p[name][i] for i, v in enumerate(values)] if name in p else values


def layer_loop(eps):
    def row(values, p):
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        y = gained([(v - mean) / (variance + eps).sqrt() for v in values], p)
        return [v + p["bias"][i] for i, v in enumerate(y)] if "bias" in p else y

    return row


def slice_loop(channels, eps):
    def row(values, p):
        square = sum(values[i] ** 2 for i in channels) / len(channels)
        return gained([v / (square + eps).sqrt() for v in values], p)

    return row


def sphere_loop(radius, eps, scale=1.0):
    def row(values, p):
        length = (sum(v**2 for v in values) + eps * len(values)).sqrt()
        R = scale * p["radius"] if "radius" in p else radius
        return gained([R * v / length for v in values], p)

    return row


def capped_loop(radius):
    def row(values, p):
        R = p["radius"] if radius is None else torch.tensor(radius, dtype=torch.float64)
        length = sum(v**2 for v in values).sqrt()
        return values if length <= R else [v * R / length for v in values]

    return row


def tanh_loop(alpha):
    def row(values, p):
        y = gained([(p.get("alpha", alpha) * v).tanh() for v in values], p)
        return [v + p["bias"][i] for i, v in enumerate(y)] if "bias" in p else y

    return row


KRMS = SliceRMSNorm(k=4, which="random", seed=3, eps=0.1)
LOOPS = [
    (LayerNorm(eps=0.1, bias=True), layer_loop(0.1)),
    (LayerNorm(), layer_loop(1e-5)),
    (RMSNorm(eps=0.1), slice_loop(range(D), 0.1)),
    (RMSNorm(gain=False), slice_loop(range(D), 1e-5)),
    (PartialRMSNorm(fraction=0.2, eps=0.1), slice_loop(range(3), 0.1)),
    (PartialRMSNorm(fraction=1.0), slice_loop(range(D), 1e-6)),
    (SliceRMSNorm(), slice_loop(range(10), 1e-6)),
    (SliceRMSNorm(k=20), slice_loop(range(D), 1e-6)),
    (SliceRMSNorm(k=3, which="last"), slice_loop(range(D - 3, D), 1e-6)),
    (KRMS, slice_loop(KRMS.channels(D), 0.1)),
    (Hypersphere(eps=0.1), sphere_loop(math.sqrt(D), 0.1)),
    (Hypersphere(radius=2.0, gain=False, scale=3.0), sphere_loop(6.0, 1e-6)),
    (Hypersphere(learned_radius=True, scale=2.0), sphere_loop(None, 1e-6, 2.0)),
    (Capped(), capped_loop(math.sqrt(D))),
    (Capped(radius=5.0), capped_loop(5.0)),
    (Capped(radius=5.0, learned_radius=True), capped_loop(None)),
    (DynamicTanh(alpha=0.7), tanh_loop(None)),
    (DynamicTanh(alpha=0.7, learned_alpha=False, gain=False, bias=False), tanh_loop(0.7)),
    (NoNorm(), lambda values, p: values),
]


@pytest.mark.parametrize("spec, row", LOOPS, ids=lambda v: str(v) if isinstance(v, Norm) else "")
def test_norms_equal_loops_in_value_and_gradient(spec, row):
    x = torch.randn(2, 3, D, dtype=torch.float64) * torch.tensor([0.1, 1.0, 4.0])[:, None]
    module = exact(spec.build(D, False), stir=0.3)
    buffers = dict(module.named_buffers())
    if "radius" in buffers:  # a float32 number in a model made of them
        buffers["radius"].fill_(math.sqrt(D) if spec.radius is None else spec.radius)
    agree(module, lambda x, p: by_rows(x, lambda values: row(values, p)), x)


def test_every_kind_has_a_loop():
    assert {type(spec) for spec, _ in LOOPS} == set(Norm.kinds.values())


@pytest.mark.parametrize("kind", Norm.kinds)
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_follow_the_formula(kind, bias):
    spec = Norm.kinds[kind]()
    assert sum(p.numel() for p in spec.build(D, bias).parameters()) == spec.n_parameters(D, bias)


def test_parameter_counts_of_the_five_hypersphere_gpt_norms():
    """Gain d each, one more for a learned radius."""
    counts = [
        spec.n_parameters(768, False)
        for spec in (LayerNorm(), RMSNorm(), PartialRMSNorm(), Hypersphere(), Hypersphere(learned_radius=True))
    ]
    assert counts == [768, 768, 768, 768, 769]


@pytest.mark.parametrize("kind", Norm.kinds)
def test_a_zero_vector_gives_no_nan_in_value_or_gradient(kind):
    """The originals had no eps in rmsnorm, prmsnorm, krmsnorm and hyperspherenorm."""
    norm = Norm.kinds[kind]().build(D, True)
    x = torch.zeros(2, D, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in norm.parameters())


@pytest.mark.parametrize("kind", Norm.kinds)
def test_bfloat16_input_has_float32_statistics(kind):
    """No farther from float64 than twice what the rounding of input's and output's format costs."""
    x = (torch.randn(16, 64) * 100).to(torch.bfloat16)
    norm = Norm.kinds[kind]().build(64, False)
    ours = norm(x)
    want = nn_double(norm)(x.double())
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - want).abs() <= 2 * 2**-8 * want.abs() + 1e-6).all()


def nn_double(module):
    return torch.nn.Module.to(module, torch.float64)


def test_rmsnorm_in_bfloat16_errs_no_more_than_twice_llamas():
    x = torch.randn(4, 64).to(torch.bfloat16) * 100
    ours, theirs = RMSNorm(eps=1e-5).build(64, False), LlamaRMSNorm(64, 1e-5)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    budget = 2 * (theirs(x).double() - want).abs().max() + 1e-5
    assert (ours(x).double() - want).abs().max() <= budget


def test_hypersphere_of_radius_sqrt_d_is_rmsnorm():
    x = torch.randn(5, D, dtype=torch.float64)
    sphere, rms = exact(Hypersphere(eps=1e-5).build(D, False)), exact(RMSNorm().build(D, False))
    torch.testing.assert_close(sphere(x), rms(x), rtol=1e-7, atol=1e-7)  # its radius is a float32 number
    torch.testing.assert_close(sphere(x), math.sqrt(D) * F.normalize(x), rtol=1e-4, atol=1e-4)


def test_hypersphere_gain_is_applied():
    """It was created and never used."""
    norm = Hypersphere().build(D, False)
    x = torch.randn(3, D)
    before = norm(x)
    norm.weight.data[0] = 7.0
    torch.testing.assert_close(norm(x)[:, 0], 7 * before[:, 0])


@pytest.mark.parametrize("spec", [Hypersphere(radius=3.0), Hypersphere(radius=3.0, learned_radius=True), Capped(3.0)])
def test_the_radius_is_in_checkpoints(spec):
    """A fixed one was a number in the program, so that weights loaded elsewhere got another."""
    norm, other = spec.build(D, False), type(spec)(radius=5.0, learned_radius=spec.learned_radius).build(D, False)
    assert norm.state_dict()["radius"].item() == 3.0
    other.load_state_dict(norm.state_dict())
    x = torch.randn(3, D) * 9
    torch.testing.assert_close(other(x), norm(x), rtol=0, atol=0)


def test_the_scale_multiplies_a_fixed_radius_and_a_learned_ones_gradient():
    x = torch.randn(3, D)
    one, two = (Hypersphere(learned_radius=True, scale=c).build(D, False) for c in (1.0, 2.0))
    torch.testing.assert_close(one(x), two(x))
    for norm in (one, two):
        norm(x).square().sum().backward()
    torch.testing.assert_close(two.radius.grad, 2 * one.radius.grad)
    fixed = Hypersphere(radius=3.0, scale=2.0, gain=False).build(D, False)
    torch.testing.assert_close(fixed(x).norm(dim=-1), torch.full((3,), 6.0))


def test_capped_obeys_its_radius_and_leaves_short_vectors_alone():
    """It was sqrt(d) whatever was asked for."""
    norm = Capped(radius=2.0).build(D, False)
    short, long = torch.full((1, D), 0.1), torch.full((1, D), 10.0)
    torch.testing.assert_close(norm(short), short, rtol=0, atol=0)
    torch.testing.assert_close(norm(long).norm(dim=-1), torch.tensor([2.0]))


def test_the_slice_of_prmsnorm_is_not_widened_by_rounding():
    """0.07 * 100 is 7.000000000000001."""
    assert PartialRMSNorm(fraction=0.07).channels(100) == 7
    assert PartialRMSNorm().channels(768) == 48 and PartialRMSNorm(fraction=0.01).channels(16) == 1


def test_random_channels_are_drawn_once_and_do_not_touch_other_draws():
    torch.manual_seed(0)
    norm = SliceRMSNorm(k=5, which="random").build(D, False)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))
    x = torch.randn(4, D)
    assert torch.equal(norm(x), norm(x))
    assert SliceRMSNorm(k=5, which="random").channels(D) == SliceRMSNorm(k=5, which="random", seed=0).channels(D)
    assert SliceRMSNorm(k=5, which="random", seed=1).channels(D) != SliceRMSNorm(k=5, which="random").channels(D)
    norm.index.fill_(0)  # as loading through the meta device leaves it
    norm.rebuild_buffers()
    assert norm.index.tolist() == SliceRMSNorm(k=5, which="random").channels(D)


@pytest.mark.parametrize("bits", [8, 16])
def test_krmsnorm_rounds_the_slice_before_the_statistic(bits):
    """Against a loop; the original scaled the norm itself by the slice's zero-point."""
    k, eps = 4, 1e-6
    norm = exact(SliceRMSNorm(k=k, bits=bits).build(D, False))
    x = torch.randn(3, D, dtype=torch.float64) + 5  # far from 0, where a zero-point matters
    want = []
    for row in x:
        low, high = min(row[:k].tolist()), max(row[:k].tolist())
        step = (high - low) / (2**bits - 1)
        rounded = [low + step * round((v - low) / step) for v in row[:k].tolist()]
        want.append(row / math.sqrt(sum(v * v for v in rounded) / k + eps))
    torch.testing.assert_close(norm(x), torch.stack(want), rtol=1e-12, atol=1e-12)
    plain = exact(SliceRMSNorm(k=k).build(D, False))(x)
    assert 0 < (norm(x) / plain - 1).abs().max() < 2.0 ** -(bits - 1)


def test_krmsnorm_passes_gradients_through_the_rounding():
    norms = [exact(SliceRMSNorm(k=4, bits=bits).build(D, False)) for bits in (16, None)]
    x = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
    rounded, plain = (torch.autograd.grad(norm(x).square().sum(), x)[0] for norm in norms)
    torch.testing.assert_close(rounded, plain, rtol=1e-2, atol=1e-3)
    assert norms[0](torch.ones(1, D, dtype=torch.float64)).isfinite().all()  # equal channels: a step of 0


def test_krmsnorm_falls_back_token_by_token():
    """The original tested a whole tensor as if it were one number, and crashed."""
    norm = exact(SliceRMSNorm(k=2, fallback=0.5).build(4, False))
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.01, 0.01, 3.0, 3.0]], dtype=torch.float64)
    partly, truly = exact(SliceRMSNorm(k=2).build(4, False)), exact(RMSNorm(eps=1e-6).build(4, False))
    torch.testing.assert_close(norm(x), torch.stack([partly(x)[0], truly(x)[1]]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm(x[1:]), norm(x)[1:], rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("layernorm", {"eps": 0.0}, "eps=0.0 must be above 0"),
        ("prmsnorm", {"fraction": 1.5}, "fraction=1.5 must lie in (0, 1]"),
        ("krmsnorm", {"k": 0}, "k=0 must be at least 1"),
        ("krmsnorm", {"bits": 4}, "bits=4"),
        ("krmsnorm", {"seed": 1}, "seed=1 has no effect with which=first"),
        ("krmsnorm", {"fallback": 0.0}, "fallback=0.0 must be above 0"),
        ("hypersphere", {"radius": -1.0}, "radius=-1.0 must be above 0"),
        ("hypersphere", {"scale": 0.0}, "scale=0.0 must be above 0"),
        ("capped", {"radius": 0.0}, "radius=0.0 must be above 0"),
        ("dyt", {"alpha": 0.0}, "alpha=0 makes every token alike"),
    ],
)
def test_impossible_options_are_refused_in_one_line(kind, options, words):
    with pytest.raises(ConfigError) as error:
        build(Norm, {"kind": kind, **options}, "norm")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_identity_refuses_placements_that_it_makes_ineffective():
    with pytest.raises(ConfigError, match="same wherever it stands, so a placement has no effect"):
        GPT(d_model=16, n_layers=1, attention=Causal.small(), norm=NoNorm(), placement=Post())
    assert GPT(d_model=16, n_layers=1, attention=Causal.small(), norm=NoNorm()).blocks()


@pytest.mark.parametrize("kind", Norm.kinds)
def test_a_norm_states_its_operations(kind):
    """Twice the width costs about twice as much; only the identity is free."""
    small, large = (sum(Norm.kinds[kind]().ops(d, False).counts().values()) for d in (512, 1024))
    assert (small == large == 0) if kind == "identity" else 1.4 * small < large <= 2 * small


def test_all_norms_compile_into_one_graph():
    norms = [cls().build(D, True) for cls in Norm.kinds.values()]
    norms.append(SliceRMSNorm(k=3, which="random", bits=8, fallback=0.1).build(D, False))
    x = torch.randn(2, 3, D)
    f = lambda x: [norm(x) for norm in norms]
    for a, b in zip(torch.compile(f, fullgraph=True, backend="eager")(x), f(x), strict=True):
        torch.testing.assert_close(a, b)
