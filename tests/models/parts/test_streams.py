"""Streams: their loss and gradients are the sums over k heads, ids factorise, and training builds no [N, V]."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.families import create, load, preset
from models.loss import Loss, Smoothed
from models.parts.norm import RMSNorm
from models.parts.softmax import StableMax
from models.parts.streams import Streams
from models.spec import ConfigError, build

SIZES = (5, 3, 2)
BASE = dataclasses.replace(preset("tiny"), vocab_size=30, d_model=16, seq_len=32, embedding=Streams(SIZES))
EVERY = [(a, b, c) for c in range(2) for b in range(3) for a in range(5)]  # the streams of id 0, 1, 2, ...
CHANGES = [
    {},
    {"tie_embeddings": False},
    {"head_norm": RMSNorm()},
    {"logit_softcap": 2.0},
    {"output_softmax": StableMax()},
]


def model_of(**changes):
    torch.manual_seed(0)
    model = create(dataclasses.replace(BASE, **changes)).double()
    assert sum(p.numel() for p in model.parameters()) == model.spec.n_parameters()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def heads(model, x):
    """The k heads written out: one matrix each, [.., V_i] logits, each bent on its own."""
    parts = [x @ rows.T for rows in model.head_weight().split(SIZES)]
    if model.spec.logit_softcap is not None:
        return [2.0 * (z / 2.0).tanh() for z in parts]
    if isinstance(model.spec.output_softmax, StableMax):
        return [torch.where(z >= 0, 1 + z, 1 / (1 - z)).log() for z in parts]
    return parts


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_loss_and_gradients_are_the_sums_of_k_cross_entropies(changes, z_loss):
    model = model_of(**changes)
    ids, targets = torch.randint(30, (2, 2, 12)).unbind()
    targets[0, :3] = -100
    loss, nll = Loss(model, z_loss)(ids, targets)
    got = torch.autograd.grad(loss, list(model.parameters()))
    expected, plain = torch.zeros((), dtype=torch.float64), 0.0
    parts = heads(model, model.hidden(ids))
    for b in range(2):
        for t in range(12):
            if targets[b, t] < 0:
                continue
            streams = EVERY[int(targets[b, t])]
            logp = [z[b, t] - z[b, t].exp().sum().log() for z in parts]
            one = -sum(p[s] for p, s in zip(logp, streams, strict=True))
            lse = sum(z[b, t].exp().sum().log() for z in parts)
            expected, plain = expected + one + z_loss * lse**2, plain + one.item()
    torch.testing.assert_close(loss, expected)
    assert nll.item() == pytest.approx(plain)
    assert Loss(model).nlls(ids, targets).sum().item() == pytest.approx(plain)
    for ours, theirs in zip(got, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_each_streams_nll_is_the_cross_entropy_of_its_own_head():
    model = model_of()
    ids, targets = torch.randint(30, (2, 2, 12)).unbind()
    for i, (nll, z) in enumerate(zip(Loss(model).nlls(ids, targets), heads(model, model.hidden(ids)), strict=True)):
        own = torch.tensor([EVERY[int(t)][i] for t in targets.flatten()])
        torch.testing.assert_close(nll, -z.flatten(0, 1).log_softmax(-1)[range(24), own].sum())


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_softmax_over_ids_is_the_product_of_the_streams_softmaxes(changes):
    model = model_of(**changes)
    ids = torch.randint(30, (2, 9))
    p = model(ids).logits.softmax(-1)
    apart = [z.softmax(-1) for z in heads(model, model.hidden(ids))]
    for id_, streams in enumerate(EVERY):
        product = math.prod(q[..., s] for q, s in zip(apart, streams, strict=True))
        torch.testing.assert_close(p[..., id_], product)


def test_an_ids_embedding_is_the_sum_of_its_streams_rows():
    model = model_of()
    a, b, c = model.embedding.rows.split(SIZES)
    expected = torch.stack([a[i] + b[j] + c[k] for i, j, k in EVERY])
    torch.testing.assert_close(model.embedding(torch.arange(30)), expected)
    torch.testing.assert_close(model.get_input_embeddings().weight, expected)
    torch.testing.assert_close(model.get_output_embeddings().weight, expected)  # tied
    with pytest.raises(IndexError):
        model.embedding(torch.tensor([30]))


class Largest(TorchDispatchMode):
    """The most elements that a result of any operation has had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def largest(model, objective=None):
    ids = torch.randint(model.spec.vocab, (2, 16))
    with Largest() as seen:
        loss, _ = Loss(model, 1e-3, objective)(ids, ids)
        loss.backward()
    return seen.elements


def test_training_builds_nothing_as_large_as_ids_times_tokens():
    model = model_of(vocab_size=64**2 * 4, embedding=Streams((64, 64, 4)))
    joint = 32 * 64**2 * 4  # N V; a block's largest tensor is d_model x 128 or N x (64 + 64 + 4)
    assert largest(model) < joint / 50
    assert largest(model, Smoothed(0.1)) >= joint  # an objective of its own is told of whole rows


def test_streams_are_saved_loaded_and_generated_from(tmp_path):
    model = model_of(tie_embeddings=False).eval()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    ids = torch.randint(30, (1, 5))
    torch.testing.assert_close(loaded.double()(ids).logits, model(ids).logits)
    new = model.generate(ids, max_new_tokens=4, do_sample=False)[0, 5:]
    row = ids
    for token in new:  # greedy by the heads apart: the best id has the best token of each stream
        best = [int(z[0, -1].argmax()) for z in heads(model, model.hidden(row))]
        assert EVERY[int(token)] == tuple(best)
        row = torch.cat([row, token.view(1, 1)], 1)


def test_counts_are_of_the_streams_rows():
    spec, table = BASE, dataclasses.replace(BASE, embedding=build(type(BASE), {"embedding": "table"}).embedding)
    assert table.n_parameters() - spec.n_parameters() == (30 - 10) * 16
    untied = dataclasses.replace(spec, tie_embeddings=False)
    assert untied.n_parameters() - spec.n_parameters() == 10 * 16
    assert table.ops(8).multiplies - spec.ops(8).multiplies >= (30 - 10) * 16
    assert create(table).flops_per_token(8) - create(spec).flops_per_token(8) == 6 * (30 - 10) * 16


def test_a_vocabulary_that_is_not_the_product_is_refused():
    with pytest.raises(ConfigError, match="make 5 x 3 x 2 = 30 ids, and vocab_size is 31"):
        dataclasses.replace(BASE, vocab_size=31)


@pytest.mark.parametrize("sizes", [(), (30,), (30, 1)])
def test_one_stream_is_a_table(sizes):
    with pytest.raises(ConfigError, match="two streams or more"):
        Streams(sizes)


def test_resizing_the_vocabulary_of_streams_is_refused():
    with pytest.raises(ConfigError, match="the streams' sizes say how many ids"):
        model_of().resize_token_embeddings(40)
