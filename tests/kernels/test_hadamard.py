"""kernels/hadamard: identities of the transform and the sketch, the norm, options, wide and far rows, no Numba."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.hadamard as hadamard
from kernels.hadamard import FWHT, SKETCH, SRHT, fwht, gpu, processor, srht, srht_reference
from kernels.op import record, triton
from tests.kernels.judge import arguments, check

PATHS = ["cpu", "reference", *(["triton"] if triton is not None else [])]
few = settings(max_examples=12, deadline=None)
numbers = st.integers(0, 2**31)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sylvester(P):
    """H_P number by number: -1 where i & j has an odd number of ones."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(P)] for i in range(P)], dtype=torch.float64)


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("P", [1, 2, 16, 128, 512])
def test_the_transform_is_the_product_with_the_matrix_of_its_definition(P, impl):
    x = randn(3, P)
    torch.testing.assert_close(fwht(x, impl).double(), x.double() @ sylvester(P) * P**-0.5, rtol=1e-5, atol=1e-5)


@few
@given(numbers, st.integers(0, 14), st.integers(1, 3))
def test_twice_is_the_identity_and_norms_are_kept(seed, log, rows):
    x = randn(rows, 1 << log, seed=seed)
    y = fwht(x, "cpu")
    torch.testing.assert_close(fwht(y, "cpu"), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", PATHS)
def test_rows_of_two_passes_equal_the_reference_to_1e_5(impl):
    x = randn(2, 16 * 1024)
    torch.testing.assert_close(fwht(x, impl), fwht(x, "reference"), rtol=1e-5, atol=1e-5)
    tables = SRHT.draw(9000, 20000, torch.Generator().manual_seed(0))
    x = randn(2, 9000).requires_grad_()
    weight = randn(2, 20000, seed=3)
    ours, plain = srht(x, *tables, block=256, impl=impl), srht_reference(x, *tables, block=256)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    (a,), (b,) = (torch.autograd.grad((y * weight).sum(), x) for y in (ours, plain))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@few
@given(numbers, st.integers(1, 70), st.integers(1, 200))
def test_the_gradient_is_the_adjoint_of_the_sketch(seed, n, target):
    tables = SRHT.draw(n, target, torch.Generator().manual_seed(seed))
    x, y = randn(n, seed=seed, dtype=torch.float64).requires_grad_(), randn(target, seed=seed + 1, dtype=torch.float64)
    out = srht(x, *tables, impl="cpu")
    (back,) = torch.autograd.grad(out, x, y)
    torch.testing.assert_close((out * y).sum(), (x * back).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "target"), [(1024, 256), (1000, 512), (256, 700)])
def test_norms_and_cosines_hold_in_expectation_within_3_over_the_root_of_the_width(n, target):
    a = torch.nn.functional.normalize(randn(100, n), dim=-1)
    b = torch.nn.functional.normalize(a + 0.5 * torch.nn.functional.normalize(randn(100, n, seed=1), dim=-1), dim=-1)
    ratios, errors = [], []
    for draw in range(100):
        tables = SRHT.draw(n, target, torch.Generator().manual_seed(draw))
        x, y = srht(torch.stack([a[draw], b[draw]]), *tables)
        ratios.append(x.norm() ** 2)
        errors.append(torch.cosine_similarity(x, y, dim=0) - a[draw] @ b[draw])
    ratio, error = torch.stack(ratios), torch.stack(errors)
    bound = 3 * target**-0.5
    assert abs(ratio.mean() - 1) <= bound and (ratio.sqrt() - 1).abs().quantile(0.97) <= bound
    assert error.abs().quantile(0.99) <= bound
    assert ratio.std() > 1e-3  # the draws differ


