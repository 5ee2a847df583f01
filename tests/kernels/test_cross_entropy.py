"""kernels/cross_entropy.py against the formula in float64, value and gradient."""

from __future__ import annotations

import pytest
import torch

from kernels.cross_entropy import linear_cross_entropy


def formula(x, w, targets, z, bias):
    """Row by row, in the words of the file's first lines."""
    total, plain = x.new_zeros(()), x.new_zeros(())
    for row, target in zip(x, targets, strict=True):
        if target == -100:
            continue
        logits = w @ row + (bias if bias is not None else 0)
        lse = (logits - logits.max()).exp().sum().log() + logits.max()
        plain = plain + lse - logits[target]
        total = total + lse - logits[target] + z * lse**2
    return total, plain


@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 11), (33, 16, 65)])
def test_loss_and_gradients_equal_the_formula(shape, z, with_bias):
    n, d, v = shape
    torch.manual_seed(n)
    tensors = [torch.randn(n, d), torch.randn(v, d), torch.randn(v)]
    targets = torch.randint(v, (n,))
    if n > 1:
        targets[::3] = -100

    def outputs(dtype, function):
        x, w, b = (t.to(dtype).requires_grad_() for t in tensors)
        loss, nll = function(x, w, targets, z, b if with_bias else None)
        loss.backward()
        return [loss.detach(), nll.detach(), x.grad, w.grad, *([b.grad] if with_bias else [])]

    exact = outputs(torch.float64, formula)
    for ours, truth in zip(outputs(torch.float64, linear_cross_entropy), exact, strict=True):
        assert torch.allclose(ours, truth, rtol=1e-12, atol=1e-12)
    for ours, truth in zip(outputs(torch.float32, linear_cross_entropy), exact, strict=True):
        assert torch.allclose(ours.double(), truth, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_z_loss_is_twice_the_weighted_lse_times_the_probabilities():
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 3, dtype=torch.float64)
    targets = torch.tensor([0, 5, -100, 2])
    with_z, _ = linear_cross_entropy(x, w, targets, 0.3)
    without, _ = linear_cross_entropy(x, w, targets)
    (got,) = torch.autograd.grad(with_z - without, x)
    logits = x @ w.T
    expected = 2 * 0.3 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1) @ w
    expected[2] = 0
    assert torch.allclose(got, expected, atol=1e-12)


def test_rows_without_a_target_give_zero_and_no_nan():
    x = torch.randn(3, 4, requires_grad=True)
    loss, nll = linear_cross_entropy(x, torch.randn(5, 4), torch.full((3,), -100), 0.1)
    loss.backward()
    assert loss.item() == nll.item() == 0.0 and not x.grad.any()
