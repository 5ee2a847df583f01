"""Scores against a float64 loop over single tokens, and the judgement of whole tasks against one written here."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from models.families import load
from pipelines.lib.config import InputError
from pipelines.lib.core.prompts import Span
from pipelines.lib.core.scorer import batches_of, judge, rows_of, score_spans
from pipelines.lib.core.tasks import open_bundle, read_items
from pipelines.lib.core.workers import open_reader
from tests.pipelines.core.bundle import CONTEXT, save_llama, save_model, write_bundle


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("scorer")
    return {"ours": save_model(tmp / "ours"), "llama": save_llama(tmp / "llama"), "bundle": write_bundle(tmp / "b")}


@functools.cache
def exact(folder):
    return load(folder, torch.float64)


@functools.cache
def by_hand(folder, ids: tuple[int, ...], start: int) -> tuple[float, bool]:
    """Log-likelihood of ids[start:], one token at a time in float64, and whether each is the first choice."""
    total, greedy = 0.0, True
    with torch.no_grad():
        logits = exact(folder)(torch.tensor([ids[:-1]])).logits[0]
    for t in range(start, len(ids)):
        total += float(logits[t - 1].log_softmax(-1)[ids[t]])
        greedy &= int(logits[t - 1].argmax()) == ids[t]
    return total, greedy


def random_spans(n: int, longest: int) -> list[Span]:
    draw = np.random.default_rng(1)
    spans = []
    for _ in range(n):
        length = int(draw.integers(2, longest))
        spans.append(Span(draw.integers(0, 256, length), int(draw.integers(1, length))))
    return spans


@pytest.mark.parametrize("kind", ["ours", "llama"])
@pytest.mark.parametrize("batch_tokens", [1, 200, 10_000])
def test_scores_equal_a_float64_loop_whatever_is_computed_together(folders, kind, batch_tokens):
    spans = random_spans(30, CONTEXT)
    found = score_spans(load(folders[kind]).eval(), spans, CONTEXT, batch_tokens)
    for span, score in zip(spans, found, strict=True):
        total, greedy = by_hand(folders[kind], tuple(span.ids.tolist()), span.start)
        assert score.loglikelihood == pytest.approx(total, rel=1e-5, abs=1e-5)
        assert score.tokens == len(span.ids) - span.start and score.greedy == greedy


def test_a_greedy_continuation_is_known_as_one(folders):
    model = load(folders["ours"]).eval()
    ids = [256, 5, 6]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    right = Span(np.array(ids), 3)
    wrong = Span(np.array([*ids[:-1], (ids[-1] + 1) % 257]), 3)
    assert [s.greedy for s in score_spans(model, [right, wrong], CONTEXT)] == [True, False]


def test_answers_longer_than_the_context_are_scored_whole(folders):
    draw = np.random.default_rng(2)
    span = Span(draw.integers(0, 256, 3 * CONTEXT), 5)
    (score,) = score_spans(load(folders["ours"]).eval(), [span], CONTEXT)
    total, step = 0.0, CONTEXT // 2
    for begin in range(5, 3 * CONTEXT, step):
        end = min(begin + step, 3 * CONTEXT)
        first = max(0, end - CONTEXT)
        total += by_hand(folders["ours"], tuple(span.ids[first:end].tolist()), begin - first)[0]
    assert score.loglikelihood == pytest.approx(total, rel=1e-5) and score.tokens == 3 * CONTEXT - 5


def test_choices_that_differ_in_their_last_token_are_one_row_and_rows_go_by_length():
    prompt = np.arange(40)
    spans = [Span(np.append(prompt, letter), 40) for letter in (65, 66, 67)]
    spans += [Span(np.arange(n), n - 2) for n in (50, 10, 12, 48)]
    rows = rows_of(spans, 64)
    assert len(rows) == 5 and sorted(len(row.targets) for row in rows) == [1, 1, 1, 1, 3]
    assert [len(row.ids) for row in rows] == [49, 47, 40, 11, 9]
    batches = list(batches_of(rows, 100, 1 << 30))
    assert [[len(row.ids) for row in batch] for batch in batches] == [[49, 47], [40, 11], [9]]
    assert [len(batch) for batch in batches_of(rows, 10**9, 8)] == [2, 1, 2]  # at most 8 positions from the earliest on


def test_many_items_take_few_forward_passes(folders):
    model = load(folders["ours"]).eval()
    rows: list[int] = []
    original = model.hidden
    model.hidden = lambda ids, *more: (rows.append(len(ids)), original(ids, *more))[1]
    score_spans(model, random_spans(64, CONTEXT), CONTEXT)
    assert sum(rows) == 64 and len(rows) <= 3


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_tasks_are_judged_as_by_hand(folders, kind):
    """Prompts and spans written out here, scores from the float64 loop, the winner by mean log-likelihood."""
    folder = folders[kind]
    encode, prefix = open_reader(folder)
    assert prefix == 256
    model = load(folder).eval()
    cut = 0
    for task in open_bundle(folders["bundle"]):
        items, expected = read_items(task), []
        for i, item in enumerate(items):
            sequences = texts_by_hand(task.label, items, i)
            means = []
            for text, n in sequences:
                ids = [256, *text.encode()][-CONTEXT:]
                total, greedy = by_hand(folder, tuple(ids), len(ids) - n)
                means.append(total / n)
            cut += len(sequences[0][0].encode()) + 1 > CONTEXT
            expected.append(greedy if len(sequences) == 1 else int(np.argmax(means)) == item["gold"])
        found = judge(model, encode, prefix, task, range(len(items)), CONTEXT)
        assert list(found.correct) == expected, task.label
        assert found.long == found.merged == 0
        some = judge(model, encode, prefix, task, range(3, 9), CONTEXT, batch_tokens=150)
        assert list(some.correct) == expected[3:9]
    assert cut > 0


def texts_by_hand(label, items, i):
    """(text, bytes scored at its end) of each answer of an item, for the tasks of tests.pipelines.core.bundle."""
    import random

    item = items[i]
    others = [k for k in range(len(items)) if k != i]
    draw = lambda n: [items[k] for k in random.Random(1234 + i).sample(others, n)]
    if label == "letters":
        before = "".join(f"{e['query']} {'ABC'[e['gold']]}\n\n" for e in draw(2))
        return [(f"{before}{item['query']} {letter}", 1) for letter in "ABC"]
    if label == "stories":
        choices = [c.encode() for c in item["choices"]]
        same = 0
        while same < min(map(len, choices)) - 1 and len({c[: same + 1] for c in choices}) == 1:
            same += 1
        return [(f"{item['query']}\nAnswer: {c.decode()}", len(c) - same) for c in choices]
    if label == "who":
        first, second = (f"{c} {item['continuation']}".encode() for c in item["context_options"])
        same = next(k for k in range(1, 200) if first[-k - 1] != second[-k - 1])
        return [(first.decode(), same), (second.decode(), same)]
    before = "".join(f"{e['context'].strip()} {e['continuation']}\n\n" for e in (draw(1) if "again" in label else []))
    answer = f" {item['continuation']}"
    return [(f"{before}{item['context'].strip()}{answer}", len(answer.encode()))]


def test_a_model_that_is_not_the_tokenizer_s_and_one_that_gives_nothing_are_said(folders):
    model = load(folders["ours"]).eval()
    with pytest.raises(InputError, match="id 257, but the model has 257"):
        score_spans(model, [Span(np.array([1, 257]), 1)], CONTEXT)
    with torch.no_grad():
        model.embedding.weight[5] = float("nan")
    with pytest.raises(InputError, match="no finite likelihood"):
        score_spans(model, [Span(np.array([5, 6]), 1)], CONTEXT)