def test_as_many_numbers_out_as_in_is_a_rotation():
    x = randn(4, 256)
    tables = SRHT.draw(256, 256, torch.Generator().manual_seed(1))
    torch.testing.assert_close(srht(x, *tables) @ srht(x, *tables).T, x @ x.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("impl", PATHS)
def test_the_norm_keeps_the_length_of_a_unit_row_whatever_the_width_and_zeros_stay_zeros(impl):
    x = torch.nn.functional.normalize(randn(3, 1024), dim=-1)
    x[1] = 0
    y = srht(x, *SRHT.draw(1024, 2048, torch.Generator().manual_seed(0)), block=256, impl=impl)
    squares = y.view(3, 8, 256).square().mean(-1)
    torch.testing.assert_close(squares[[0, 2]], torch.ones(2, 8), rtol=1e-5, atol=1e-5)
    assert not y[1].any()


@pytest.mark.parametrize("impl", [p for p in PATHS if p != "reference"])
@pytest.mark.parametrize("option", [{"scale": 0.3}, {"eps": 0.5, "block": 16}, {"block": 8}, {"block": None}])
def test_each_option_changes_the_result_and_is_right(option, impl):
    args = {**arguments(SKETCH, (3, 60, 40, 16)), "eps": 1e-2, **option}
    changed = srht_reference(**args)
    plain = srht_reference(**{**args, "scale": None, "eps": 1e-2, "block": 16})
    assert not torch.allclose(changed, plain)
    check(SKETCH, args, torch.float32, impl)


def test_without_numba_the_same_function_runs_in_pytorch(monkeypatch):
    monkeypatch.setattr(processor, "numba", lambda: None)
    for op in (FWHT, SKETCH):
        for shape in op.shapes:
            check(op, arguments(op, shape), torch.float32, "cpu")


def test_threads_give_the_same_bits():
    x, tables = randn(64, 5000), SRHT.draw(5000, 3000, torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(srht(x, *tables, block=256, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.skipif(triton is None, reason="needs Triton")
def test_rows_more_than_2_to_the_31_numbers_apart_are_read_where_they_lie():
    far = torch.empty_strided((2, 64), (2**31 + 16, 1), dtype=torch.float16)
    far.copy_(randn(2, 64))
    near = far.contiguous()
    assert torch.equal(fwht(far, "triton"), fwht(near, "triton"))
    tables = SRHT.draw(64, 32, torch.Generator().manual_seed(2))
    assert torch.equal(srht(far, *tables, impl="triton"), srht(near, *tables, impl="triton"))


def test_a_processor_takes_its_own_path_and_autocast_changes_nothing():
    x, tables = randn(2, 8), SRHT.draw(8, 4, torch.Generator().manual_seed(0))
    with record() as ran, torch.autocast("cpu", torch.bfloat16):
        assert fwht(x).dtype == srht(x, *tables).dtype == torch.float32
    assert ran == [("fwht", "cpu"), ("srht", "cpu")]


def test_a_second_derivative_is_right_for_the_transform_and_refused_for_the_sketch():
    x = randn(2, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(partial(fwht, impl="cpu"), x)
    tables = SRHT.draw(8, 4, torch.Generator().manual_seed(0))
    y = srht(x, *tables, block=2, impl="cpu").square().sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), x)


def test_every_configuration_is_compiled_and_depends_on_the_width_alone():
    built = {tuple(b.constants[k] for k in "RAB") for b in gpu.fwht_builds() if "R" in b.constants}
    for log in range(18):
        P = 1 << log
        c = gpu.config(P // gpu.segments(P))
        assert c in gpu.CONFIGS
        assert (c.R, c.A, c.B) in built and P // gpu.segments(P) <= c.A * c.B
    across = {b.constants["S"] for b in gpu.fwht_builds() if "S" in b.constants}
    assert {gpu.segments(1 << log) for log in range(13, 18)} == across


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fwht(torch.ones(2, 3)), "fwht: 3 is not a power of two; pad the last axis to 4"),
        (lambda: srht(torch.ones(2, 3), *SRHT.draw(8, 4)), "do not fit 3 numbers in, 4 out"),
        (lambda: srht(torch.ones(2, 8), *SRHT.draw(8, 4), block=3), "block=3 is not a power of two"),
        (lambda: srht(torch.ones(2, 8), *SRHT(SRHT.draw(8, 2).signs, torch.tensor([0, 8]))), "chosen holds 0 to 8"),
        (lambda: srht(torch.ones(2, 8), *SRHT(SRHT.draw(8, 2).signs, torch.tensor([-1, 3]))), "chosen holds -1 to 3"),
        (lambda: SRHT.draw(0, 4), "both must be positive"),
    ],
)
def test_what_cannot_be_is_refused_in_words(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_the_registration_is_what_torch_library_asks_for():
    tables = SRHT.draw(8, 4, torch.Generator().manual_seed(0))
    kinds = ("test_schema", "test_faketensor", "test_autograd_registration")
    x = randn(2, 8).requires_grad_()
    torch.library.opcheck(hadamard._fwht, (x, "cpu"), test_utils=kinds)
    torch.library.opcheck(hadamard._srht, (x, *tables, 1.0, 2, 1e-6, "cpu"), test_utils=kinds)
