"""Log-likelihoods of many spans at once, batched by length; and the items of a CORE task judged by them.

Rows of similar length are computed together, padded on the right, where no token that is scored can see it. Choices
that differ in their last token only (A, B, C, D) read the same tokens, so they are one row with several targets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pipelines.lib.config import InputError
from pipelines.lib.core.prompts import Encode, Span, spans_of, texts_of, windows_of
from pipelines.lib.core.tasks import Task, read_items
from pipelines.lib.scoring import LOGITS_AT_ONCE, kept_logits

BATCH_TOKENS = {"cpu": 1 << 12, "other": 1 << 16}
ROWS_AT_ONCE = 512


class Score(NamedTuple):
    """Of a span: its log-likelihood in nats, its tokens, whether each is the model's first choice."""

    loglikelihood: float
    tokens: int
    greedy: bool


@dataclass
class Row:
    """Tokens that are read, [T], of which the last n positions are scored. targets: (owner, [n]) each."""

    ids: np.ndarray
    n: int
    targets: list[tuple[int, np.ndarray]] = field(default_factory=list)


def rows_of(spans: Sequence[Span], context: int) -> list[Row]:
    """What must be computed for the spans, each once, the longest first; owners are the spans' numbers."""
    rows: dict[tuple[bytes, int], Row] = {}
    for owner, span in enumerate(spans):
        for window in windows_of(span, context):
            ids, target = window.ids[:-1], window.ids[window.start :]
            row = rows.setdefault((ids.tobytes(), len(target)), Row(ids, len(target)))
            row.targets.append((owner, target))
    return sorted(rows.values(), key=lambda row: len(row.ids), reverse=True)


def batches_of(rows: Sequence[Row], tokens: int, logits: int) -> Iterator[list[Row]]:
    """Rows in order, as many together as fit. tokens: padded tokens of a batch.  logits: scored positions of one.

    The scored positions are counted from the earliest one, for a model of transformers gives logits of all after it.
    """
    batch: list[Row] = []
    for row in rows:
        width = len(batch[0].ids) if batch else len(row.ids)
        earliest = min(len(r.ids) - r.n for r in (*batch, row))
        size = len(batch) + 1
        if batch and (size * width > tokens or size * (width - earliest) > logits or size > ROWS_AT_ONCE):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def score_spans(
    model: Any,
    spans: Sequence[Span],
    context: int,
    batch_tokens: int | None = None,
    report: Callable[[float], None] = lambda share: None,
) -> list[Score]:
    """The score of each span. batch_tokens: computed together, padded.  report: gets the share that is done.

    Raises InputError for a model that gives no finite likelihood, or whose vocabulary lacks a token.
    """
    kind = "cpu" if model.device.type == "cpu" else "other"
    vocab = model.get_input_embeddings().weight.shape[0]
    largest = max((int(span.ids.max()) for span in spans), default=0)
    if largest >= vocab:
        raise InputError(f"the tokenizer gives id {largest}, but the model has {vocab}; it is not its own")
    nats = np.zeros(len(spans))
    counts = np.zeros(len(spans), np.int64)
    greedy = np.ones(len(spans), bool)
    rows = rows_of(spans, context)
    total, done = sum(len(row.ids) for row in rows), 0
    for batch in batches_of(rows, batch_tokens or BATCH_TOKENS[kind], max(1, LOGITS_AT_ONCE[kind] // vocab)):
        for row, values in zip(batch, _compute(model, batch), strict=True):
            for (owner, target), (value, first) in zip(row.targets, values, strict=True):
                if not math.isfinite(value):
                    raise InputError("the model gives no finite likelihood to an answer; has it diverged?")
                nats[owner] += value
                counts[owner] += len(target)
                greedy[owner] &= first
        done += sum(len(row.ids) for row in batch)
        report(done / total)
    return [Score(float(a), int(n), bool(g)) for a, n, g in zip(nats, counts, greedy, strict=True)]


def _compute(model: Any, batch: Sequence[Row]) -> Iterator[list[tuple[float, bool]]]:
    """For each row, for each of its targets: (log-likelihood, whether every token is the model's first choice)."""
    import torch

    width = len(batch[0].ids)
    ids = np.zeros((len(batch), width), np.int64)
    keep = np.zeros((len(batch), width), bool)
    for i, row in enumerate(batch):
        ids[i, : len(row.ids)] = row.ids
        keep[i, len(row.ids) - row.n : len(row.ids)] = True
    # Every target of every row, as one list of (position among those kept, id), so that each device step is one call.
    starts = np.cumsum([0, *(row.n for row in batch)])
    places = [np.arange(a, a + row.n) for a, row in zip(starts, batch, strict=False) for _ in row.targets]
    wanted = [target for row in batch for _, target in row.targets]
    where, which = np.concatenate(places), np.concatenate(wanted)
    order = np.argsort(where, kind="stable")
    value, first = np.empty(len(where)), np.empty(len(where), bool)
    with torch.no_grad():
        at = 0
        for logits in kept_logits(model, torch.from_numpy(ids).to(model.device), torch.from_numpy(keep)):
            mine = order[(where[order] >= at) & (where[order] < at + len(logits))]
            position = torch.from_numpy(where[mine] - at).to(logits.device)
            token = torch.from_numpy(which[mine]).to(logits.device)
            chosen = logits[position, token]
            value[mine] = (chosen - logits.logsumexp(-1)[position]).double().cpu().numpy()
            first[mine] = (logits.argmax(-1)[position] == token).cpu().numpy()
            at += len(logits)
    ends = np.cumsum([0, *(len(target) for target in wanted)])
    sums = [(float(value[a:b].sum()), bool(first[a:b].all())) for a, b in itertools.pairwise(ends)]
    at = 0
    for row in batch:
        yield sums[at : at + len(row.targets)]
        at += len(row.targets)


# ---- items -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """Some items of a task. correct: one per item.  cut: items whose prompt lost its beginning.  long: items with an
    answer longer than the context, scored in windows.  merged: items whose prompt's last token the answer changes."""

    correct: tuple[bool, ...]
    cut: int
    long: int
    merged: int


def judge(
    model: Any,
    encode: Encode,
    prefix: int | None,
    task: Task,
    indices: Sequence[int],
    context: int,
    batch_tokens: int | None = None,
    report: Callable[[float], None] = lambda share: None,
) -> Judged:
    """Ask these items. The right answer of a choice has the highest mean log-likelihood per token; of a
    language-modelling item every token must be the model's first choice.
    """
    items = read_items(task)
    asked = [spans_of(task, texts_of(task, items, i), encode, prefix) for i in indices]
    scores = iter(score_spans(model, [span for spans in asked for span in spans], context, batch_tokens, report))
    correct = []
    for index, spans in zip(indices, asked, strict=True):
        of_item = [next(scores) for _ in spans]
        if task.kind == "language_modeling":
            correct.append(of_item[0].greedy)
        else:
            best = max(range(len(spans)), key=lambda k: of_item[k].loglikelihood / of_item[k].tokens)
            correct.append(best == items[index]["gold"])
    return Judged(
        tuple(correct),
        sum(any(len(span.ids) > context for span in spans) for spans in asked),
        sum(any(len(span.ids) - span.start >= context for span in spans) for spans in asked),
        sum(any(span.merged for span in spans) for spans in asked),
    )
