"""kernels/normuon against torch.optim.Muon, the formulas in float64, and what the update promises of every shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.newton_schulz import METHODS, orthogonalise_reference
from kernels.normuon import new_statistic, normuon_update
from kernels.op import INTERPRETED, record

needs_triton = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="TRITON_INTERPRET=1 or a GPU")
IMPLS = [pytest.param("triton", marks=needs_triton), "cpu", "reference"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Tall, wide, square, one row, and experts: matrices of a leading axis, whose statistics are no multiple of 16 bytes.
SHAPES = [(20, 9), (9, 20), (12, 12), (1, 7), (3, 5, 11)]


def group(shapes=SHAPES, dtype=torch.float64, neuron_norm="auto", seed=0):
    """Parameters, gradients, momenta and statistics some steps after the start."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape, scale):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)

    params = [draw(shape, shape[-1] ** -0.5) for shape in shapes]
    grads, momenta = ([draw(shape, 0.01) for shape in shapes] for _ in range(2))
    statistics = [new_statistic(p, neuron_norm) for p in params] if neuron_norm else []
    for s in statistics:
        s += torch.rand(s.shape, generator=generator, dtype=torch.float64).to(DEVICE) / 10 + 0.02
    return params, grads, momenta, statistics


def copies(tensors, dtype=None):
    return [[t.to(dtype or t.dtype, copy=True) for t in one] for one in tensors]


