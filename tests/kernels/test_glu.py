"""Gated linear units: what tests/kernels/test_ops.py does not ask of every operation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.activations import ACT2FN

from kernels.glu import ACTIVATIONS, OP, config, glu
from kernels.op import INTERPRETED
from tests.kernels.judge import check

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_triton = pytest.mark.skipif(not (INTERPRETED or CUDA), reason="TRITON_INTERPRET=1 or a GPU")
THEIRS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_errs_at_most_twice_what_pytorch_errs_also_far_out(activation):
    gate = torch.cat([random(40, 21) * 4, torch.linspace(-60, 60, 21, dtype=torch.float64)[None]]).requires_grad_()
    value = random(41, 21, seed=1).requires_grad_()
    for dtype in (torch.float32, torch.float16):
        check(OP, {"gate": gate, "value": value, "activation": activation}, dtype, "triton", DEVICE)


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=needs_triton), "reference"])
@pytest.mark.parametrize("activation", THEIRS)
def test_activations_are_those_of_transformers(activation, impl):
    gate, value = (t.float().to(DEVICE) for t in (random(5, 12) * 3, random(5, 12, seed=1)))
    want = ACT2FN[THEIRS[activation]](gate) * value
    torch.testing.assert_close(glu(gate, value, activation, impl), want, rtol=2e-6, atol=2e-6)


@needs_triton
def test_packed_is_the_two_halves_in_value_and_gradient():
    packed = random(3, 14).float().to(DEVICE).requires_grad_()
    one = glu(packed, impl="triton")
    two = glu(*packed.chunk(2, -1), impl="triton")
    assert torch.equal(one, two)
    a, b = (torch.autograd.grad(y.square().sum(), packed)[0] for y in (one, two))
    assert torch.equal(a, b)


@needs_triton
def test_rows_more_than_2_to_the_31_numbers_apart():
    gate = torch.empty_strided((2, 8), (2**31 + 5, 1), dtype=torch.float16, device=DEVICE)
    gate.copy_(random(2, 8))
    value = random(2, 8, seed=1).half().to(DEVICE)
    torch.testing.assert_close(glu(gate, value, impl="triton"), F.silu(gate.contiguous()) * value)


@needs_triton
def test_a_second_derivative_raises_instead_of_lying():
    x = random(2, 4).float().to(DEVICE).requires_grad_()
    (dx,) = torch.autograd.grad(glu(x, impl="triton").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        dx.sum().backward()


@needs_triton
def test_nan_passes_as_it_does_in_pytorch_and_stays_in_its_place():
    gate = torch.tensor([[1.0, torch.nan, -1.0]], device=DEVICE)
    for activation in ACTIVATIONS:
        y = glu(gate, torch.ones_like(gate), activation, impl="triton")
        assert y.isnan().tolist() == [[False, True, False]], activation


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 20), st.floats(-3, 3), st.integers(0, 1000))
@needs_triton
def test_the_value_is_linear(rows, D, factor, seed):
    gate, value = random(rows, D, seed=seed).float().to(DEVICE), random(rows, D, seed=seed + 1).float().to(DEVICE)
    y = glu(gate, value, impl="triton")
    torch.testing.assert_close(glu(gate, factor * value, impl="triton"), factor * y, rtol=1e-5, atol=1e-6)


def test_every_tile_that_config_gives_is_compiled():
    built = {(b.kernel.__name__, b.constants["ROWS"], b.constants["BLOCK"], b.num_warps) for b in OP.builds()}
    for D in (1, 24, 256, 257, 1024, 2752, 28672):
        assert config(D) == config(D)
        assert {(k, *config(D)) for k in ("_forward", "_backward")} <= built
    assert {b.constants["KIND"] for b in OP.builds()} == set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.ones(2, 3),), "packed width must be even, and 3 is not"),
        ((torch.ones(2, 4), torch.ones(2, 2)), r"gate is \[2, 4\] and value \[2, 2\]"),
        ((torch.ones(2, 4), None, "swish"), "activation='swish' does not exist; silu, gelu"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, said):
    with pytest.raises(ValueError, match=said):
        glu(*arguments)
