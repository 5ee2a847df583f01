"""The selective scan against loops in float64, and against transformers' Mamba."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from models.families import create
from models.gpt.config import GPT
from models.memory import At, Mem
from models.parts.attention import Causal
from models.parts.position import NoPosition, Rotary
from models.parts.ssm import SSM, SelectiveScan
from models.spec import ConfigError


def mixer(d=6, dtype=torch.float64, seed=0, **options) -> tuple[SelectiveScan, object]:
    spec = GPT(vocab_size=5, d_model=d, n_layers=1, seq_len=32, attention=SSM(**options), position=NoPosition())
    block = spec.blocks()[0]
    module = nn.Module.to(block.attention.build(block), dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module, block


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def silu(x):
    return x / (1 + math.exp(-x))


def by_loops(m: SelectiveScan, x: torch.Tensor, doc=None) -> torch.Tensor:
    """The spec's formulas for one row x [T, D], one number at a time; tensors only so that autograd can follow."""
    T, C, N, R, k = x.shape[0], m.C, m.N, m.R, m.k

    def linear(layer, v):
        y = layer.weight @ v
        return y if layer.bias is None else y + layer.bias

    def rms(v, norm):
        return v / ((v * v).sum() / len(v) + 1e-6).sqrt() * norm.weight

    inputs = [linear(m.into, x[t]) for t in range(T)]
    state = [[x.new_zeros(()) for _ in range(N)] for _ in range(C)]
    rows = []
    for t in range(T):
        if doc is not None and t > 0 and doc[t] != doc[t - 1]:
            state = [[x.new_zeros(()) for _ in range(N)] for _ in range(C)]
        u = []
        for c in range(C):
            total = m.conv_bias[c] if m.conv_bias is not None else x.new_zeros(())
            for i in range(k):
                if t - i >= 0 and (doc is None or doc[t - i] == doc[t]):
                    total = total + m.conv[c, k - 1 - i] * inputs[t - i][c]
            u.append(total * torch.sigmoid(total))
        selected = linear(m.select, torch.stack(u))
        r, b, c_ = (rms(v, norm) for v, norm in zip(selected.split((R, N, N)), m.norms, strict=True))
        step = linear(m.step, r)
        y = []
        for c in range(C):
            s = torch.log1p(step[c].exp())
            for n in range(N):
                state[c][n] = torch.exp(s * -m.A_log[c, n].exp()) * state[c][n] + s * b[n] * u[c]
            total = sum(c_[n] * state[c][n] for n in range(N)) + m.D[c] * u[c]
            z = inputs[t][C + c]
            y.append(total * z * torch.sigmoid(z))
        rows.append(linear(m.out, rms(torch.stack(y), m.norm)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [{"dt_rank": 2, "state": 3}, {"dt_rank": 1, "state": 1, "expand": 1, "conv": 1, "bias": True}, {"conv": 4}],
)
def test_value_and_gradients_equal_loops_in_float64(options):
    m, _ = mixer(d=3, **options)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    ours = m(x[None], At.full(1, 5))[0][0]
    want = by_loops(m, x)
    torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad((ours * weight).sum(), leaves)
    for g, w in zip(got, torch.autograd.grad((want * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


def test_scan_and_convolution_stop_at_a_document():
    m, _ = mixer(d=3, dt_rank=2, state=2, conv=4)
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    doc = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 2, 2, 2, 3]])
    got = m(x, At(torch.zeros(2, 7, dtype=torch.long), upto=7, doc=doc))[0]
    for row in range(2):
        torch.testing.assert_close(got[row], by_loops(m, x[row], doc[row].tolist()), rtol=1e-12, atol=1e-12)


def test_a_model_without_norms_equals_transformers_mamba():
    """Its slow path with a gain that undoes our last norm: norms on step, B and C are the identity in both."""
    d, N, R, k = 8, 5, 3, 4
    theirs = (
        MambaMixer(
            MambaConfig(hidden_size=d, state_size=N, conv_kernel=k, expand=2, time_step_rank=R, use_bias=True),
            layer_idx=0,
        )
        .double()
        .eval()
    )
    m, _ = mixer(d=d, expand=2, conv=k, dt_rank=R, state=N, bias=True)
    m.norms = nn.ModuleList(nn.Identity() for _ in range(3))
    m.norm = nn.Identity()
    with torch.no_grad():
        theirs.in_proj.weight.copy_(m.into.weight), theirs.in_proj.bias.copy_(m.into.bias)
        theirs.conv1d.weight.copy_(m.conv[:, None]), theirs.conv1d.bias.copy_(m.conv_bias)
        theirs.x_proj.weight.copy_(m.select.weight)
        theirs.dt_proj.weight.copy_(m.step.weight), theirs.dt_proj.bias.copy_(m.step.bias)
        theirs.A_log.copy_(m.A_log), theirs.D.copy_(m.D)
        theirs.out_proj.weight.copy_(m.out.weight), theirs.out_proj.bias.copy_(m.out.bias)
    x = torch.randn(2, 9, d, dtype=torch.float64)
    # transformers 5 computes parts of its scan in float32, whatever the input is.
    torch.testing.assert_close(m(x, At.full(2, 9))[0], theirs(x), rtol=1e-4, atol=1e-6)


def test_pads_leave_state_and_convolution_where_they_were():
    m, _ = mixer(d=4, dt_rank=2, state=2)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    n = torch.tensor([4, 1])
    padded, alone = (Mem(m.memory(), rows, 8, torch.float64, "cpu") for rows in (2, 1))
    pos = torch.arange(6).expand(2, 6)
    m(x, At(pos, n, upto=6), padded)
    for row in range(2):
        alone.tensors = {name: torch.zeros_like(t) for name, t in alone.tensors.items()}
        m(x[row : row + 1, : n[row]], At.full(1, int(n[row])), alone)
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(padded.tensors[name][row], tensor[0], rtol=1e-12, atol=1e-12)


def test_states_are_kept_in_float32_under_a_bfloat16_model():
    m, _ = mixer(d=4)
    mem = Mem(m.memory(), 1, 4, torch.bfloat16, "cpu")
    assert {t.dtype for t in mem.tensors.values()} == {torch.float32}


def test_bfloat16_decoding_stays_near_the_full_pass_over_many_steps():
    """A state rounded to bfloat16 at every token would drift; kept in float32 it does not."""
    m, _ = mixer(d=8, state=4, dt_rank=2)
    x = torch.randn(1, 300, 8, dtype=torch.float64)
    exact = m(x, At.full(1, 300))[0]
    half = nn.Module.to(m, torch.bfloat16)
    x = x.to(torch.bfloat16)
    full = half(x, At.full(1, 300))[0]
    mem = Mem(half.memory(), 1, 1, torch.bfloat16, "cpu")
    steps = torch.cat([half(x[:, t : t + 1], At.full(1, 1, start=t), mem)[0] for t in range(300)], 1)
    assert (steps.double() - exact).abs().max() <= 1.5 * (full.double() - exact).abs().max()


def test_starts_as_mamba_does():
    spec = GPT(vocab_size=5, d_model=8, n_layers=1, seq_len=8, attention=SSM(), position=NoPosition())
    m = create(spec).blocks[0].mixer
    torch.testing.assert_close(m.A_log.exp(), torch.arange(1.0, 17.0).expand(16, 16))
    steps = torch.nn.functional.softplus(m.step.bias.double())
    torch.testing.assert_close(steps[[0, -1]], torch.tensor([1e-3, 1e-1], dtype=torch.float64), rtol=1e-4, atol=0)
    assert (steps.diff() > 0).all() and m.D.eq(1).all() and m.conv.abs().max() <= 3**-0.5 and m.conv.std() > 0.2


@pytest.mark.parametrize("options", [{}, {"bias": True, "conv": 1}, {"expand": 3, "dt_rank": 2, "state": 5, "conv": 4}])
def test_parameters_and_memory_follow_their_formulas(options):
    m, block = mixer(d=8, **options)
    assert sum(p.numel() for p in m.parameters()) == block.attention.n_parameters(block)
    assert ("u" in m.memory()) == (m.k > 1)
    matrices = sum(p.numel() for p in m.parameters() if p.dim() == 2)
    # All multiply-accumulates but the recurrence's and the norms' are in matrices.
    ops = block.attention.ops(block, 32)
    assert matrices - m.A_log.numel() < ops.multiplies < matrices + 4 * m.C * m.N + 10 * m.C + 3 * (m.R + 2 * m.N)
    assert m.flops_per_token(32) == m.flops_per_token(1) == 5 * m.C * m.N


def test_refuses_what_has_no_effect_or_no_meaning():
    base = {"vocab_size": 5, "d_model": 8, "n_layers": 1}
    with pytest.raises(ConfigError, match="turns queries and keys"):
        GPT(**base, attention=SSM(), position=Rotary())
    for option in ("expand", "conv", "dt_rank", "state"):
        with pytest.raises(ConfigError, match=f"{option}=0 must be at least 1"):
            GPT(**base, attention=SSM(**{option: 0}), position=NoPosition())
    hybrid = GPT(**{**base, "n_layers": 2}, attention=(SSM(), Causal(n_heads=2)), position=(NoPosition(), Rotary()))
    assert hybrid.n_parameters() > 0
