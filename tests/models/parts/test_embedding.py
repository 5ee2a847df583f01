"""Factored and scaled embeddings: the matrices they stand for, their counts, and what they refuse."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from models.families import create, preset
from models.parts.embedding import Factored, Table
from models.spec import ConfigError

BASE = dataclasses.replace(preset("tiny"), vocab_size=31, d_model=16, seq_len=32)


def model_of(**changes):
    torch.manual_seed(0)
    model = create(dataclasses.replace(BASE, **changes))
    assert sum(p.numel() for p in model.parameters()) == model.spec.n_parameters()
    return model.double().eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_factored_model_is_the_full_one_with_the_multiplied_matrices(tied, tie_embeddings):
    small = model_of(embedding=Factored(rank=5, tied=tied, scale=2.0), tie_embeddings=tie_embeddings)
    full = model_of(tie_embeddings=False)
    state = {k: v for k, v in small.state_dict().items() if k in full.state_dict()}
    up = small.widen.up.weight
    down = up.T if tied else small.narrow.weight
    state["embedding.weight"] = 2.0 * small.embedding.weight @ up.T
    state["head.weight"] = small.head.weight @ down
    full.load_state_dict(state)
    ids = torch.arange(12)[None] % 31
    torch.testing.assert_close(small(ids).logits, full(ids).logits)


def test_scales():
    ids = torch.arange(12)[None] % 31
    for scale, factor in (("sqrt", math.sqrt(16)), ("learned", math.sqrt(16)), (3.0, 3.0)):
        model = model_of(embedding=Table(scale=scale))
        trace: list[torch.Tensor] = []
        model.hidden(ids, trace=trace)
        torch.testing.assert_close(trace[0], factor * model.embedding(ids))
    assert [n for n, _ in model_of(embedding=Table(scale="learned")).named_parameters() if "widen" in n] == [
        "widen.scale"
    ]


def test_resizing_the_vocabulary_keeps_a_factored_model_whole():
    model = model_of(embedding=Factored(rank=5))
    model.resize_token_embeddings(40)
    assert model.spec.vocab == 40 and model(torch.tensor([[39]])).logits.shape == (1, 1, 40)
    assert sum(p.numel() for p in model.parameters()) == model.spec.n_parameters()


@pytest.mark.parametrize(
    "embedding, words",
    [
        (lambda: Factored(rank=16), "embedding=factored: rank=16 is not below d_model=16"),
        (lambda: Factored(rank=0), "rank=0 must be at least 1"),
        (lambda: Table(scale=-1.0), "scale=-1.0 must be a number above 0"),
    ],
)
def test_what_an_embedding_refuses(embedding, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(BASE, embedding=embedding())
