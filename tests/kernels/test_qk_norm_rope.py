"""Norm, gain and rotation of queries and keys: what tests/kernels/test_ops.py does not ask of every operation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from kernels.op import INTERPRETED, record
from kernels.qk_norm_rope import OP, config, qk_norm_rope
from models.families import create
from models.gpt.config import GPT
from models.memory import At
from models.parts.attention import Causal
from models.parts.mlp import SwiGLU
from models.parts.norm import Hypersphere, PartialRMSNorm, RMSNorm, SliceRMSNorm
from models.parts.position import Rotary
from models.parts.qk_norm import L2QKNorm, RMSQKNorm
from models.parts.rotation import Rotation
from tests.kernels.judge import check

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_triton = pytest.mark.skipif(not (INTERPRETED or CUDA), reason="TRITON_INTERPRET=1 or a GPU")
PATHS = [pytest.param("triton", marks=needs_triton), "reference"]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tables(T, h, r=None, dtype=torch.float32):
    return [t.to(DEVICE) for t in Rotation(h, 100.0, r).tables(At.full(1, T), dtype)]


OPTIONS = {
    "turned": lambda: {},
    "some turned": lambda: dict(zip(("cos", "sin"), tables(5, 12, 4, torch.float64), strict=True)),
    "rms": lambda: {"norm": "rms"},
    "l2": lambda: {"norm": "l2"},
    "eps": lambda: {"norm": "l2", "eps": 0.5},
    "gain of queries": lambda: {"norm": "rms", "gain_q": random(12, seed=1).requires_grad_()},
    "gain of keys": lambda: {"gain_k": random(12, seed=2).requires_grad_()},
    "not turned": lambda: {"cos": None, "sin": None, "norm": "l2", "gain_k": random(12, seed=2).requires_grad_()},
}


@needs_triton
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_the_output_and_errs_at_most_twice_what_pytorch_errs(option):
    qk = random(2, 5, 4, 12).requires_grad_()
    base = {"qk": qk, "H": 3, **dict(zip(("cos", "sin"), tables(5, 12, None, torch.float64), strict=True))}
    args = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in {**base, **OPTIONS[option]()}.items()}
    if option != "turned":
        plain, changed = (torch.cat(OP.reference(**a), 2) for a in ({"qk": qk, "H": 3}, args))
        assert not torch.allclose(plain, changed)
    for dtype in (torch.float32, torch.float16):
        check(OP, args, dtype, "triton", DEVICE)


@pytest.mark.parametrize("impl", PATHS)
def test_it_is_qwen3_s_norm_then_rotation(impl):
    B, T, H, K, h = 2, 6, 4, 2, 16
    qk = random(B, T, H + K, h).float().to(DEVICE)
    gains = [1 + random(h, seed=n).float().to(DEVICE) for n in (1, 2)]
    cos, sin = tables(T, h)
    q, k = qk_norm_rope(qk, H, cos, sin, norm="rms", gain_q=gains[0], gain_k=gains[1], impl=impl)
    norms = [Qwen3RMSNorm(h, 1e-6).to(DEVICE) for _ in gains]
    normed = []
    for norm, gain, part in zip(norms, gains, qk.split((H, K), 2), strict=True):
        norm.weight.data = gain
        normed.append(norm(part).transpose(1, 2))
    theirs = apply_rotary_pos_emb(
        *normed, cos[:, :, 0], (sin * torch.sign(torch.arange(h) - h / 2 + 0.5).to(sin))[:, :, 0]
    )
    for ours, want in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(ours.transpose(1, 2), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_zero_heads_have_zeros_and_finite_gradients(impl, norm):
    qk = random(1, 3, 3, 8).float().to(DEVICE)
    qk[0, 1] = 0.0
    qk.requires_grad_()
    q, k = qk_norm_rope(qk, 2, *tables(3, 8), norm=norm, impl=impl)
    assert (q[0, 1] == 0).all() and (k[0, 1] == 0).all()
    (d,) = torch.autograd.grad(q.sum() + k.sum(), qk)
    assert d.isfinite().all()


@needs_triton
def test_a_slice_of_one_wide_matrix_and_gradients_in_attention_s_layout_are_read_where_they_lie():
    wide = random(2, 5, 44).float().to(DEVICE).requires_grad_()
    weight = random(2, 3, 5, 8, seed=1).float().to(DEVICE)
    results = []
    for impl in ("triton", "reference"):
        q, k = qk_norm_rope(wide[..., 2:34].view(2, 5, 4, 8), 3, *tables(5, 8), norm="rms", impl=impl)
        y = (q.transpose(1, 2) * weight).sum() + (k.expand(2, 5, 2, 8) ** 2).sum()
        results.append([q, k, *torch.autograd.grad(y, wide)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_triton
def test_rows_more_than_2_to_the_31_numbers_apart():
    qk = torch.empty_strided((2, 1, 2, 8), (2**31 + 5, 16, 8, 1), dtype=torch.float16, device=DEVICE)
    qk.copy_(random(2, 1, 2, 8))
    for a, b in zip(
        qk_norm_rope(qk, 1, *tables(1, 8), norm="rms", impl="triton"),
        qk_norm_rope(qk.contiguous(), 1, *tables(1, 8), norm="rms", impl="reference"),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@needs_triton
def test_a_second_derivative_raises_instead_of_lying():
    qk = random(1, 2, 2, 4).float().to(DEVICE).requires_grad_()
    q, _ = qk_norm_rope(qk, 1, norm="rms", impl="triton")
    (d,) = torch.autograd.grad(q.square().sum(), qk, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        d.sum().backward()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 8), st.integers(0, 1000))
@needs_triton
def test_a_rotation_keeps_lengths_and_a_norm_makes_them_one(T, H, pairs, seed):
    qk = random(1, T, H + 1, 2 * pairs, seed=seed).float().to(DEVICE)
    q, k = qk_norm_rope(qk, H, *tables(T, 2 * pairs), impl="triton")
    torch.testing.assert_close(torch.cat([q, k], 2).norm(dim=-1), qk.norm(dim=-1))
    q, k = qk_norm_rope(qk, H, *tables(T, 2 * pairs), norm="l2", eps=1e-20, impl="triton")
    torch.testing.assert_close(torch.cat([q, k], 2).norm(dim=-1), torch.ones_like(qk[..., 0]))


def test_every_tile_that_config_gives_is_compiled():
    names = ("ROWS", "HALF", "REST")
    built = {(b.kernel.__name__, *(b.constants[n] for n in names)) for b in OP.builds() if b.constants["NORM"] == "rms"}
    for h in (2, 32, 63, 64, 96, 128, 192, 256):
        for r in (0, h // 4 * 2, h // 2 * 2):
            assert config(h, r) == config(h, r)
            if config(h, r) is not None:
                assert {(k, *config(h, r)) for k in ("_forward", "_backward")} <= built, (h, r)
    assert config(258, 258) is None and config(256, 2) is None


def test_wrong_arguments_are_refused_by_name():
    qk = torch.ones(1, 1, 2, 4)
    with pytest.raises(ValueError, match="norm='layer' does not exist; None, 'rms' and 'l2' do"):
        qk_norm_rope(qk, 1, norm="layer")
    with pytest.raises(ValueError, match="cos and sin come together"):
        qk_norm_rope(qk, 1, torch.ones(1, 1, 1, 4))
    with pytest.raises(ValueError, match=r"qk \[1, 1, 2, 4\] must be \[B, T, H \+ K, h\], with H=3"):
        qk_norm_rope(qk, 3)
    with pytest.raises(ValueError, match=r"a gain is \[3\]; heads of 4 need \[4\]"):
        qk_norm_rope(qk, 1, gain_k=torch.ones(3))
    for shape in ((1, 2, 1, 4), (2, 1, 1, 4), (1, 1, 1, 3), (1, 1, 1, 6)):
        with pytest.raises(ValueError, match=r"must be \[1 or 1, 1, 1, r\], r even and at most 4"):
            qk_norm_rope(qk, 1, torch.ones(shape), torch.ones(shape))


# ---- what models run


@pytest.mark.parametrize("norm", [RMSNorm(), PartialRMSNorm(), SliceRMSNorm(k=3, which="random"), Hypersphere()])
@pytest.mark.parametrize("qk_norm", [RMSQKNorm(), L2QKNorm()])
def test_a_training_step_of_a_model_runs_these_operations(norm, qk_norm):
    torch.manual_seed(0)
    spec = GPT(
        vocab_size=11, d_model=16, n_layers=2, seq_len=8, norm=norm, position=Rotary(), mlp=SwiGLU(hidden=24),
        attention=Causal(n_heads=2, qk_norm=qk_norm),
    )  # fmt: skip
    model = create(spec).to(DEVICE)
    ids = torch.randint(0, 11, (2, 8), device=DEVICE)
    with record() as ran:
        model(ids, labels=ids).loss.backward()
    own, plain = ("triton", "triton") if CUDA else ("cpu", "reference")
    ran = [r for r in ran if r[0] in ("rms_norm", "qk_norm_rope", "glu")]
    layer = [("rms_norm", own), ("qk_norm_rope", plain), ("rms_norm", own), ("glu", plain)]
    assert [block.sum_then_norm for block in model.blocks] == [isinstance(norm, RMSNorm)] * 2
    assert ran == [*layer, *layer, ("rms_norm", own)]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
