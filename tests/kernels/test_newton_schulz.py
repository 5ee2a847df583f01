"""kernels/newton_schulz.py: singular values in float64, torch.optim.Muon's iteration, tiles and strips, gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim._muon import _zeropower_via_newtonschulz

from kernels import newton_schulz as kernel
from kernels.newton_schulz import (
    HALF,
    METHODS,
    config,
    orthogonalise,
    orthogonalise_reference,
    schedule,
    symmetric_polynomial,
    symmetric_product,
)
from kernels.op import INTERPRETED, record
from tests.kernels.judge import check

needs_triton = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="TRITON_INTERPRET=1 or a GPU")
IMPLS = [pytest.param("triton", marks=needs_triton), "cpu", "reference"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
few = settings(max_examples=15, deadline=None)


def with_singular_values(m, n, values, seed=0):
    """[m, n] in float64 with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(k, len(values), generator=generator, dtype=torch.float64))[0] for k in (m, n)
    )
    return left * torch.as_tensor(values, dtype=torch.float64) @ right.T


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48), (1, 40), (40, 1)])
def test_polar_express_moves_what_is_above_a_ten_thousandth_of_the_norm_to_one(shape):
    rank = min(shape)
    values = torch.logspace(0, -4, rank, dtype=torch.float64) if rank > 1 else torch.ones(1, dtype=torch.float64)
    values[1:] *= 0.1  # one large value, so that the norm is little more than it
    values = values.clamp(min=1.01e-4 * values.norm())
    found = torch.linalg.svdvals(orthogonalise(with_singular_values(*shape, values), dtype=torch.float32).double())
    assert found.min() >= 0.91 and found.max() <= 1.09


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48), (256, 300)])
@pytest.mark.parametrize("condition", [10.0, 1e3])
def test_polar_express_in_bfloat16_errs_by_half_a_percent_up_to_a_condition_number_of_1000(shape, condition):
    """Beyond, rounding the input to 8 bits is what bounds it: at 10,000 values of 0.01 to 0.03 are left."""
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), min(shape), dtype=torch.float64)
    found = torch.linalg.svdvals(orthogonalise(with_singular_values(*shape, values), dtype=torch.bfloat16).double())
    assert found.min() >= 0.905 and found.max() <= 1.09


def test_the_classic_polynomial_leaves_singular_values_between_a_half_and_1_2():
    values = torch.logspace(0, -2, 40, dtype=torch.float64)
    found = torch.linalg.svdvals(orthogonalise(with_singular_values(40, 70, values), method="classic"))
    assert 0.47 <= found.min() <= 0.8 and 1.1 <= found.max() <= 1.21  # and it is not Polar Express


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)])
@pytest.mark.parametrize("method", METHODS)
def test_singular_vectors_stay_and_values_follow_the_scalar_polynomial(shape, method):
    u = draw(*shape)
    left, values, right = torch.linalg.svd(u / (u.norm() + 1e-7), full_matrices=False)
    for a, b, c in METHODS[method]:
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(orthogonalise(u, method), left * values @ right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(33, 70), (70, 33), (40, 40)])
def test_equals_the_iteration_of_torch_optim_muon(monkeypatch, impl, shape):
    """In float32 to rounding, with the same coefficients; Muon's cast to bfloat16 is taken out for this."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    u = draw(*shape, dtype=torch.float32).to(DEVICE)
    triple = METHODS["classic"][0]
    theirs = _zeropower_via_newtonschulz(u, triple, 4, 1e-7)
    torch.testing.assert_close(orthogonalise(u, (triple,), steps=4, impl=impl), theirs, rtol=1e-5, atol=2e-5)


def test_bfloat16_errs_no_more_than_torch_optim_muon_does():
    u = draw(128, 300)
    exact = orthogonalise_reference(u, "classic")
    theirs = _zeropower_via_newtonschulz(u.float(), METHODS["classic"][0], 5, 1e-7).double()
    ours = orthogonalise(u.float(), "classic", dtype=torch.bfloat16).double()
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()
    assert (ours - exact).norm() > 1e-4 * exact.norm()  # it did run in bfloat16


@pytest.mark.parametrize("impl", IMPLS)
@few
@given(m=st.integers(1, 20), n=st.integers(1, 40), power=st.integers(-12, 12), seed=st.integers(0, 99))
def test_scaling_the_input_changes_nothing(impl, m, n, power, seed):
    u = draw(m, n, seed=seed, dtype=torch.float32).to(DEVICE)
    orthogonal = partial(orthogonalise, steps=2, eps=0.0, impl=impl)
    o = orthogonal(u)
    assert torch.equal(orthogonal(u * 2.0**power), o)
    torch.testing.assert_close(orthogonal(u * 3.0**power), o, rtol=1e-4, atol=1e-4)


@few
@given(m=st.integers(1, 24), n=st.integers(1, 48), seed=st.integers(0, 99))
def test_the_result_is_orthogonal_and_turns_with_its_input(m, n, seed):
    """O(QU) = Q O(U) for an orthogonal Q, and the shorter side's vectors are orthonormal as far as the method goes."""
    u = with_singular_values(m, n, torch.linspace(1.0, 0.05, min(m, n)), seed)
    o = orthogonalise(u)
    short = o if m <= n else o.mT
    assert torch.linalg.matrix_norm(short @ short.mT - torch.eye(min(m, n), dtype=torch.float64), 2) <= 0.19
    q = torch.linalg.qr(draw(m, m, seed=seed + 1))[0]
    torch.testing.assert_close(orthogonalise(q @ u), q @ o, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(9, 20), (20, 9)])
