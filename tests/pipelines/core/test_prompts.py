"""Prompts, written out; spans, found by hand; and what a model of a short context is given of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.lib.config import InputError
from pipelines.lib.core.prompts import Span, spans_of, texts_of, windows_of
from pipelines.lib.core.tasks import Task

BOS = 0


def task(kind: str, shots: int = 0, delimiter: str = " ") -> Task:
    return Task("t", Path("t.jsonl"), kind, shots, delimiter, 0.0)


def letters(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text])


def words(text: str) -> np.ndarray:
    """A tokenizer that keeps a space with the word behind it."""
    found, begin = [], 0
    for i, c in enumerate(text):
        if c == " " and i > begin and text[i - 1] != " ":
            found.append(text[begin:i])
            begin = i
    return np.array([1 + hash(w) % 10**6 for w in [*found, text[begin:]]])


def test_prompts_are_written_as_published():
    items = (
        {"query": "Is it? ", "choices": ["yes", "no"], "gold": 1},
        {"query": "Was it?", "choices": ["ja", "nein"], "gold": 0},
    )
    assert texts_of(task("multiple_choice", 1, "\nAnswer: "), items, 1) == [
        "Is it? \nAnswer: no\n\nWas it?\nAnswer: ja",
        "Is it? \nAnswer: no\n\nWas it?\nAnswer: nein",
    ]
    items = (
        {"context_options": ["Ann", "Bo"], "continuation": "ran.", "gold": 1},
        {"context_options": ["A", "B"], "continuation": "sat.", "gold": 0},
    )
    assert texts_of(task("schema", 1), items, 1) == ["Bo ran.\n\nA sat.", "Bo ran.\n\nB sat."]
    items = ({"context": " one two ", "continuation": "three"}, {"context": "a b\n", "continuation": "c d"})
    assert texts_of(task("language_modeling", 1), items, 1) == ["one two three\n\na b", "one two three\n\na b c d"]


def test_choices_are_scored_from_the_first_token_in_which_they_differ():
    spans = spans_of(task("multiple_choice"), ["q: then", "q: this one"], letters, BOS)
    assert [s.start for s in spans] == [6, 6] and spans[0].ids[0] == BOS
    assert bytes(spans[0].ids[6:].tolist()) == b"en" and bytes(spans[1].ids[6:].tolist()) == b"is one"


def test_a_choice_that_begins_another_still_has_a_token_to_score():
    short, long = spans_of(task("multiple_choice"), ["q: a", "q: ab"], letters, BOS)
    assert bytes(short.ids[short.start :].tolist()) == b"a" and bytes(long.ids[long.start :].tolist()) == b"ab"
    same = spans_of(task("multiple_choice"), ["q: a", "q: a"], letters, BOS)
    assert [len(s.ids) - s.start for s in same] == [1, 1]


def test_a_schema_is_scored_over_the_common_end():
    spans = spans_of(task("schema"), ["Anna ran", "Bo a ran"], letters, None)
    assert [bytes(s.ids[s.start :].tolist()) for s in spans] == [b"a ran"] * 2


def test_a_continuation_is_scored_after_the_prompt_s_own_tokens():
    (span,) = spans_of(task("language_modeling"), ["the cat", "the cat sat down"], words, BOS)
    assert span.start == 3 and not span.merged
    assert span.ids[3:].tolist() == words("the cat sat down")[2:].tolist()


def test_a_prompt_whose_last_token_the_answer_changes_is_scored_from_there_and_said():
    (span,) = spans_of(task("language_modeling"), ["the ca", "the cat"], words, BOS)
    assert span.merged and span.start == 2


def test_without_a_token_to_begin_with_the_first_one_is_not_scored():
    spans = spans_of(task("schema"), ["ran", "ran"], letters, None)
    assert [s.start for s in spans] == [1, 1]
    with pytest.raises(InputError, match="nothing to score"):
        spans_of(task("language_modeling"), ["", "x"], letters, None)


def test_long_prompts_lose_their_beginning_and_keep_the_scored_span():
    span = Span(np.arange(100), 90)
    (cut,) = windows_of(span, 40)
    assert cut.ids.tolist() == list(range(60, 100)) and cut.ids[cut.start :].tolist() == list(range(90, 100))
    (whole,) = windows_of(span, 100)
    assert whole.ids.tolist() == span.ids.tolist() and whole.start == 90


@pytest.mark.parametrize(("start", "context"), [(1, 10), (5, 10), (1, 2), (91, 9), (90, 10), (60, 7)])
def test_an_answer_longer_than_the_context_is_scored_once_per_token(start, context):
    scored = []
    for window in windows_of(Span(np.arange(100), start), context):
        assert len(window.ids) <= context and window.start >= min(start, context - max(1, context // 2))
        scored += window.ids[window.start :].tolist()
    assert scored == list(range(start, 100))