def update(tensors, **settings):
    """The update of copies, in the products' dtype of the parameters: new parameters, momenta and statistics."""
    params, grads, momenta, statistics = copies(tensors)
    normuon_update(params, grads, momenta, statistics, **{"dtype": params[0].dtype, "lr": 0.1, **settings})
    return params + momenta + statistics


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_without_statistic_and_caution_it_is_torch_optim_muon_step_by_step(monkeypatch, impl, nesterov, adjust):
    """Five steps in float32: Muon's cast to bfloat16 is taken out for this."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    ours, _, momenta, _ = group(SHAPES[:3], torch.float32)
    momenta = [torch.zeros_like(m) for m in momenta]
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    muon = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.2, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust)
    for step in range(5):
        _, grads, _, _ = group(SHAPES[:3], torch.float32, seed=10 + step)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        muon.step()
        normuon_update(
            ours, grads, momenta, lr=0.05, momentum=0.9, weight_decay=0.2, cautious=False, neuron_norm=None,
            nesterov=nesterov, scale=adjust, method="classic", dtype=torch.float32, impl=impl,
        )  # fmt: skip
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q.data, rtol=2e-4, atol=2e-5)


def test_in_bfloat16_it_differs_from_torch_optim_muon_by_bfloat16s_rounding():
    (p,), (g,), (m,), _ = group([(40, 90)], torch.float32)
    theirs = torch.nn.Parameter(p.clone())
    theirs.grad = g
    torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0, momentum=0.9).step()
    ours, m = p.clone(), torch.zeros_like(m)
    normuon_update(
        [ours], [g], [m], lr=1.0, momentum=0.9, cautious=False, neuron_norm=None, method="classic", dtype=torch.bfloat16
    )
    difference = (ours - theirs.data).norm() / (theirs.data - p).norm()
    assert 0 < difference < 0.03


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("neuron_norm", ["auto", "row", "column"])
def test_the_statistic_follows_the_formula_number_by_number(impl, neuron_norm):
    """The definition once more, written for one neuron at a time in float64."""
    tensors = group(SHAPES[:4], torch.float32, neuron_norm)
    found = update(tensors, neuron_norm=neuron_norm, beta2=0.7, momentum=0.8, weight_decay=0.3, impl=impl)
    for i, (w, g, mean, s) in enumerate(zip(*copies(tensors, torch.float64), strict=True)):
        m, n = w.shape
        mean = 0.8 * mean + 0.2 * g
        o = orthogonalise_reference(0.2 * g + 0.8 * mean)
        by_row = neuron_norm == "row" or (neuron_norm == "auto" and m >= n)
        assert s.shape == ((m, 1) if by_row else (1, n))
        new = o.clone()
        for j in range(m if by_row else n):
            at = (j, slice(None)) if by_row else (slice(None), j)
            s.view(-1)[j] = 0.7 * s.view(-1)[j] + 0.3 * (o[at] ** 2).mean()
            new[at] = o[at] / math.sqrt(s.view(-1)[j])
        new *= o.norm() / new.norm()
        for r in range(m):
            for c in range(n):
                if (new[r, c] < 0) == (w[r, c] < 0):
                    w[r, c] -= 0.1 * 0.3 * w[r, c]
        w -= 0.1 * math.sqrt(max(1, m / n)) * new
        for ours, want in zip(found[i :: len(tensors[0])], (w, mean, s), strict=True):
            torch.testing.assert_close(ours.double(), want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(96, 32), (64, 64), (32, 96)])
@pytest.mark.parametrize("neuron_norm", ["auto", None])
def test_a_step_moves_weights_by_lr_over_the_root_of_fan_in_for_every_shape(impl, shape, neuron_norm):
    params, grads, momenta, statistics = group([shape], torch.float32, neuron_norm)
    new = update((params, grads, momenta, statistics), lr=0.02, neuron_norm=neuron_norm, impl=impl)[0]
    moved = (new - params[0]).square().mean().sqrt().item()
    assert moved == pytest.approx(0.02 / math.sqrt(shape[1]), rel=0.05)
    adam = update(
        (params, grads, momenta, statistics), lr=0.02, neuron_norm=neuron_norm, scale="match_rms_adamw", impl=impl
    )[0]
    assert (adam - params[0]).square().mean().sqrt().item() == pytest.approx(0.2 * 0.02, rel=0.05)


@pytest.mark.parametrize("impl", IMPLS)
def test_caution_decays_exactly_the_weights_whose_sign_is_the_steps(impl):
    tensors = group(SHAPES, torch.float32)
    plain = update(tensors, impl=impl)[: len(SHAPES)]
    decayed = update(tensors, weight_decay=0.5, impl=impl)[: len(SHAPES)]
    everywhere = update(tensors, weight_decay=0.5, cautious=False, impl=impl)[: len(SHAPES)]
    for w, p, d, e in zip(tensors[0], plain, decayed, everywhere, strict=True):
        same = ((w - p) < 0) == (w < 0)  # w - p is the step
        assert same.any() and (not same.all() or w.numel() < 12)
        assert torch.equal(d[~same], p[~same])
        torch.testing.assert_close(d[same], (p - 0.1 * 0.5 * w)[same], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(e, p - 0.1 * 0.5 * w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_counts_as_positive(impl):
    """Without gradient the step is zero: positive weights decay, negative ones stay, and nothing becomes NaN."""
    w = torch.tensor([[1.0, -1.0, 0.0], [2.0, -2.0, 3.0]], device=DEVICE)
    zeros = torch.zeros_like(w)
    found, momentum, statistic = update(([w], [zeros], [zeros], [new_statistic(w)]), weight_decay=1.0, impl=impl)
    torch.testing.assert_close(found, torch.where(w > 0, 0.9 * w, w))
    assert not momentum.any() and not statistic.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_every_setting_changes_the_result(impl):
    tensors = group(SHAPES[:3], torch.float32)
    usual = update(tensors, impl=impl, weight_decay=0.1)
    for change in (
        {"lr": 0.2}, {"momentum": 0.5}, {"beta2": 0.5}, {"weight_decay": 0.3}, {"cautious": False}, {"nesterov": False},
        {"scale": "match_rms_adamw"}, {"method": "classic"}, {"method": METHODS["classic"][:1]}, {"steps": 3},
        {"eps": 1e-2},
    ):  # fmt: skip
        changed = update(tensors, impl=impl, **{"weight_decay": 0.1, **change})
        assert not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(usual, changed, strict=True)), change


@pytest.mark.parametrize("impl", IMPLS)
def test_a_group_is_its_matrices_one_by_one(impl):
    """Experts too: a leading axis is more matrices. To rounding, since products of a batch may sum in another order."""
    tensors = group(SHAPES, torch.float32)
    together = update(tensors, weight_decay=0.1, impl=impl)
    for i, shape in enumerate(SHAPES):
        for e in range(shape[0] if len(shape) == 3 else 1):
            alone = update([[t[i][e] if len(shape) == 3 else t[i]] for t in tensors], weight_decay=0.1, impl=impl)
            for ours, kind in zip(alone, range(3), strict=True):
                whole = together[kind * len(SHAPES) + i]
                torch.testing.assert_close(ours, whole[e] if len(shape) == 3 else whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_updates_from_one_state_are_equal_to_the_bit_and_gradients_stay(impl):
    tensors = group(SHAPES, torch.float32)
    before = [g.clone() for g in tensors[1]]
    runs = []
    for _ in range(2):
        params, _, momenta, statistics = copies(tensors)
        for _ in range(2):
            normuon_update(
                params, tensors[1], momenta, statistics, lr=0.1, weight_decay=0.1, impl=impl, dtype=torch.float32
            )
        runs.append(params + momenta + statistics)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors[1], strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=8, deadline=None)
@given(m=st.integers(1, 24), n=st.integers(1, 24), power=st.integers(-8, 8), seed=st.integers(0, 99))
def test_the_scale_of_the_gradient_does_not_matter(impl, m, n, power, seed):
    """A power of two, so that rounding is the same: equal to the bit."""
    params, grads, momenta, statistics = group([(m, n)], torch.float32, seed=seed)
    scaled = [g * 2.0**power for g in grads], [t * 2.0**power for t in momenta]
    ours = update((params, grads, momenta, statistics), eps=0.0, method="classic", steps=2, impl=impl)
    same = update((params, *scaled, statistics), eps=0.0, method="classic", steps=2, impl=impl)
    assert torch.equal(ours[0], same[0]) and torch.equal(ours[2], same[2])


@pytest.mark.parametrize("impl", IMPLS)
def test_views_that_begin_anywhere_are_updated_in_place(impl):
    """Query, key and value of a packed matrix, and a matrix whose rows lie apart."""
    packed = group([(15, 5), (7, 4)], torch.float32)
    wide = [torch.full((7, 9), 7.0, device=DEVICE) for _ in range(3)]
    for whole, one in zip(wide, packed[:3], strict=True):
        whole[:, 2:6] = one[1]
    params, grads, momenta = (
        [*t[0].clone().split(5), whole[:, 2:6]] for t, whole in zip(packed[:3], wide, strict=True)
    )
    statistics = [new_statistic(p) for p in params]
    want = update((params, grads, momenta, statistics), impl="reference", weight_decay=0.1)
    normuon_update(params, grads, momenta, statistics, lr=0.1, weight_decay=0.1, dtype=torch.float32, impl=impl)
    for a, b in zip(params + momenta + statistics, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (wide[0][:, :2] == 7).all() and (wide[0][:, 6:] == 7).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_parameters_that_require_gradients_are_updated_and_kept_leaves(impl):
    tensors = group(SHAPES[:2], torch.float32)
    want = update(tensors, impl=impl)
    params = [torch.nn.Parameter(p.clone()) for p in tensors[0]]
    _, grads, momenta, statistics = copies(tensors)
    normuon_update(params, grads, momenta, statistics, lr=0.1, dtype=torch.float32, impl=impl)
    for p, w in zip(params, want, strict=False):
        assert p.is_leaf and p.requires_grad and torch.equal(p.data, w)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    tensors = group(SHAPES[:2], torch.float32)
    want = update(tensors, impl=impl)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(update(tensors, impl=impl), want, strict=True))


def test_the_path_is_chosen_by_device_and_recorded():
    tensors = group(SHAPES[:2], torch.float32)
    with record() as ran:
        normuon_update(*copies(tensors), lr=0.1)
    assert ran[0] == ("normuon", "triton" if DEVICE == "cuda" else "cpu")
    if DEVICE == "cpu":
        assert ran[1:] == [("newton_schulz", "cpu")] * 2


def test_what_does_not_belong_together_is_refused():
    params, grads, momenta, statistics = group(SHAPES[:2])
    with pytest.raises(ValueError, match="scale='muon' does not exist; spectral, original, match_rms_adamw do"):
        normuon_update(params, grads, momenta, statistics, lr=0.1, scale="muon")
    with pytest.raises(ValueError, match="neuron_norm='cell' does not exist; auto, row, column, None do"):
        normuon_update(params, grads, momenta, statistics, lr=0.1, neuron_norm="cell")
    with pytest.raises(ValueError, match="method='newton' does not exist"):
        normuon_update(params, grads, momenta, statistics, lr=0.1, method="newton")
    with pytest.raises(ValueError, match=r"2 params, but \[1, 2, 2\] gradients, momenta and statistics"):
        normuon_update(params, grads[:1], momenta, statistics, lr=0.1)
    with pytest.raises(ValueError, match=r"params\[0\] has shape \(3,\); a matrix is needed"):
        normuon_update([torch.zeros(3)], [torch.zeros(3)], [torch.zeros(3)], lr=0.1, neuron_norm=None)
    with pytest.raises(ValueError, match=r"statistics\[0\] has shape \(20, 1\); neuron_norm='column' keeps \(1, 9\)"):
        normuon_update(params, grads, momenta, statistics, lr=0.1, neuron_norm="column")
    with pytest.raises(ValueError, match=r"params\[0\] has shape \(20, 9\), its gradient \(9, 20\)"):
        normuon_update(params, grads[::-1], momenta, statistics, lr=0.1)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_group_is_no_step(impl):
    normuon_update([], [], [], [], lr=0.1, impl=impl)
