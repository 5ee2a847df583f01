"""Latent attention against loops, against DeepSeek's, folded against written out; and the faults of the originals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2Config,
    DeepseekV2RotaryEmbedding,
)

from models.check import CHECKS, stirred
from models.families import create
from models.gpt.config import GPT
from models.memory import At, Slots
from models.parts.mla import MLA, LatentAttention
from models.parts.mlp import Plain
from models.parts.norm import RMSNorm
from models.parts.position import FIRE, ALiBi, Learned, Mixed, NoPosition, Rotary
from models.parts.sink import FixedSink, HeadSink
from tests.models.parts.attending import Call, attended, block_of, mixer_of, prepared, turned
from tests.models.parts.exact import agree


def mla_by_loops(spec, block, turn=None, bias=None):
    """(x, parameters) -> y, a token, head and key at a time."""
    H, h, c, r = spec.sizes(block)
    window = spec.window or 99

    def run(x: Tensor, p: dict[str, Tensor]) -> Tensor:
        p = {name.removeprefix("mixer."): value for name, value in p.items()}

        def times(name, v, first=0, n=None):
            W = p[f"{name}.weight"]
            rows = range(first, first + (len(W) if n is None else n))
            y = torch.stack([(W[i] * v).sum() for i in rows])
            return y + p[f"{name}.bias"][rows.start : rows.stop] if f"{name}.bias" in p else y

        def place(v, t):
            return v if turn is None or not r else turn(v, t)

        out = []
        for row in x:
            T = len(row)
            latents = [times("down", row[t], 0, c) for t in range(T)]
            ropes = [place(times("down", row[t], c, r), t) if r else None for t in range(T)]
            tokens = []
            for t in range(T):
                heads = []
                for i in range(H):
                    q = times("query", row[t], i * (h + r), h)
                    scores, values = [], []
                    for s in range(max(0, t - window + 1), t + 1):
                        score = (q * times("up", latents[s], i * h, h)).sum()
                        if r:
                            score = score + (place(times("query", row[t], i * (h + r) + h, r), t) * ropes[s]).sum()
                        score = score / (h + r) ** 0.5
                        if spec.softcap is not None:
                            score = spec.softcap * torch.tanh(score / spec.softcap)
                        scores.append(score if bias is None else score + bias(i, t, s))
                        values.append(times("up", latents[s], (H + i) * h, h))
                    sink = None
                    if isinstance(spec.sink, FixedSink):
                        sink = spec.sink.score
                    elif isinstance(spec.sink, HeadSink):
                        sink = p["scores.sink.score"][i]
                    heads.append(attended(scores, values, sink))
                tokens.append(times("out", torch.cat(heads)))
            out.append(torch.stack(tokens))
        return torch.stack(out)

    return run


CASES = {
    "default": (MLA(n_heads=2), Rotary(base=20.0)),
    "latent and rope sizes": (MLA(n_heads=2, head_dim=3, latent_dim=5, rope_dim=4), Rotary(base=20.0)),
    "no rope": (MLA(n_heads=2, rope_dim=0, latent_dim=3), Learned()),
    "sink, window": (MLA(n_heads=2, sink=HeadSink(0.4), window=2), Rotary(base=20.0)),
    "softcap, fixed sink": (MLA(n_heads=2, sink=FixedSink(0.5), softcap=0.8), Rotary(base=20.0)),
    "alibi": (MLA(n_heads=2), ALiBi()),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_loops_in_value_and_gradient(name):
    spec, position = CASES[name]
    block = block_of(spec, position, bias=name == "default")
    slopes = (2**-4, 2**-8)
    loop = mla_by_loops(
        spec,
        block,
        turned(20.0) if isinstance(position, Rotary) else None,
        (lambda i, t, s: -slopes[i] * (t - s)) if name == "alibi" else None,
    )
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    agree(Call(mixer_of(block)), loop, x, 1e-10)


def test_is_deepseeks_attention_without_its_norm_of_the_latent():
    H, h, c, r = 3, 4, 5, 4
    config = DeepseekV2Config(
        hidden_size=12,
        num_attention_heads=H,
        num_key_value_heads=H,
        q_lora_rank=None,
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        qk_nope_head_dim=h,
        v_head_dim=h,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        attn_implementation="eager",
    )
    theirs = nn.Module.to(DeepseekV2Attention(config, 0), torch.float64).eval()
    theirs.kv_a_layernorm = nn.Identity()
    ours = mixer_of(block_of(MLA(n_heads=H, head_dim=h, latent_dim=c, rope_dim=r), Rotary(base=50.0), d_model=12))
    halves = torch.tensor([0, 2, 1, 3])  # theirs turns neighbours, ours halves
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
        q = theirs.q_proj.weight.view(H, h + r, 12)
        ours.query.weight.copy_(torch.cat([q[:, :h], q[:, h:][:, halves]], 1).reshape(-1, 12))
        down = theirs.kv_a_proj_with_mqa.weight
        ours.down.weight.copy_(torch.cat([down[:c], down[c:][halves]]))
        up = theirs.kv_b_proj.weight.view(H, 2, h, c)
        ours.up.weight.copy_(up.transpose(0, 1).reshape(-1, c))
        ours.out.weight.copy_(theirs.o_proj.weight)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    mask = torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    turns = DeepseekV2RotaryEmbedding(config)(x, torch.arange(6)[None])
    want = theirs(x, mask, None, turns)[0]
    torch.testing.assert_close(ours(x, prepared(ours, At.full(2, 6)))[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_folded_decoding_equals_the_formula(fused, monkeypatch):
    """Decoding multiplies queries, not all of memory, by W_up; the two ways agree, with every position scheme."""
    used: list[int] = []
    original = LatentAttention.over_latents
    monkeypatch.setattr(LatentAttention, "over_latents", lambda self, *a: used.append(1) or original(self, *a))
    for position in (Rotary(), NoPosition(), Mixed(absolute=NoPosition(), bias=FIRE(width=3))):
        for spec in (MLA(n_heads=2, latent_dim=3), MLA(n_heads=2, latent_dim=3, window=3, sink=HeadSink())):
            mixer = mixer_of(block_of(spec, position))
            mixer.scores.fused = fused
            x = torch.randn(2, 7, 8, dtype=torch.float64)
            full = mixer(x, prepared(mixer, At.full(2, 7)))[0]
            memory = Slots([mixer.memory()], 2, 8, torch.float64)
            with torch.no_grad():
                for start, n in ((0, 4), (4, 1), (5, 2)):
                    at = prepared(mixer, At.full(2, n, start=start), cached=True)
                    y = mixer(x[:, start : start + n], at, memory[0])[0]
                    torch.testing.assert_close(y, full[:, start : start + n], rtol=1e-10, atol=1e-12)
            assert used
            used.clear()


def test_memory_holds_the_latent_and_the_rotary_key_only():
    spec = MLA(n_heads=4, latent_dim=6, rope_dim=2)
    fields = mixer_of(block_of(spec, Rotary(), d_model=16)).memory()
    assert sum(f.shape[-1] for f in fields.values()) == 6 + 2 and all(len(f.shape) == 1 for f in fields.values())
    assert mixer_of(block_of(MLA(n_heads=4), Learned(), d_model=16)).memory().keys() == {"latent"}


def test_its_own_options_are_read():
    """The original never read its latent and rotary sizes."""
    base = MLA(n_heads=2)
    block = block_of(base, Rotary(), d_model=16)
    assert base.sizes(block) == (2, 8, 32, 4)
    for name, value, place in (("latent_dim", 7, 2), ("rope_dim", 6, 3), ("head_dim", 3, 1)):
        spec = dataclasses.replace(base, **{name: value})
        block = block_of(spec, Rotary(), d_model=16)
        assert spec.sizes(block)[place] == value
        assert spec.n_parameters(block) == sum(p.numel() for p in mixer_of(block).parameters())
        assert spec.n_parameters(block) != base.n_parameters(block)


@pytest.mark.parametrize("fused", [True, False])
def test_the_sink_counts_as_it_stands_however_large_the_scores_are(fused):
    """The original added C after the maximum was subtracted, so that it meant C e^max; large scores leave it none."""
    mixer = mixer_of(block_of(MLA(n_heads=1, head_dim=8, rope_dim=0, sink=FixedSink())), stir=0.0)
    mixer.scores.fused = fused
    q = torch.full((1, 1, 1, 8), 10.0, dtype=torch.float64)
    v = torch.ones(1, 1, 1, 8, dtype=torch.float64)
    at = prepared(mixer, At.full(1, 1))
    for k, want in ((q, 1.0), (0 * q, 0.5), (-q, 0.0)):  # scores 283, 0, -283 against l = 0
        torch.testing.assert_close(mixer.scores(q, k, v, at, False), want * v)


@pytest.mark.parametrize(
    "attention, position",
    [
        (MLA.small(), Rotary()),
        (MLA(n_heads=4, latent_dim=5, softcap=3.0, sink=HeadSink(), window=4), FIRE(width=4)),
        (MLA(n_heads=4), Mixed(absolute=Learned(), rotary=Rotary(), bias=ALiBi())),
    ],
    ids=["small", "softcap, sink, window, fire", "all positions"],
)
def test_passes_the_suite(attention, position):
    spec = GPT(
        vocab_size=31,
        d_model=16,
        n_layers=2,
        seq_len=32,
        attention=attention,
        mlp=Plain.small(),
        norm=RMSNorm(),
        position=position,
    )

    def make():
        torch.manual_seed(0)
        return create(spec)

    for check in (
        "cached_equals_full",
        "rows_equal_single",
        "rollback_forgets",
        "padding_is_unseen",
        "no_look_ahead",
        "documents_are_apart",
        "masked_rows_are_finite",
        "every_parameter_learns",
        "parameters_follow_formula",
    ):
        torch.manual_seed(0)
        ok, detail = CHECKS[check](stirred(make))
        assert ok, f"{check}: {detail}"


def test_operations_per_further_key():
    spec = MLA(n_heads=3, head_dim=4, latent_dim=5, rope_dim=2)
    block = block_of(spec, Rotary())
    softmax = spec.softmax
    more = spec.ops(block, 8).multiplies - spec.ops(block, 7).multiplies
    assert more == 3 * (4 + 2 + 4 + 1 + softmax.ops(8).multiplies - softmax.ops(7).multiplies)
    assert spec.ops(block, 1).weight_bits == 16 * sum(a * b for a, b in spec.matrices(block))
