"""How the engine asks a model for logits.   B rows of one call, T tokens a row, D width, V vocabulary, S visible keys.

The engine's requests live in rows. A backend remembers what was fed to each row and answers one question: the logits
behind the last tokens of some rows. Novella's own models and those transformers models that write their keys through a
Cache share one memory and run as one batch; any other model is asked one row at a time. Which way a foreign model takes
is not read off its class: each way is tried on a few tokens against the plain forward pass, and the first that agrees
is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from models.foreign import Foreign
from models.lm import LM
from models.memory import At, Slots

FIRST_LENGTH = 256  # tokens a row has room for at first; doubles when needed


class Feed(NamedTuple):
    """Row `row` is fed ids[start:stop]; the logits behind the last `keep` of these tokens are wanted."""

    row: int
    ids: list[int]
    start: int
    stop: int
    keep: int = 1


class Backend(Protocol):
    def begin(self, row: int) -> None:
        """Forget what the row held."""

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` was."""

    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        """[sum of keep, V], in the order of the feeds."""


def backend_for(model: Any, rows: int, cache: bool = True) -> Backend:
    """The fastest backend that is right for this model. cache=False recomputes everything for every token."""
    if not cache:
        return Recompute(model)
    if isinstance(model, LM):
        return SharedMemory(model, rows)
    ways: tuple[Callable[[int], Backend], ...] = (
        lambda n: SharedMemory(Foreign(model), n),
        lambda n: CachePerRow(model),
    )
    for way in ways:
        try:
            if agrees(way(2), Recompute(model), int(model.get_input_embeddings().weight.shape[0])):
                return way(rows)
        except Exception:  # a model that cannot be driven this way fails in its own way; the next one is tried
            continue
    return Recompute(model)


def agrees(one: Backend, other: Backend, vocab: int, tokens: int = 9) -> bool:
    """Whether two backends give the same logits, up to rounding, fed in two ragged chunks and then a single token."""
    ids = [[(7 * i + 3 * j + 1) % vocab for j in range(tokens)] for i in range(2)]
    for row in range(2):
        one.begin(row)
        other.begin(row)
    for starts, stops in (((0, 0), (4, 2)), ((4, 2), (tokens - 1, tokens - 3)), ((8, 6), (tokens, tokens - 2))):
        feeds = [Feed(i, ids[i], starts[i], stops[i]) for i in range(2)]
        a, b = one.logits(feeds), other.logits(feeds)
        tolerance = 1e-3 if b.dtype == torch.float32 else 3e-2  # of the largest logit
        a, b = a.float(), b.float()
        if not (a - b).abs().max() <= tolerance * b.abs().max():  # NaN does not agree
            return False
    return True


class SharedMemory:
    """One memory for all rows, and right-padded batches over them: Novella's models, and foreign ones that fit."""

    def __init__(self, model: LM | Foreign, rows: int) -> None:
        self.model = model
        self.device = model.device
        length = min(FIRST_LENGTH, context_of(model) or FIRST_LENGTH)
        self.slots: Slots = model.memory(rows, length)

    def begin(self, row: int) -> None:
        self.slots.reset_rows(slice(row, row + 1))

    def move(self, source: int, target: int) -> None:
        for mem in self.slots.mem:
            for tensor in mem.tensors.values():
                tensor[target].copy_(tensor[source])

    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        ids, at = self._batch(feeds)
        if all(f.keep == 1 for f in feeds):
            return self.model.run(ids, at, self.slots, last=True)[:, 0]  # the head runs on the wanted tokens only
        every = self.model.run(ids, at, self.slots)  # [B, T, V]
        return torch.cat([every[i, f.stop - f.start - f.keep : f.stop - f.start] for i, f in enumerate(feeds)])

    def _batch(self, feeds: Sequence[Feed]) -> tuple[Tensor, At]:
        """ids [B, T], and where they stand."""
        first = feeds[0]
        n = [f.stop - f.start for f in feeds]
        T, upto = max(n), max(f.stop for f in feeds)
        together = all(f.start == first.start for f in feeds)
        self.slots.grow(max(upto, first.start + T))
        rows = [f.row for f in feeds]
        row: slice | Tensor
        if rows == list(range(rows[0], rows[0] + len(rows))):
            row = slice(rows[0], rows[0] + len(rows))  # neighbours are read without a copy
        else:
            row = torch.tensor(rows, device=self.device)
        ids = torch.tensor(
            [f.ids[f.start : f.stop] + [0] * (T - k) for f, k in zip(feeds, n, strict=True)], device=self.device
        )
        starts = torch.tensor([[f.start] for f in feeds], device=self.device)
        return ids, At(
            pos=starts if T == 1 else starts + torch.arange(T, device=self.device),
            n=torch.tensor(n, device=self.device) if min(n) < T else None,
            rows=row,
            upto=upto,
            start=first.start if together and isinstance(row, slice) else None,
        )


class CachePerRow:
    """Any transformers model with a cache of its own kind, one row at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.caches: dict[int, Any] = {}

    def begin(self, row: int) -> None:
        self.caches.pop(row, None)

    def move(self, source: int, target: int) -> None:
        self.caches[target] = self.caches.pop(source)

    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        return torch.cat([self._one(feed) for feed in feeds])

    def _one(self, feed: Feed) -> Tensor:
        if feed.row not in self.caches:
            self.caches[feed.row] = DynamicCache(config=self.model.config)
        ids = torch.tensor([feed.ids[feed.start : feed.stop]], device=self.device)
        seen = torch.ones(1, feed.stop, dtype=torch.long, device=self.device)
        out = self.model(input_ids=ids, attention_mask=seen, past_key_values=self.caches[feed.row], use_cache=True)
        self.caches[feed.row] = out.past_key_values
        return out.logits[0, -feed.keep :]


class Recompute:
    """No memory: every call runs the whole sequence. The judge of the others, and `cache=false`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        takes = inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if "use_cache" in takes else {}

    def begin(self, row: int) -> None: ...

    def move(self, source: int, target: int) -> None: ...

    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        out = []
        for feed in feeds:
            ids = torch.tensor([feed.ids[: feed.stop]], device=self.device)
            out.append(self.model(input_ids=ids, **self.options).logits[0, -feed.keep :])
        return torch.cat(out)


def text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_of(model: Any) -> int | None:
    """Tokens that the model was made for; None when it does not say."""
    config = text_config(model)
    for name in ("seq_len", "max_position_embeddings", "n_positions", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
