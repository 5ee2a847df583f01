"""kernels/grouped_linear.py against row by row in float64, in value and gradient, with empty groups."""

from __future__ import annotations

import pytest
import torch

import kernels.grouped_linear as kernel
from kernels.grouped_linear import grouped_linear, grouped_linear_reference

ENDS = [[7], [0, 7, 7], [2, 3, 7], [0, 0, 0, 7], [7, 7], [1, 2, 3, 4, 5, 6, 7]]


def inputs(ends, bias, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(ends))
    n, G, D, M = ends[-1], len(ends), 3, 5
    shapes = [(n, D), (G, M, D), (G, M)]
    x, w, b = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)
    return x, w, torch.tensor(ends), b if bias else None


def by_loops(x, w, ends, b):
    rows, first = [], 0
    for g, stop in enumerate(ends.tolist()):
        for i in range(first, stop):
            rows.append(torch.stack([(w[g, m] * x[i]).sum() + (b[g, m] if b is not None else 0) for m in range(5)]))
        first = stop
    return torch.stack(rows)


def outputs(f, x, w, ends, b):
    y = f(x, w, ends, b)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    leaves = [t for t in (x, w, b) if t is not None]
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_equal_loops_in_float64(ends, bias):
    args = inputs(ends, bias)
    want = outputs(by_loops, *args)
    for f in (grouped_linear, grouped_linear_reference):
        for ours, truth in zip(outputs(f, *args), want, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_a_group_without_rows_gets_a_gradient_of_zeros_and_not_what_was_in_memory():
    x, w, ends, b = inputs([0, 7, 7], True)
    y = grouped_linear(x, w, ends, b)
    dw, db = torch.autograd.grad(y.sum(), (w, b))
    assert not dw[0].any() and not dw[2].any() and not db[0].any() and dw[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errs_no_more_than_twice_what_plain_pytorch_errs(dtype):
    x, w, ends, b = inputs([2, 3, 7], True, dtype)
    exact = outputs(grouped_linear_reference, x.double(), w.double(), ends, b.double())
    plain, ours = outputs(grouped_linear_reference, x, w, ends, b), outputs(grouped_linear, x, w, ends, b)
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert o.dtype == dtype
        assert (o.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + 1e-5


def test_compiles_to_one_graph_that_serves_any_grouping():
    torch._dynamo.reset()
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")
    for ends in ([2, 3, 7], [0, 0, 7], [7, 7, 7]):
        args = inputs(ends, True)
        for ours, truth in zip(outputs(compiled, *args), outputs(grouped_linear, *args), strict=True):
            torch.testing.assert_close(ours, truth, rtol=0, atol=0)


def test_the_registration_is_what_torch_library_asks_for():
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kernel._grouped, inputs([2, 3, 7], True), test_utils=checks)


@pytest.mark.parametrize("ends", [[2, 4], [2, 9], [8, 7], [-1, 7], []])
def test_ends_that_leave_rows_out_are_refused(ends):
    x, w, _, b = inputs([2, 7], True)
    with pytest.raises(ValueError, match="ends must rise to the 7 rows"):
        grouped_linear(x, w, torch.tensor(ends, dtype=torch.int64), b)
