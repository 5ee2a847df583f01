"""How well a model predicts a text: nats per token, bits per byte, their errors; and what gzip and xz make of it.

Windows of `length` tokens slide over each sequence; every token but a sequence's first is scored exactly once, and from
the second window on with at least length - stride + 1 tokens before it. `stride=length` gives windows side by side, as
the validation during training has them. Torch is imported only where a model is run.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

IGNORE = -100
BLOCKS = 64  # an error of an error of 9 %, and blocks as long as the text allows, for what is near is alike
FEW_DOCUMENTS = 30  # below so many (counted by their weight) the error is taken over blocks
XZ_DICTIONARY = 64 << 20  # that of `xz -9`
LOGITS_AT_ONCE = {"cpu": 1 << 24, "other": 1 << 28}  # elements
BUFFERED_BATCHES = 32  # windows that are sorted by length before they are batched


class Readable(Protocol):
    """A sequence of token ids of which a part can be read: an array in memory, or a split on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> np.ndarray: ...


class Window(NamedTuple):
    """Reads tokens begin..end-1 of sequence `sequence` and scores the targets at first+1..end."""

    sequence: int
    begin: int
    end: int
    first: int


def windows(n: int, length: int, stride: int, sequence: int = 0) -> Iterator[Window]:
    """The windows over a sequence of n tokens, whose targets are the tokens 1..n-1.

    length: tokens a window reads at most.  stride: tokens scored by every window but the first, in 1..length.
    """
    scored = 0
    while scored < n - 1:
        begin = max(0, scored - (length - stride)) if scored else 0
        end = min(begin + length, n - 1)
        yield Window(sequence, begin, end, scored)
        scored = end


def kept_logits(model: Any, ids: Any, keep: Any) -> Iterator[Any]:
    """The logits at the positions of `keep`, in order, as slices [n, V] in float32 (float64 of a float64 model).

    model: one of ours, or a causal model of transformers.  ids: [B, T].  keep: [B, T] bool.
    The logits of ours are made in slices, so that a large vocabulary costs little memory.
    """
    import torch

    from models.lm import LM

    keep = keep.to(ids.device)
    if isinstance(model, LM):
        at_once = LOGITS_AT_ONCE["cpu" if ids.device.type == "cpu" else "other"]
        slices = model.hidden(ids)[keep].split(max(1, at_once // model.spec.vocab))
        parts: Iterable[Any] = (model.logits(part) for part in slices)
    else:
        last = int(keep.any(0).nonzero()[0])  # logits before the first scored target are spared
        out = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - last).logits
        out = out[:, last - ids.shape[1] :]  # where a model does not know that option
        parts = (out[keep[:, last:]],)
    for part in parts:
        yield part if part.dtype == torch.float64 else part.float()


def token_nll(model: Any, ids: Any, targets: Any) -> Any:
    """Negative log-likelihood in nats of every target that is not IGNORE, [n] float32 (float64 of a float64 model).

    model: one of ours, or a causal model of transformers.  ids, targets: [B, T]; targets[b, t] follows ids[b, :t + 1].
    """
    import torch
    from torch.nn import functional as F

    keep = targets != IGNORE
    wanted, at, nll = targets[keep], 0, []
    for logits in kept_logits(model, ids, keep):
        nll.append(F.cross_entropy(logits, wanted[at : at + len(logits)], reduction="none"))
        at += len(logits)
    return torch.cat(nll)


def score(
    model: Any,
    sequences: Sequence[Readable],
    length: int,
    stride: int,
    rows: int,
    report: Callable[[int], None] = lambda tokens: None,
) -> Iterator[tuple[Window, np.ndarray, np.ndarray]]:
    """Every window over every sequence, scored: (window, nll [k] float64, target ids [k]), in order of sequences.

    rows: windows computed together; pads stand behind a row's end, where no token that is scored can see them.
    report: called with the number of tokens scored so far.
    """
    import torch

    device = next(model.parameters()).device
    done = 0

    def run(batch: list[tuple[int, Window, np.ndarray]]) -> Iterator[tuple[int, Window, np.ndarray, np.ndarray]]:
        width = max(len(tokens) for _, _, tokens in batch) - 1
        ids = np.zeros((len(batch), width), np.int64)
        targets = np.full((len(batch), width), IGNORE, np.int64)
        for row, (_, window, tokens) in enumerate(batch):
            ids[row, : len(tokens) - 1] = tokens[:-1]
            skip = window.first - window.begin
            targets[row, skip : len(tokens) - 1] = tokens[1 + skip :]
        with torch.no_grad():
            nll = token_nll(model, torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device))
        sizes = [window.end - window.first for _, window, _ in batch]
        values = np.split(nll.to("cpu", torch.float64).numpy(), np.cumsum(sizes)[:-1])
        for (place, window, tokens), value in zip(batch, values, strict=True):
            yield place, window, value, tokens[1 + window.first - window.begin :]

    def flush(buffer: list[tuple[int, Window, np.ndarray]]) -> Iterator[tuple[Window, np.ndarray, np.ndarray]]:
        nonlocal done
        by_length = sorted(buffer, key=lambda item: -len(item[2]))
        found = []
        for i in range(0, len(by_length), rows):
            for place, window, nll, targets in run(by_length[i : i + rows]):
                found.append((place, window, nll, targets))
                done += len(nll)
            report(done)
        for _, window, nll, targets in sorted(found, key=lambda item: item[0]):
            yield window, nll, targets

    buffer: list[tuple[int, Window, np.ndarray]] = []
    for i, sequence in enumerate(sequences):
        for window in windows(len(sequence), length, stride, i):
            buffer.append((len(buffer), window, np.asarray(sequence[window.begin : window.end + 1])))
            if len(buffer) == BUFFERED_BATCHES * rows:
                yield from flush(buffer)
                buffer = []
    yield from flush(buffer)


