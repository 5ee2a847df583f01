"""kernels/linear_scan.py against plain steps in float64, in value and gradient, on every path it can take."""

from __future__ import annotations

import pytest
import torch

import kernels.linear_scan as kernel
from kernels.linear_scan import linear_scan, linear_scan_reference

# One step; below two chunks; exactly chunks; a rest; chunks of chunks with a rest; and steps too wide for chunks.
SHAPES = [(2, 1, 3), (1, 5, 1), (3, 31, 2), (2, 32, 3), (2, 45, 2, 3), (1, 16 * 32 + 7, 2), (1, 40, kernel.WIDE)]


def inputs(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    a = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    a[:, :: max(2, shape[1] // 3)] = 0.0  # resets
    a[:, 1::7] = 1.0
    b = torch.randn(shape, generator=generator, dtype=torch.float64)
    h0 = torch.randn((shape[0], *shape[2:]), generator=generator, dtype=torch.float64)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (a, b, h0)], weight.to(dtype)


def by_hand(a, b, h0):
    """Number by number, with the gradient from the definition: dL/dh_t collects what every later h makes of it."""
    B, T, M = b.shape
    h = torch.zeros(B, T, M, dtype=torch.float64)
    for r in range(B):
        for m in range(M):
            state = h0[r, m].item()
            for t in range(T):
                state = a[r, t, m].item() * state + b[r, t, m].item()
                h[r, t, m] = state
    return h


def outputs(f, tensors, weight):
    y = f(*tensors)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), tensors)]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_plain_steps_in_float64(shape):
    tensors, weight = inputs(shape)
    want = outputs(linear_scan_reference, tensors, weight)
    for ours, truth in zip(outputs(linear_scan, tensors, weight), want, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    (a, b, _), weight = inputs(shape)  # without a state before
    for ours, truth in zip(
        outputs(linear_scan, (a, b), weight), outputs(linear_scan_reference, (a, b), weight), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_the_reference_equals_the_recurrence_number_by_number():
    (a, b, h0), _ = inputs((2, 9, 3))
    torch.testing.assert_close(linear_scan_reference(a, b, h0), by_hand(a, b, h0), rtol=1e-14, atol=1e-14)


def test_gradients_equal_finite_differences_and_can_be_derived_again():
    tensors, _ = inputs((2, 37, 2))
    assert torch.autograd.gradcheck(linear_scan, tensors)
    small, _ = inputs((1, 4, 1))
    assert torch.autograd.gradgradcheck(linear_scan, small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 45, 3), (1, 300, 4)])
def test_errs_no_more_than_twice_what_plain_steps_err_in_float32(dtype, shape):
    tensors, weight = inputs(shape, dtype)
    assert linear_scan(*tensors).dtype == torch.float32
    exact = outputs(linear_scan_reference, [t.double() for t in tensors], weight.double())
    plain = outputs(linear_scan_reference, [t.float() for t in tensors], weight.float())
    ours = outputs(linear_scan, [t.float() for t in tensors], weight.float())
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert (o.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + 1e-5


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0])
def test_long_products_neither_overflow_nor_divide_by_zero(size):
    """Division by a running product, the usual shortcut, breaks at a = 0 and when the product underflows."""
    a, b = torch.full((1, 2000, 2), size).requires_grad_(), torch.ones(1, 2000, 2).requires_grad_()
    h = linear_scan(a, b)
    want = torch.arange(1.0, 2001.0) if size == 1.0 else torch.ones(2000)
    torch.testing.assert_close(h[0, :, 0], want)
    h.sum().backward()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


def test_a_zero_forgets_what_was_before_even_when_it_was_huge():
    (a, b, h0), _ = inputs((1, 60, 2))
    with torch.no_grad():
        a[:, 20] = 0
    other = b.detach().clone()
    other[:, :20] *= 1e6
    torch.testing.assert_close(linear_scan(a, b, h0)[:, 20:], linear_scan(a, other, h0 + 1)[:, 20:], rtol=0, atol=0)


def test_compiles_to_one_graph_with_equal_gradients():
    tensors, weight = inputs((2, 45, 3))
    torch._dynamo.reset()
    compiled = torch.compile(linear_scan, fullgraph=True, backend="aot_eager")
    for ours, truth in zip(outputs(compiled, tensors, weight), outputs(linear_scan, tensors, weight), strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=0)


def test_the_registration_is_what_torch_library_asks_for():
    tensors, _ = inputs((2, 40, 3))
    torch.library.opcheck(
        kernel._scan, tensors, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
