"""kernels/count_sketch.py: the definition, its statistics, the adjoint, repeated bits, far rows, tables, no Numba."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.count_sketch as kernel
from kernels.count_sketch import OP, CountSketch, count_sketch
from kernels.op import record, triton
from tests.kernels.judge import arguments, check

PATHS = ["cpu", "reference", *(["triton"] if triton is not None else [])]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tables(n, m, seed=0):
    return CountSketch.draw(n, m, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("impl", PATHS)
def test_every_number_is_added_to_its_bucket_with_its_sign(impl):
    x, sketch = randn(2, 3, 40), tables(40, 7)
    expected = torch.zeros(2, 3, 7, dtype=torch.float64)
    for j in range(40):
        expected[..., sketch.buckets[j]] += sketch.signs[j] * x[..., j].double()
    torch.testing.assert_close(count_sketch(x, *sketch, impl=impl).double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(1, 60), st.integers(1, 9))
def test_the_gradient_is_the_adjoint(seed, n, m, rows):
    x = randn(rows, n, seed=seed, dtype=torch.float64).requires_grad_()
    y = randn(rows, m, seed=seed + 1, dtype=torch.float64)
    out = count_sketch(x, *tables(n, m, seed), impl="cpu")
    (back,) = torch.autograd.grad(out, x, y)
    torch.testing.assert_close((out * y).sum(), (x * back).sum(), rtol=1e-10, atol=1e-10)


def test_inner_products_are_unbiased_with_the_variance_of_the_formula():
    n, m, draws = 300, 64, 2000
    x, y = randn(n, dtype=torch.float64), randn(n, seed=1, dtype=torch.float64)
    y = y + 0.5 * x
    both = torch.stack([x, y])
    products = []
    for draw in range(draws):
        a, b = count_sketch(both, *tables(n, m, draw))
        products.append((a @ b).item())
    products = torch.tensor(products)
    variance = ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 * y**2).sum()) / m
    assert abs(products.mean() - x @ y) < 4 * (variance / draws).sqrt()
    assert abs(products.var() / variance - 1) < 0.15


@pytest.mark.parametrize("impl", [p for p in PATHS if p != "reference"])
def test_the_same_bits_each_time_and_with_any_number_of_threads(impl):
    x, sketch = randn(23, 3000), tables(3000, 500)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            y = count_sketch(leaf, *sketch, impl=impl)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
    finally:
        torch.set_num_threads(before)
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1])


@pytest.mark.skipif(triton is None, reason="needs Triton")
def test_both_fast_paths_add_in_the_same_order():
    x, sketch = randn(5, 2000), tables(2000, 300)
    assert torch.equal(count_sketch(x, *sketch, impl="triton"), count_sketch(x, *sketch, impl="cpu"))


@pytest.mark.skipif(triton is None, reason="needs Triton")
def test_rows_more_than_2_to_the_31_numbers_apart_are_read_where_they_lie():
    far = torch.empty_strided((2, 64), (2**31 + 16, 1), dtype=torch.float16)
    far.copy_(randn(2, 64))
    sketch = tables(64, 10)
    ours = count_sketch(far, *sketch, impl="triton")
    assert torch.equal(ours, count_sketch(far.contiguous(), *sketch, impl="triton"))


def test_without_numba_the_same_function_runs_in_pytorch(monkeypatch):
    monkeypatch.setattr(kernel, "numba", lambda: None)
    for shape in OP.shapes:
        check(OP, arguments(OP, shape), torch.float32, "cpu")


def test_a_processor_takes_its_own_path_and_autocast_changes_nothing():
    with record() as ran, torch.autocast("cpu", torch.bfloat16):
        assert count_sketch(randn(2, 8), *tables(8, 4)).dtype == torch.float32
    assert ran == [("count_sketch", "cpu")]


def test_a_second_derivative_through_the_gather_is_refused():
    x = randn(2, 8, dtype=torch.float64).requires_grad_()
    (g,) = torch.autograd.grad(count_sketch(x, *tables(8, 4)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), x)


def test_the_tables_sort_the_numbers_by_bucket_in_their_order():
    sketch = tables(200, 11)
    assert sketch.offsets.dtype == sketch.order.dtype == sketch.buckets.dtype == torch.int32
    seen = []
    for bucket in range(11):
        part = sketch.order[sketch.offsets[bucket] : sketch.offsets[bucket + 1]]
        j = torch.where(part < 0, ~part, part).long()
        assert (j.diff() > 0).all() and (sketch.buckets[j] == bucket).all()
        assert torch.equal(sketch.signs[j] < 0, part < 0)
        seen.append(j)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(200))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: CountSketch.of(torch.tensor([0, 4]), torch.tensor([1, 1]), 4), "buckets must be 0..3 for m=4"),
        (lambda: CountSketch.of(torch.tensor([0, 1]), torch.tensor([1, 2]), 4), r"signs must be \+1 or -1"),
        (lambda: CountSketch.of(torch.tensor([0, 1]), torch.tensor([1]), 4), "must be"),
        (lambda: CountSketch.draw(0, 3), "both must be positive"),
        (lambda: count_sketch(torch.ones(2, 9), *tables(8, 4)), "tables for 8 numbers do not fit rows of 9"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_the_registration_is_what_torch_library_asks_for():
    kinds = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kernel._sketch, (randn(2, 8).requires_grad_(), *tables(8, 4), "cpu"), test_utils=kinds)