def test_a_batch_equals_its_matrices_one_by_one(impl, shape):
    u = draw(2, 3, *shape, dtype=torch.float32).to(DEVICE)
    single = torch.stack([torch.stack([orthogonalise(one, impl=impl) for one in row]) for row in u])
    torch.testing.assert_close(orthogonalise(u, impl=impl), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_stays_zero(impl):
    o = orthogonalise(torch.zeros(2, 5, 7, device=DEVICE), impl=impl)
    assert o.shape == (2, 5, 7) and not o.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_norm_is_divided_by_before_the_cast(impl):
    """1e-12 is zero in float16."""
    u = 1e-12 * draw(6, 9, dtype=torch.float32).to(DEVICE)
    o = orthogonalise(u, dtype=torch.float16, eps=0.0, impl=impl)
    assert o.dtype == torch.float16
    torch.testing.assert_close(o.float(), orthogonalise(1e12 * u, impl=impl), rtol=0, atol=0.02)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(130, 70), (2, 300, 20)])  # several tiles, the last one narrow
def test_products_of_several_tiles_are_mirrored_to_the_bit_and_err_as_pytorch_does(impl, shape):
    x = draw(*shape)
    for dtype in HALF if impl != "triton" or DEVICE == "cuda" else (torch.float16,):
        check(kernel.PRODUCT, {"x": x.clone().requires_grad_()}, dtype, impl, DEVICE)
    product = symmetric_product(x.float().to(DEVICE), impl)
    edge = {"triton": config(1, *shape[-2:], torch.float32)[0], "cpu": kernel.STRIP, "reference": shape[-2]}[impl]
    for first in range(0, shape[-2], edge):
        above = product[..., :first, first : first + edge]
        assert torch.equal(above, product[..., first : first + edge, :first].mT)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alpha, beta", [(0.0, 1.0), (1.0, 0.0), (-0.5, 3.0)])
def test_both_factors_of_the_polynomial_count(impl, alpha, beta):
    args = {"a": draw(40, 60) @ draw(60, 40, seed=1), "alpha": alpha, "beta": beta}
    args["a"] = args["a"] + args["a"].mT
    check(kernel.POLYNOMIAL, args, torch.float32, impl, DEVICE)


