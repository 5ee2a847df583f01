"""kernels/attention on all paths: masks at every tile size, options, documents, equal bits, and what runs."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

from kernels.attention import CAPPED, OP, PACKED, SUNK, WINDOWED, attention, attention_reference, choice, spans
from kernels.attention import backward as gpu_backward
from kernels.attention import forward as gpu
from kernels.op import record
from models.families import create
from models.gpt.config import GPT
from models.parts.attention import Causal
from models.parts.position import Rotary
from models.parts.sink import HeadSink
from tests.kernels.judge import arguments, check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = ["triton"] if torch.cuda.is_available() else ["triton", "cpu"]


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def qkv(B, H, K, T, h, dtype=torch.float32, hv=None):
    return (
        draw(B, H, T, h, dtype=dtype),
        draw(B, K, T, h, seed=1, dtype=dtype),
        draw(B, K, T, hv or h, seed=2, dtype=dtype),
    )


# ---- masks: an unmasked second tile of queries on the diagonal once made gradients wrong by half


@pytest.mark.parametrize("m, n", [(16, 32), (32, 16), (64, 16)])
@pytest.mark.parametrize("options", [0, WINDOWED, WINDOWED | PACKED | CAPPED | SUNK])
def test_masks_are_right_at_every_tile_size(m, n, options, monkeypatch):
    for file in (gpu, gpu_backward):
        monkeypatch.setattr(file, "config", lambda *_: gpu.Tile(m, n))
    for T in (1, 63, 65):
        # A token alone has gradients of 0, and errors are judged relative to them: a sink makes them other numbers.
        check(OP, arguments(OP, (1, 1, 1, T, 8, options | (SUNK if T == 1 else 0))), torch.float32, "triton", DEVICE)


@pytest.mark.parametrize("T, options", [(768, PACKED), (1152, 0)])
def test_long_rows_go_through_many_tiles(T, options, monkeypatch):
    for file in (gpu, gpu_backward):
        monkeypatch.setattr(file, "config", lambda *_: gpu.Tile(128, 64))
    for impl in PATHS:
        check(OP, arguments(OP, (1, 1, 1, T, 8, options)), torch.float32, impl, DEVICE)


def test_a_long_document_before_a_short_one_leaves_no_row_without_keys():
    """In the blocks after it, the last queries see none of the first 512 keys that the fused kernel visits at once."""
    q, k, v = (t.cpu().requires_grad_() for t in qkv(1, 1, 1, 700, 8))
    fn = partial(attention, segments=(torch.arange(700) >= 690)[None].long())
    y = fn(q, k, v, impl="cpu")
    torch.testing.assert_close(y, fn(q, k, v, impl="reference"), rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (q, k, v)))


def test_spans_are_the_first_key_and_the_last_query_by_definition():
    segments = torch.tensor([[4, 4, 4, 9, 9, 4, 1], [0, 1, 2, 3, 4, 5, 6], [7, 7, 7, 7, 7, 7, 7]])
    run = [[0, 0, 0, 1, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [0] * 7]  # an id that comes back is a new document
    for window in (None, 1, 2, 5):
        first, last = spans(7, window, segments)
        for b in range(3):
            sees = [[j <= i and run[b][i] == run[b][j] and i - j < (window or 9) for j in range(7)] for i in range(7)]
            assert first[b].tolist() == [row.index(True) for row in sees]
            assert last[b].tolist() == [max(i for i in range(7) if sees[i][j]) for j in range(7)]


@pytest.mark.parametrize("impl", PATHS)
def test_what_is_not_seen_has_gradients_of_exactly_zero(impl):
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, 1, 70, 8))
    segments = (torch.arange(70, device=DEVICE) >= 40).long()[None]
    y = attention(q, k, v, segments=segments, window=20, impl=impl)
    dq, dk, dv = torch.autograd.grad(y[:, :, 65].sum(), (q, k, v))
    for grad, unseen in (
        (dq, [*range(65), *range(66, 70)]),
        (dk, [*range(46), *range(66, 70)]),
        (dv, [*range(46), 69]),
    ):
        assert (grad[:, :, unseen] == 0).all() and not grad.isnan().any()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=5), st.sampled_from([None, 1, 7, 64]))
def test_packed_documents_give_what_each_gives_alone(lengths, window):
    q, k, v = qkv(1, 2, 1, sum(lengths), 4, torch.float64)
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].to(DEVICE)
    packed = attention(q, k, v, segments=segments, window=window)
    parts = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
    alone = [attention_reference(*part, window=window) for part in parts]
    torch.testing.assert_close(packed, torch.cat(alone, 2), rtol=1e-10, atol=1e-12)


# ---- options


OPTIONS = {
    "scale": 0.7,
    "window": 5,
    "softcap": 0.5,
    "sink": 0.0,
    "qk_norm": "rms",
    "eps": 0.5,
    "gain_q": torch.tensor(2.0),
    "gain_k": torch.linspace(0.5, 2, 8),
    "segments": torch.tensor([[0] * 9 + [1] * 11]),
}


@pytest.mark.parametrize("impl", [*PATHS, "sdpa", "reference"])
def test_every_option_changes_the_result_and_means_the_same_on_every_path(impl):
    q, k, v = qkv(1, 2, 2, 20, 8)
    angle = torch.arange(20)[:, None] * torch.tensor([1.0, 0.1])
    cases = [{name: value} for name, value in OPTIONS.items() if name != "eps"]
    cases += [{"qk_norm": "rms", "eps": 0.5}, {"qk_norm": "l2", "eps": 0.5}, {"cos": angle.cos(), "sin": angle.sin()}]
    cases += [{"sink": torch.tensor([1.0, -1.0])}, {"cos": angle.cos()[None], "sin": angle.sin()[None], "window": 3}]
    found = [attention_reference(q, k, v)]
    for case in cases:
        case = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in case.items()}
        if impl == "sdpa" and "softcap" in case:
            with pytest.raises(ValueError, match="no soft-cap"):
                attention(q, k, v, **case, impl=impl)
            continue
        y = attention(q, k, v, **case, impl=impl)
        torch.testing.assert_close(y, attention_reference(q, k, v, **case), rtol=1e-4, atol=1e-5)
        assert all((y - other).abs().max() > 1e-3 for other in found), case
        found.append(y)


@pytest.mark.parametrize("impl", PATHS)
def test_a_window_of_the_whole_row_is_no_window(impl):
    q, k, v = qkv(1, 2, 1, 30, 8)
    assert torch.equal(attention(q, k, v, window=30, impl=impl), attention(q, k, v, impl=impl))


@pytest.mark.parametrize("impl", PATHS)
def test_sinks_are_those_of_gpt_oss_and_soft_caps_those_of_gemma2(impl):
    q, k, v = qkv(2, 4, 2, 33, 8)
    mask = torch.full((33, 33), -torch.inf, device=DEVICE).triu(1)[None, None]
    sink = draw(4, seed=5)
    oss = SimpleNamespace(num_key_value_groups=2, sinks=sink, training=False)
    want = gpt_oss_attention(oss, q, k, v, mask, 0.5)[0].transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v, scale=0.5, sink=sink, impl=impl), want, rtol=1e-4, atol=1e-5)
    gemma = SimpleNamespace(num_key_value_groups=2, training=False)
    want = gemma2_attention(gemma, q, k, v, mask, scaling=2.0, softcap=1.3)[0].transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v, scale=2.0, softcap=1.3, impl=impl), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cap", [0.5, 50.0])
def test_large_soft_caps_do_not_magnify_the_rounding_of_small_tanhs(cap):
    q, k, v = qkv(1, 2, 2, 33, 8, torch.float64)
    exact = attention_reference(q, k, v, softcap=cap)
    plain = attention_reference(q.float(), k.float(), v.float(), softcap=cap)
    ours = attention(q.float(), k.float(), v.float(), softcap=cap, impl="triton")
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6


# ---- memory and bits


def test_the_log_sum_exp_is_in_float32_and_the_same_bits_whatever_else_is_in_the_batch():
    q, k, v = qkv(3, 2, 1, 70, 8, torch.float16)
    y, lse = gpu.forward(q, k, v, None, None, 0.3, None, None)
    again, same = gpu.forward(q, k, v, None, None, 0.3, None, None)
    assert lse.dtype == torch.float32 and torch.equal(lse, same) and torch.equal(y, again)
    alone, single = gpu.forward(q[1:2], k[1:2], v[1:2], None, None, 0.3, None, None)
    assert torch.equal(single, lse[1:2]) and torch.equal(alone, y[1:2])
    scores = (q.double() @ k.double().mT * 0.3).masked_fill(
        ~torch.ones(70, 70, device=DEVICE).tril().bool(), -torch.inf
    )
    torch.testing.assert_close(lse.double() * torch.tensor(2.0).log(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", PATHS)
def test_rows_further_apart_than_32_bits_count_are_read_right(impl):
    q, k, v = qkv(1, 1, 1, 3, 16)
    far = torch.empty_strided((1, 1, 3, 16), (1, 1, 2**31 + 8, 1), dtype=torch.float16, device="meta")
    if DEVICE == "cpu":  # lazily mapped: only the pages of three rows are touched
        far = torch.empty_strided(far.shape, far.stride(), dtype=torch.float16)
    else:
        pytest.skip("12 GiB of GPU memory for three rows")
    far.copy_(k)
    y = attention(q.half(), far, v.half(), impl=impl)
    assert torch.equal(y, attention(q.half(), k.half(), v.half(), impl=impl))


def test_wide_gaps_between_tokens_are_copied_and_narrow_ones_are_not():
    x = torch.empty(1, 4, 8, 16).transpose(1, 2)
    assert gpu.rows_first(x) is x
    far = torch.empty_strided((1, 1, 2, 4), (1, 1, 2**23, 1))
    assert gpu.rows_first(far) is not far and gpu.rows_first(x.mT).stride(-1) == 1


# ---- autograd, autocast, refusals


@pytest.mark.parametrize("impl", PATHS)
def test_a_second_derivative_raises_and_is_not_wrong(impl):
    q, k, v = (t.requires_grad_() for t in qkv(1, 1, 1, 5, 8))
    (dq,) = torch.autograd.grad(attention(q, k, v, impl=impl).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        dq.sum().backward()


@pytest.mark.parametrize("impl", [*PATHS, "sdpa", "reference"])
def test_autocast_casts_as_pytorchs_own_attention_does(impl):
    q, k, v = qkv(1, 2, 2, 9, 8)
    dtype = torch.float16 if impl == "triton" else torch.bfloat16  # the interpreter cuts bfloat16 off
    with torch.autocast(DEVICE, dtype):
        y = attention(q, k, v, sink=0.0, impl=impl)
    assert y.dtype == dtype
    torch.testing.assert_close(y, attention(*(t.to(dtype) for t in (q, k, v)), sink=0.0, impl=impl), rtol=0, atol=0)


def test_what_does_not_fit_is_refused_by_name():
    q, k, v = qkv(1, 2, 2, 9, 8)
    refused = [
        (r"takes \[B, heads, T, size\], not 3, 3 and 3", (q[0], k[0], v[0]), {}),
        ("differ in more than heads", (q, k[:, :, :5], v), {}),
        ("qk_norm='max' does not exist; None, 'rms' and 'l2' do", (q, k, v), {"qk_norm": "max"}),
        ("cos and sin come together", (q, k, v), {"cos": torch.ones(9, 4)}),
        (r"a gain has shape \(\) or \(8,\), not \(3,\)", (q, k, v), {"gain_q": torch.ones(3)}),
        ("window=0 must be at least 1", (q, k, v), {"window": 0}),
        ("softcap=0 must be above 0", (q, k, v), {"softcap": 0}),
        (r"segments have shape \(1, 4\), expected \(1, 9\)", (q, k, v), {"segments": torch.zeros(1, 4)}),
        ("impl='fast' does not exist", (q, k, v), {"impl": "fast"}),
    ]
    for match, tensors, options in refused:
        with pytest.raises(ValueError, match=match):
            attention(*tensors, **options)
    with pytest.raises(
        ValueError, match=r"takes heads of up to 128 in float32, float16 or bfloat16, not 8 in torch\.float64"
    ):
        attention(q.double(), k.double(), v.double(), impl="triton")


# ---- which path


def test_the_path_is_the_fastest_measured_one():
    for row in choice.ROWS:
        if row.device != "cpu":
            continue
        args = {"window": 1} if row.feature == "window" else {"softcap": 1.0} if row.feature == "softcap" else {}
        q = torch.empty(1, 1, row.T, row.size, dtype=getattr(torch, row.dtype))
        options = (args.get("window"), args.get("softcap"), row.feature == "sink", row.feature == "segments")
        assert choice.choice(q, q, *options) == row.best
        near = {path: ms for path, ms in row.ms.items() if ms <= choice.MARGIN * min(row.ms.values())}
        assert row.best in near and ("sdpa" not in near or row.best == "sdpa")


def test_an_unmeasured_gpu_follows_the_rule(monkeypatch):
    monkeypatch.setattr(choice, "gpu_name", lambda: "a GPU that nobody measured")

    def path(size=64, dtype=torch.bfloat16, window=None, softcap=None, sink=False, segments=False):
        q = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=dtype, shape=(1, 1, 1024, size))
        return choice.choice(q, q, window, softcap, sink, segments)

    monkeypatch.setattr(choice, "triton", object())
    assert path() == "sdpa"
    assert path(window=9) == path(softcap=1.0) == path(sink=True) == path(segments=True) == "triton"
    assert path(size=192, window=9) == path(dtype=torch.float64, window=9) == "sdpa"
    assert path(size=192, softcap=1.0) == "reference"
    monkeypatch.setattr(choice, "triton", None)
    assert path(window=9) == "sdpa"


@pytest.mark.skipif(DEVICE == "cuda", reason="says which path a processor takes")
@pytest.mark.parametrize(
    "attend, seq_len, path",
    [
        (Causal(n_heads=2), 64, "sdpa"),
        (Causal(n_heads=2, window=128, n_kv_heads=1), 1024, "cpu"),
        (Causal(n_heads=2, sink=HeadSink()), 1024, "cpu"),
        (Causal(n_heads=2, softcap=30.0), 1024, "cpu"),
    ],
)
def test_a_training_step_of_a_model_runs_this_operation(attend, seq_len, path, monkeypatch):
    model = create(GPT(vocab_size=11, d_model=16, n_layers=2, seq_len=seq_len, attention=attend, position=Rotary()))
    original, dims = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *more, **k: dims.append(q.dim()) or original(q, *more, **k)
    )
    with record() as ran:
        model(torch.zeros(1, seq_len, dtype=torch.long)).logits.sum().backward()
    assert [step for step in ran if step[0] == "attention"] == [("attention", path)] * 2
    assert set(dims) <= {4}, "three dimensions fall to PyTorch's unfused form"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_packed_training_and_whole_prompts_build_no_mask_over_all_pairs():
    from models.memory import At
    from models.parts.attend import what_is_seen

    doc = torch.tensor([[0, 0, 1, 1]])
    at = At(torch.tensor([[0, 1, 0, 1]]), upto=4, doc=doc)
    for seen in (what_is_seen(at, 4, False, 2), what_is_seen(At.full(1, 4), 4, True, 2)):
        assert seen.mask is None and seen.causal and seen.window == 2
    assert what_is_seen(at, 4, False, None).doc is doc


# ---- what is compiled


def test_every_tile_that_can_be_chosen_is_compiled():
    built = {(b.constants["BLOCK_M"], b.constants["BLOCK_N"], b.num_warps, b.num_stages, b.kernel.__name__) for b in
             OP.builds() if "BLOCK_M" in b.constants}  # fmt: skip
    names = {"forward": "_attend", "keys": "_attend_dkdv", "queries": "_attend_dq"}
    for kernel, name in names.items():
        for h in (1, 20, 64, 100, 128):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for plain in (True, False):
                    tile = gpu.config(kernel, gpu.padded(h, h), dtype, plain)
                    assert tile == gpu.config(kernel, gpu.padded(h, h), dtype, plain)
                    assert (tile.m, tile.n, tile.warps, tile.stages, name) in built


def test_heads_of_a_module_need_no_gradient_for_all_inputs():
    """A frozen layer before attention: only what asks for a gradient gets one."""
    q, k, v = qkv(1, 2, 1, 9, 8)
    weight = nn.Parameter(torch.ones(8, device=DEVICE))
    for impl in PATHS:
        attention(q * weight, k, v, impl=impl).sum().backward()
        assert weight.grad.isfinite().all() and k.grad is None
        weight.grad = None
