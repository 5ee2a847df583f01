"""Every registered part and every preset keeps what a family promises; and the suite notices what breaks a promise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from models.check import CHECKS, conformance, stirred, variants
from models.families import create, preset
from models.gpt.config import GPT
from models.gpt.model import GPTForCausalLM
from models.lm import LM
from models.memory import At, Slots
from models.parts.attention import Attention, Causal, CausalAttention
from models.parts.mlp import MLP
from models.parts.norm import Norm
from models.parts.position import Position, Rotary, Rotation
from models.spec import kind_of

VARIANTS = variants()


def maker(spec, cls=None):
    def make() -> LM:
        torch.manual_seed(0)
        model = create(spec)
        if cls is not None:
            model.__class__ = cls
        return model

    return make


@pytest.mark.parametrize("name", VARIANTS)
def test_family_keeps_every_promise(name):
    results = conformance(stirred(maker(VARIANTS[name])))
    assert len(results) == len(CHECKS)
    broken = [f"{r.name}: {r.detail}" for r in results if not r.ok]
    assert not broken, "\n".join(broken)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "nanogpt_char", "window", "dropout"])
def test_compiled_by_inductor_equals_eager(name):
    (result,) = conformance(stirred(maker(VARIANTS[name])), backend="inductor", only="compiled")
    assert result.ok, result.detail


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_bfloat16_memory_errs_no_more_than_a_full_bfloat16_pass(name):
    make = stirred(maker(VARIANTS[name]), 0.1)
    ids = torch.randint(0, 31, (2, 20))
    exact = make().double().eval()(ids).logits
    half = make().to(torch.bfloat16).eval()
    full = half(ids).logits
    out = half(ids[:, :9], use_cache=True)
    parts = [out.logits] + [half(ids[:, t : t + 1], past_key_values=out.past_key_values).logits for t in range(9, 20)]
    error, budget = (torch.cat(parts, 1) - exact).abs().max(), 2 * (full - exact).abs().max() + 1e-5
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"


def test_variants_hold_every_registered_part():
    blocks = [b for spec in VARIANTS.values() for b in spec.blocks()]
    for registry, field in ((Attention, "attention"), (MLP, "mlp"), (Norm, "norm"), (Position, "position")):
        assert {kind_of(getattr(b, field)) for b in blocks} == set(registry.kinds)


# ---- mutants: a model that breaks one promise must be caught by the check of that promise

BASE = dataclasses.replace(preset("tiny"), vocab_size=31, d_model=16, seq_len=32)


class SeesTheFuture(GPTForCausalLM):
    def stack(self, x, at, mem=None, trace=None):
        x = super().stack(x, at, mem, trace)
        return x + 1e-6 * x.roll(-1, 1)


class MeansOverTime(GPTForCausalLM):
    def stack(self, x, at, mem=None, trace=None):
        return super().stack(x, at, mem, trace) + 1e-6 * x.mean(1, keepdim=True)


class PositionsRestart(GPTForCausalLM):
    """Hypersphere GPT's fault: a cached token is rotated as if it stood at 0."""

    def hidden(self, ids, at=None, mem=None, trace=None):
        if mem is not None and at is not None:
            at = at._replace(pos=at.pos - at.pos[:, :1])
        return super().hidden(ids, at, mem, trace)


class PadsShiftPositions(GPTForCausalLM):
    def _door(self, ids, mask, position_ids, seen):
        ids, at, back = super()._door(ids, mask, position_ids, seen)
        return ids, at if back is None else at._replace(pos=at.pos + 1, start=None), back


class ForgetsDocuments(GPTForCausalLM):
    def hidden(self, ids, at=None, mem=None, trace=None):
        return super().hidden(ids, at if at is None else at._replace(doc=None), mem, trace)


class HasDeadWeight(GPTForCausalLM):
    def logits(self, x):
        return self.head(x.detach()) if self.training else self.head(x)


class LeaksBetweenRows(GPTForCausalLM):
    def run(self, ids, at: At, mem: Slots, last=False):
        return super().run(ids, at._replace(rows=at.rows.flip(0)), mem, last)


class DividesByZero(GPTForCausalLM):
    def stack(self, x, at, mem=None, trace=None):
        x = super().stack(x, at, mem, trace)
        return x if at.n is None else x * (at.n / at.n)[:, None, None]


class BreaksTheGraph(GPTForCausalLM):
    def stack(self, x, at, mem=None, trace=None):
        y = super().stack(x, at, mem, trace)
        return y + 1.0 if x.sum() > 1e9 else y


class ForgetsBeams(GPTForCausalLM):
    def memory(self, rows, length=64, dtype=None):
        slots = super().memory(rows, length, dtype)
        slots.reorder_cache = lambda index: None
        return slots


class DropsOnRecomputation(GPTForCausalLM):
    calls = 0

    def apply_block(self, block, x, at, mem, shared):
        DropsOnRecomputation.calls += 1
        x, shared = super().apply_block(block, x, at, mem, shared)
        return (x * (1 + 1e-6) if self.gradient_checkpointing else x), shared


@pytest.mark.parametrize(
    "cls, check",
    [
        (SeesTheFuture, "no_look_ahead"),
        (MeansOverTime, "no_look_ahead"),
        (PositionsRestart, "cached_equals_full"),
        (PositionsRestart, "generate_equals_greedy"),
        (PadsShiftPositions, "padding_is_unseen"),
        (ForgetsDocuments, "documents_are_apart"),
        (HasDeadWeight, "every_parameter_learns"),
        (LeaksBetweenRows, "rows_equal_single"),
        (DividesByZero, "masked_rows_are_finite"),
        (BreaksTheGraph, "compiled_equals_eager"),
        (ForgetsBeams, "beams_equal_uncached"),
        (DropsOnRecomputation, "checkpointing_equals_plain"),
    ],
)
def test_suite_notices_a_broken_model(cls, check):
    spec = dataclasses.replace(BASE, position=preset("nanogpt_char").position) if cls is PadsShiftPositions else BASE
    (result,) = conformance(stirred(maker(spec, cls)), only=check)
    assert not result.ok, f"{cls.__name__} passed {result.name}: {result.detail}"


def test_suite_notices_an_undeclared_tie():
    def make():
        model = maker(dataclasses.replace(BASE, tie_embeddings=False))()
        model.blocks[1].mlp.down.weight = model.blocks[0].mlp.down.weight
        return model

    (result,) = conformance(make, only="ties")
    assert not result.ok


def test_suite_notices_a_parameter_beyond_the_formula():
    def make():
        model = maker(BASE)()
        model.extra = nn.Parameter(torch.zeros(1))
        return model

    (result,) = conformance(make, only="formula")
    assert not result.ok


def test_suite_notices_a_field_without_effect(monkeypatch):
    """A part that ignores one of its options (here the rotary base) is named with the option."""
    monkeypatch.setattr(Rotary, "rotation", lambda self, head_dim: Rotation(head_dim, 10000.0))
    (result,) = conformance(maker(BASE), only="field")
    assert not result.ok and "position.base" in result.detail


def test_suite_notices_a_window_that_is_ignored(monkeypatch):
    original = CausalAttention.__init__

    def ignore(self, spec, block):
        original(self, dataclasses.replace(spec, window=None), block)

    monkeypatch.setattr(CausalAttention, "__init__", ignore)
    spec: GPT = dataclasses.replace(BASE, attention=Causal(n_heads=4, window=3))
    (result,) = conformance(maker(spec), only="field")
    assert not result.ok and "attention.window" in result.detail
