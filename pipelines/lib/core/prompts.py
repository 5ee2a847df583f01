"""An item of a CORE task as texts, and those as token sequences of which a span is scored.

multiple_choice    query + delimiter + choice: a sequence per choice, scored from the first token in which they differ
schema             context + delimiter + continuation: a sequence per context, scored over their common last tokens
language_modeling  context (stripped) + delimiter + continuation: one sequence, scored after the tokens of the prompt

Examples stand before the item, parted by empty lines; one beginning-of-text token stands before all. What is longer
than the model's context loses its beginning: `context` tokens are kept, the scored ones among them (lm-eval keeps one
more, for the last one is not read).   Source: DCLM (arXiv:2406.11794) as nanochat evaluates it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.lib.config import InputError
from pipelines.lib.core.tasks import Task, examples_of

Encode = Callable[[str], np.ndarray]


class Span(NamedTuple):
    """Tokens of which [start:] is scored. merged: the prompt's own tokens are no beginning of them."""

    ids: np.ndarray
    start: int
    merged: bool = False


def texts_of(task: Task, items: tuple[dict[str, Any], ...], index: int) -> list[str]:
    """The texts of an item, one per answer; of a language-modelling item: without and with its continuation."""
    item = items[index]
    before = "".join(f"{solved(task, example)}\n\n" for example in examples_of(task, items, index))
    if task.kind == "multiple_choice":
        return [f"{before}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{before}{context}{task.delimiter}{item['continuation']}" for context in item["context_options"]]
    prompt = f"{before}{item['context'].strip()}{task.delimiter}"
    # A space at the end of a prompt would be a token of its own, which the whole text does not have there.
    return [prompt.strip(), prompt + item["continuation"]]


def solved(task: Task, item: dict[str, Any]) -> str:
    """An item with its right answer, as it stands among the examples."""
    if task.kind == "multiple_choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    if task.kind == "schema":
        return f"{item['context_options'][item['gold']]}{task.delimiter}{item['continuation']}"
    return f"{item['context'].strip()}{task.delimiter}{item['continuation']}"


def spans_of(task: Task, texts: Sequence[str], encode: Encode, prefix: int | None) -> list[Span]:
    """The texts as tokens. encode: text -> ids.  prefix: the beginning-of-text id; None: the tokenizer has none.

    A choice that is the beginning of another one is scored by its last token and the other one from that token on, so
    that each has something to score. Raises InputError for an item that leaves nothing to score.
    """
    head = np.array([] if prefix is None else [prefix], np.int64)
    tokens = [np.concatenate([head, np.asarray(encode(text), np.int64)]) for text in texts]
    least = min(len(t) for t in tokens)
    if task.kind == "multiple_choice":
        spans = [Span(t, min(common(tokens), least - 1)) for t in tokens]
    elif task.kind == "schema":
        tail = common([t[::-1] for t in tokens])
        spans = [Span(t, len(t) - max(1, tail)) for t in tokens]
    else:
        prompt, whole = tokens
        start = common(tokens)
        spans = [Span(whole, min(start, len(whole) - 1), start < len(prompt))]
    # Without a token to begin with, nothing can be said of the first one.
    spans = [span._replace(start=max(1, span.start)) for span in spans]
    if any(span.start >= len(span.ids) for span in spans):
        raise InputError(f"{task.path}: an item of one token and less has nothing to score: {texts[-1]!r:.60}")
    return spans


def common(tokens: Sequence[np.ndarray]) -> int:
    """How many first tokens all sequences share."""
    n = min(len(t) for t in tokens)
    differ = np.zeros(n, bool)
    for t in tokens[1:]:
        differ |= t[:n] != tokens[0][:n]
    return int(np.argmax(differ)) if differ.any() else n


def windows_of(span: Span, context: int) -> list[Span]:
    """A span as what a model of `context` tokens can read: its last tokens; the beginning of the prompt is cut.

    A scored part that is itself longer comes in several windows, each with at least half a context before it, so that
    every token of it is scored.
    """
    end, n = len(span.ids), len(span.ids) - span.start
    if n < context:
        first = max(0, end - context)
        return [Span(span.ids[first:], span.start - first)]
    found, step = [], max(1, context // 2)
    for begin in range(span.start, end, step):
        stop = min(begin + step, end)
        first = max(0, stop - context)
        found.append(Span(span.ids[first:stop], begin - first))
    return found
