"""RMSNorm: what tests/kernels/test_ops.py does not ask of every operation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels.op import INTERPRETED, record
from kernels.rms_norm import BLOCKS, OP, WIDEST, config, rms_norm, rms_norm_reference
from tests.kernels.judge import check

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_triton = pytest.mark.skipif(not (INTERPRETED or CUDA), reason="TRITON_INTERPRET=1 or a GPU")
PATHS = [pytest.param("triton", marks=needs_triton), "cpu"]


def place(impl):
    return DEVICE if impl == "triton" else "cpu"


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OPTIONS = {
    "gain": lambda: {"gain": (1 + random(70, seed=1)).requires_grad_()},
    "scale": lambda: {"scale": 0.3},
    "eps": lambda: {"eps": 0.5},
    "first": lambda: {"channels": (0, 5)},
    "last": lambda: {"channels": (63, 70)},
    "some": lambda: {"channels": torch.tensor([0, 3, 69])},
    "some, with gain": lambda: {"channels": torch.tensor([2, 31]), "gain": (1 + random(70, seed=1)).requires_grad_()},
    "residual": lambda: {"residual": random(6, 70, seed=2).requires_grad_()},
    "residual, some": lambda: {"residual": random(6, 70, seed=2).requires_grad_(), "channels": (1, 9), "scale": 2.0},
}


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_the_output_and_errs_at_most_twice_what_pytorch_errs(impl, option):
    x = random(6, 70).requires_grad_()
    plain = rms_norm_reference(x)
    changed = rms_norm_reference(x, **OPTIONS[option]())
    assert not torch.allclose(plain, changed[0] if isinstance(changed, tuple) else changed)
    dtype = torch.float16 if impl == "triton" else torch.bfloat16
    for d in (torch.float32, dtype):
        check(OP, {"x": x, **OPTIONS[option]()}, d, impl, place(impl))


@pytest.mark.parametrize("impl", [*PATHS, "reference"])
def test_it_is_pytorch_s_own_rms_norm(impl):
    x, gain = (t.float().to(place(impl)) for t in (random(9, 33), random(33, seed=1)))
    torch.testing.assert_close(
        rms_norm(x, gain, eps=1e-5, impl=impl), F.rms_norm(x, (33,), gain, 1e-5), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("impl", PATHS)
def test_zero_rows_give_zeros_and_a_nan_row_stays_alone(impl):
    x = random(5, 40).float().to(place(impl))
    x[1], x[3] = 0.0, torch.nan
    x.requires_grad_()
    y = rms_norm(x, impl=impl)
    assert (y[1] == 0).all() and y[3].isnan().all() and y[[0, 1, 2, 4]].isfinite().all()
    (dx,) = torch.autograd.grad(y[[0, 1, 2, 4]].square().sum(), x)
    assert dx[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("impl", PATHS)
def test_the_sum_that_is_returned_is_the_rounded_one_that_was_normed(impl):
    x, r = (t.half().to(place(impl)) for t in (random(7, 48) * 30, random(7, 48, seed=1)))
    y, s = rms_norm(x, residual=r, impl=impl)
    assert torch.equal(s, x + r)
    assert torch.equal(y, rms_norm(x + r, impl=impl))


@pytest.mark.parametrize("impl", PATHS)
def test_a_branch_in_half_precision_is_added_to_a_stream_in_float32(impl):
    x, r = random(3, 8).half().to(place(impl)).requires_grad_(), random(3, 8, seed=1).float().to(place(impl))
    y, s = rms_norm(x, residual=r.requires_grad_(), impl=impl)
    assert y.dtype == s.dtype == torch.float32
    dx, dr = torch.autograd.grad((y + s).square().sum(), (x, r))
    assert dx.dtype == torch.float16 and dr.dtype == torch.float32
    torch.testing.assert_close(dx.float(), dr, rtol=1e-3, atol=1e-3)


@needs_triton
def test_rows_more_than_2_to_the_31_numbers_apart():
    x = torch.empty_strided((2, 8), (2**31 + 5, 1), dtype=torch.float16, device=DEVICE)
    x.copy_(random(2, 8))
    torch.testing.assert_close(rms_norm(x, impl="triton"), rms_norm_reference(x.contiguous()))


@pytest.mark.parametrize("impl", PATHS)
def test_a_second_derivative_raises_instead_of_lying(impl):
    x = random(2, 4).float().to(place(impl)).requires_grad_()
    (dx,) = torch.autograd.grad(rms_norm(x, impl=impl).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("impl", PATHS)
def test_a_second_derivative_under_a_constant_gradient_raises_too(impl):
    x = random(2, 4).float().to(place(impl)).requires_grad_()
    (dx,) = torch.autograd.grad(rms_norm(x, impl=impl).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|no second derivative"):
        dx.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_what_it_does_to_pytorch_s(dtype):
    x = random(3, 8).to(DEVICE, dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert rms_norm(x).dtype == F.rms_norm(x, (8,)).dtype


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(2, 40), st.floats(0.01, 100), st.integers(0, 1000))
def test_length_is_sqrt_d_whatever_the_scale_and_the_gradient_stands_across(rows, D, factor, seed):
    x = random(rows, D, seed=seed).requires_grad_()
    y = rms_norm(x, eps=1e-30, impl="cpu")
    torch.testing.assert_close(y.square().mean(-1), torch.ones(rows, dtype=torch.float64))
    torch.testing.assert_close(rms_norm(x * factor, eps=1e-30, impl="cpu"), y)
    (dx,) = torch.autograd.grad((y * random(rows, D, seed=seed + 1)).sum(), x)
    across = (dx * x).sum(-1).abs()
    assert (across <= 1e-9 * dx.norm(dim=-1) * x.norm(dim=-1) + 1e-12).all()


def test_every_tile_that_config_gives_is_compiled():
    built = {
        (b.kernel.__name__, b.constants["ROWS"], b.constants["BLOCK"], b.num_warps)
        for b in OP.builds()
        if "counted" in b.constants
    }
    for D in (1, 3, 64, 65, 128, 256, 300, 768, 1024, 1152, 2048, 2049, 4096, 5000, WIDEST):
        assert config(D) == config(D) and config(D)[1] >= D
        assert {(k, *config(D)) for k in ("_forward", "_backward")} <= built
    assert BLOCKS[-1] == WIDEST


@needs_triton
def test_rows_that_are_too_wide_are_refused_by_the_kernel_and_done_by_the_reference():
    x = torch.ones(1, WIDEST + 1, device=DEVICE)
    with pytest.raises(ValueError, match=f"rows of at most {WIDEST}"):
        rms_norm(x, impl="triton")
    assert rms_norm(x).shape == x.shape


def test_where_there_are_gradients_a_processor_takes_its_own_path_and_the_compiler_the_reference():
    x = torch.ones(2, 4)
    with record() as ran:
        rms_norm(x)
        rms_norm(x.requires_grad_())
        with torch.no_grad():
            rms_norm(x)
        torch.compile(lambda t: rms_norm(t), backend="aot_eager", fullgraph=True)(x)
    assert [path for _, path in ran] == ["reference", "cpu", "reference", "reference"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"x": torch.tensor(1.0)}, "must have an axis"),
        ({"x": torch.arange(4)}, "floating numbers"),
        ({"gain": torch.ones(3)}, r"gain is \[3\]; rows of 4 need \[4\]"),
        ({"gain": torch.ones(1, requires_grad=True)}, r"gain is \[1\]"),
        ({"residual": torch.ones(1, 4)}, r"x is \[2, 4\] and residual \[1, 4\]"),
        ({"channels": (0, 5)}, r"channels=\(0, 5\) must be .* of 4"),
        ({"channels": (2, 2)}, r"channels=\(2, 2\)"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, said):
    with pytest.raises(ValueError, match=said):
        rms_norm(**{"x": torch.ones(2, 4), **arguments})