@dataclass
class Tally:
    """Sums over scored tokens, by window and by document, from which figures and their errors follow."""

    by_window: list[tuple[float, int, float]] = field(default_factory=list)  # (nats, tokens, bytes)
    by_document: dict[int, list[float]] = field(default_factory=dict)

    def add(self, documents: np.ndarray | int, nll: np.ndarray, n_bytes: np.ndarray) -> None:
        """One window. documents: of each token, or of all.  nll: nats [k].  n_bytes: of text behind targets, [k]."""
        self.by_window.append((float(nll.sum()), len(nll), float(n_bytes.sum())))
        if isinstance(documents, int):
            groups: Iterable[tuple[int, Any]] = ((documents, slice(None)),)
        else:
            groups = ((int(d), documents == d) for d in np.unique(documents))
        for document, which in groups:
            sums = self.by_document.setdefault(document, [0.0, 0.0, 0.0])
            part = nll[which]
            for i, value in enumerate((part.sum(), len(part), n_bytes[which].sum())):
                sums[i] += float(value)

    def figures(self, n_bytes: int | None) -> dict[str, Any]:
        """Means and their standard errors. n_bytes: of the scored text; None: not known, so there are no bits per byte.

        The error is that of a ratio of sums over units (linearised: see `ratio_error`): over documents where at least
        FEW_DOCUMENTS of them carry the weight, else over BLOCKS blocks of consecutive windows.
        """
        documents = np.array(list(self.by_document.values()), np.float64)
        tokens = documents[:, 1]
        if tokens.sum() ** 2 / np.square(tokens).sum() >= FEW_DOCUMENTS:
            units, over = documents, f"{len(documents):,} documents"
        else:
            every = np.array(self.by_window, np.float64)
            n = min(BLOCKS, len(every))
            units = np.add.reduceat(every, np.arange(n) * len(every) // n)
            over = f"{n} blocks of about {round(every[:, 1].sum() / n):,} tokens"
        nats, count = float(documents[:, 0].sum()), int(tokens.sum())
        mean, error = nats / count, ratio_error(units[:, 0], units[:, 1])
        perplexity = math.exp(min(700.0, mean))
        found = {
            "nats_per_token": mean,
            "nats_per_token_stderr": error,
            "perplexity": perplexity,
            "perplexity_stderr": None if error is None else perplexity * error,
            "bits_per_byte": None,
            "bits_per_byte_stderr": None,
            "tokens": count,
            "bytes": n_bytes,
            "stderr_over": None if error is None else over,
        }
        if n_bytes:
            weight = units[:, 2] if units[:, 2].sum() else units[:, 1]
            error = ratio_error(units[:, 0], weight * (n_bytes / weight.sum()))
            found["bits_per_byte"] = nats / math.log(2) / n_bytes
            found["bits_per_byte_stderr"] = None if error is None else error / math.log(2)
        return found


def ratio_error(x: np.ndarray, w: np.ndarray) -> float | None:
    """Standard error of sum(x) / sum(w) over n independent units: sqrt(n / (n - 1) sum (x - r w)^2) / sum(w).

    None for fewer than two units. Source: Cochran, Sampling Techniques, 3rd ed., section 2.11.
    """
    n = len(x)
    if n < 2:
        return None
    rest = x - x.sum() / w.sum() * w
    return float(math.sqrt(n / (n - 1) * np.square(rest).sum()) / w.sum())


def compression_baselines(
    text: str | bytes | bytearray, ids: np.ndarray | None = None, n_bytes: int | None = None
) -> dict[str, float]:
    """Bits per byte of what knows no language: {"gzip", "xz", "unigram"}, {} for an empty text.

    gzip and xz at their strongest (-9, -9e), headers included.  unigram: the entropy of the text's own byte
    frequencies, or of its tokens' when `ids` [N] are given: the least that any model without context can reach, for
    it is told the frequencies.  n_bytes: bytes behind `ids`, if they are not those of `text`.
    """
    data = text.encode() if isinstance(text, str) else bytes(text)
    if not data:
        return {}
    # A window longer than the text gains nothing, and xz takes memory (11 times its window) before it has seen any.
    window = min(XZ_DICTIONARY, max(1 << 12, 1 << (len(data) - 1).bit_length()))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]
    sizes = {
        "gzip": len(gzip.compress(data, 9, mtime=0)),
        "xz": len(lzma.compress(data, lzma.FORMAT_XZ, filters=filters)),
    }
    found = {name: 8 * size / len(data) for name, size in sizes.items()}
    symbols = np.frombuffer(data, np.uint8) if ids is None else np.asarray(ids)
    counts = np.unique(symbols, return_counts=True)[1]
    bits = float((counts * np.log2(counts.sum() / counts)).sum())
    return found | {"unigram": bits / (n_bytes or len(data))}