@pytest.mark.parametrize("impl", ["cpu", pytest.param("triton", marks=needs_triton)])
def test_the_gradient_of_a_few_steps_is_autograds(impl):
    u = draw(2, 9, 6)
    grads = []
    for fn, dtype in ((orthogonalise_reference, torch.float64), (partial(orthogonalise, impl=impl), torch.float32)):
        leaf = u.to(DEVICE, dtype).requires_grad_()
        weight = draw(2, 9, 6, seed=1, dtype=dtype).to(DEVICE)
        grads.append(torch.autograd.grad((fn(leaf, "classic", 2) * weight).sum(), leaf)[0].double())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_the_second_gradient_of_a_product_is_right():
    x = draw(3, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(partial(symmetric_product, impl="cpu"), (x,))
    a = draw(4, 4)
    a = (a + a.T).requires_grad_()
    # A function of symmetric matrices: the polynomial is asked on one, moved along symmetric directions.
    assert torch.autograd.gradcheck(lambda t: symmetric_polynomial((t + t.T) / 2, 0.5, 2.0, impl="cpu"), (a,))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_beyond_two_billion_elements_are_reached(impl):
    """Memory that is only mapped where it is touched."""
    if DEVICE == "cuda":
        pytest.skip("a GPU's memory is not mapped lazily")
    apart = 2**31 + 64
    x = torch.empty_strided((3, 5), (apart, 1), dtype=torch.float16)
    x.copy_(draw(3, 5))
    torch.testing.assert_close(symmetric_product(x, impl), x.clone() @ x.clone().T, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(orthogonalise(x, impl=impl), orthogonalise(x.clone(), impl=impl), rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_products_and_leaves_the_iteration_alone(impl):
    x = draw(5, 8, dtype=torch.float32).to(DEVICE)
    before = orthogonalise(x, impl=impl)
    if impl == "triton" and DEVICE == "cpu":
        dtype = torch.float16  # the interpreter has no bfloat16
    else:
        dtype = torch.bfloat16
    with torch.autocast(DEVICE, dtype):
        assert symmetric_product(x, impl).dtype == dtype
        assert symmetric_polynomial(x[:, :5], 1.0, 1.0, impl).dtype == dtype
        assert torch.equal(orthogonalise(x, impl=impl), before)


def test_the_path_is_chosen_by_device_and_recorded():
    with record() as ran:
        orthogonalise(draw(3, 4, dtype=torch.bfloat16).to(DEVICE))
        symmetric_product(draw(3, 4).to(DEVICE))
        symmetric_polynomial(draw(3, 3).to(DEVICE), 1.0, 1.0)
    on_gpu = [("newton_schulz", "triton"), ("symmetric_product", "reference"), ("symmetric_polynomial", "reference")]
    on_cpu = [("newton_schulz", "cpu"), ("symmetric_product", "cpu"), ("symmetric_polynomial", "cpu")]
    assert ran == (on_gpu if DEVICE == "cuda" else on_cpu)


def test_steps_cut_the_schedule_or_repeat_its_last():
    express = METHODS["polar_express"]
    assert schedule("polar_express") == express and schedule("polar_express", 2) == express[:2]
    assert schedule("polar_express", 9) == (*express, express[-1], express[-1])
    assert schedule(((1.0, 2.0, 3.0),), 3) == ((1.0, 2.0, 3.0),) * 3 and schedule("classic", 0) == ()
    with pytest.raises(ValueError, match="method='newton' does not exist; polar_express, classic do"):
        orthogonalise(draw(2, 2), "newton")
    with pytest.raises(ValueError, match="steps=-1 is negative"):
        orthogonalise(draw(2, 2), steps=-1)
    with pytest.raises(ValueError, match=r"is no list of \(a, b, c\)"):
        orthogonalise(draw(2, 2), method=((1.0, 2.0),))


@pytest.mark.skipif(kernel.triton is None, reason="Triton is not installed")
@few
@given(
    batch=st.integers(1, 200),
    m=st.integers(1, 20000),
    k=st.integers(1, 20000),
    dtype=st.sampled_from([*HALF, torch.float32]),
)
def test_every_configuration_is_among_the_builds(batch, m, k, dtype):
    shipped = {
        (b.constants["BLOCK"], b.constants["BLOCK_K"], b.num_warps, b.num_stages, bool(b.aligned)): b
        for b in kernel._builds()
    }
    if dtype in HALF:
        assert (*config(batch, m, k, dtype), m % 16 == k % 16 == 0) in shipped
    else:
        assert config(batch, m, k, dtype) in {key[:4] for key in shipped}
    assert config(batch, m, k, dtype) == config(batch, m, k, dtype)


@needs_triton
@pytest.mark.parametrize("rows", [1023, 1025])
def test_tiles_of_large_matrices_are_each_computed_once(rows, monkeypatch):
    """Which tile is whose is computed with a square root: up to 17 columns of tiles, 153 in all."""
    monkeypatch.setattr(kernel, "config", lambda *_: (64, 16, 4, 1))
    x = draw(rows, 1, dtype=torch.float32).to(DEVICE)
    torch.testing.assert_close(symmetric_product(x, "triton"), x @ x.T, rtol=1e-6, atol=0)
