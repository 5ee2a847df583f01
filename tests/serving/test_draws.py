"""What a token was drawn from, as the engine notes it, against a float64 forward pass and plain loops over it."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from serving.engine import Engine, RequestError, SamplingParams
from tests.serving.tiny import byte_level_tokenizer, foreign, gpt

PROMPTS = ["the cat", "Once upon a time there was", "你好"]


@pytest.fixture(scope="module")
def model():
    return gpt()


def exact_logits(model, ids):
    """[T, V] of one sequence, in float64, without memory or batch."""
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        return wide(input_ids=torch.tensor([ids])).logits[0]


def by_hand(logits, params, directions=None, recent=()):
    """q of one step as lists: the rules applied one after another, token by token."""
    x = [float(v) for v in logits]
    if directions is not None:
        n, strength = params.cosine_penalty
        for v in range(len(x)):
            x[v] -= strength * max(float(directions[v] @ directions[t]) for t in recent[-n:])
    before = [math.exp(float(v) / params.temperature) for v in logits]
    heat = [math.exp(v / params.temperature) for v in x]
    p_new, p_old = ([e / sum(w) for e in w] for w in (heat, before))
    kl = sum(a * math.log(a / b) for a, b in zip(p_new, p_old, strict=True))
    order = sorted(range(len(x)), key=lambda v: -heat[v])
    kept = order[: params.top_k] if params.top_k else order
    total, mass, nucleus = sum(heat[v] for v in kept), 0.0, []
    for v in kept:
        if mass < params.top_p:
            nucleus.append(v)
        mass += heat[v] / total
    kept = [v for v in nucleus if heat[v] >= params.min_p * heat[order[0]]]
    total = sum(heat[v] for v in kept)
    return {v: heat[v] / total for v in kept}, kl


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 0.8, "min_p": 0.3, "top_k": 20},
        {"temperature": 0.9, "cosine_penalty": (3, 2.5), "top_k": 40},
    ],
)
def test_draws_equal_a_float64_forward_pass(model, rules):
    tokenizer = byte_level_tokenizer()
    params = SamplingParams(max_tokens=12, seed=3, ignore_eos=True, draws=6, **rules)
    requests = Engine(model, tokenizer, rows=3).complete(PROMPTS, params)
    rows = model.get_input_embeddings().weight.detach().double()
    directions = rows / rows.norm(dim=1, keepdim=True)
    checked = 0
    for request in requests:
        ids = request.prompt + request.tokens
        logits = exact_logits(model, ids)
        assert [d.id for d in request.draws] == request.tokens
        for i, draw in enumerate(request.draws):
            at = len(request.prompt) + i - 1
            row = logits[at].tolist()
            total = math.log(sum(math.exp(v) for v in row))
            p = [math.exp(v - total) for v in row]
            higher = [v for v in range(len(row)) if row[v] > row[draw.id]]
            q, kl = by_hand(logits[at], params, directions if params.cosine_penalty else None, recent=ids[: at + 1])
            assert draw.logit == pytest.approx(row[draw.id], abs=1e-4)
            assert draw.logprob == pytest.approx(row[draw.id] - total, abs=1e-4)
            assert draw.entropy == pytest.approx(-sum(w * math.log(w) for w in p), abs=1e-4)
            assert draw.rank == 1 + len(higher)
            assert draw.above == pytest.approx(sum(p[v] for v in higher), abs=1e-5)
            assert draw.drawn == pytest.approx(q[draw.id], abs=1e-4) and draw.kept == len(q)
            assert draw.kl == pytest.approx(kl, abs=1e-4) and (draw.kl > 1e-3) == bool(params.cosine_penalty)
            best = sorted(range(len(row)), key=lambda v: -row[v])[:6]
            assert [t for t, _, _ in draw.top] == best
            for token, logprob, share in draw.top:
                assert logprob == pytest.approx(math.log(p[token]), abs=1e-4)
                assert share == pytest.approx(q.get(token, 0.0), abs=1e-4)
            checked += 1
    assert checked == 36


def test_draws_change_no_token_and_agree_with_logprobs(model):
    tokenizer = byte_level_tokenizer()
    params = {"max_tokens": 16, "temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}
    plain = Engine(model, tokenizer, rows=3).complete(PROMPTS, SamplingParams(**params))
    seen = Engine(model, tokenizer, rows=3).complete(PROMPTS, SamplingParams(**params, draws=4, logprobs=4))
    for a, b in zip(plain, seen, strict=True):
        assert a.tokens == b.tokens and a.draws == []
        for draw, logprob in zip(b.draws, b.logprobs, strict=True):
            assert (draw.id, draw.logprob) == (logprob.id, logprob.logprob)
            assert [(t, lp) for t, lp, _ in draw.top] == list(logprob.top)


def test_a_greedy_draw_is_one_hot_and_a_row_asks_for_itself(model):
    engine = Engine(model, byte_level_tokenizer(), rows=3)
    params = [SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, draws=n) for n in (3, 0)]
    params.append(SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    first, second, third = engine.complete(PROMPTS, params)
    assert all(d.drawn == 1 and d.kept == 1 and d.rank == 1 and d.above == 0 for d in first.draws)
    assert {len(d.top) for d in first.draws} == {3} and {len(d.top) for d in second.draws} == {0}
    assert third.draws == []


def test_the_cosine_penalty_takes_away_from_tokens_like_the_last_ones(model):
    """A strong one never repeats one of the last N tokens (their cosine is 1, the largest there is)."""
    params = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    engine = Engine(model, byte_level_tokenizer(), rows=1)
    (request,) = engine.complete(["the the the"], SamplingParams(**params, cosine_penalty=(4, 1e4)))
    ids = request.prompt + request.tokens
    for i in range(len(request.prompt), len(ids)):
        assert ids[i] not in ids[i - 4 : i]
    (free,) = engine.complete(["the the the"], SamplingParams(**params))
    (off,) = engine.complete(["the the the"], SamplingParams(**params, cosine_penalty=(4, 0.0)))
    assert off.tokens == free.tokens != request.tokens


def test_rows_that_only_pad_the_embedding_have_no_share_and_foreign_models_are_seen_too():
    model = foreign("gpt2", vocab_size=320)  # the tokenizer has 300
    engine = Engine(model, byte_level_tokenizer(), rows=1)
    (request,) = engine.complete(["the"], SamplingParams(max_tokens=6, seed=1, draws=320, cosine_penalty=(2, 1.0)))
    for draw in request.draws:
        assert sum(math.exp(lp) for _, lp, _ in draw.top) == pytest.approx(1, abs=1e-5)
        assert sum(q for _, _, q in draw.top) == pytest.approx(1, abs=1e-5)
        assert all(q == 0 for token, _, q in draw.top if token >= engine.choosable)


@pytest.mark.parametrize(("setting", "value"), [("cosine_penalty", (0, 1.0)), ("draws", -1)])
def test_impossible_settings_are_named(setting, value):
    with pytest.raises(RequestError, match=setting):
        SamplingParams(**{setting: value})
