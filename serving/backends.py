"""How the engine asks a model for logits.   B rows of one call, T tokens a row, D width, V vocabulary, S visible keys.

The engine's requests live in rows. A backend remembers what was fed to each row and answers one question: the logits
behind the last tokens of some rows. Novella's own models and those transformers models that write their keys through a
Cache share one memory and run as one batch; any other model is asked one row at a time. Which way a foreign model takes
is not read off its class: each way is tried on a few tokens against the plain forward pass, and the first that agrees
is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from models.memory import At, Field, Slots

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
    if hasattr(model, "run") and hasattr(model, "memory"):
        return OwnMemory(model, rows)
    for kind in (SharedMemory, CachePerRow):
        try:
            if agrees(kind(model, 2), Recompute(model), _vocab(model)):
                return kind(model, rows)
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


class OwnMemory:
    """Novella's models: right-padded batches over memory rows, through `hidden` and `logits` (so that the head runs on
    the wanted tokens only)."""

    def __init__(self, model: Any, rows: int) -> None:
        self.model, self.rows = model, rows
        self.device = next(model.parameters()).device
        self.slots: Slots = self._memory(rows)

    def _memory(self, rows: int) -> Slots:
        return self.model.memory(rows, min(FIRST_LENGTH, context_of(self.model) or FIRST_LENGTH))

    def begin(self, row: int) -> None:
        self.slots.reset_rows(slice(row, row + 1))

    def move(self, source: int, target: int) -> None:
        for mem in self.slots.mem:
            for tensor in mem.tensors.values():
                tensor[target].copy_(tensor[source])

    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        ids, at, last = self._batch(feeds)
        x = self.model.hidden(ids, at, self.slots)
        return self.model.logits(x[:, -1] if last is None else x[last])

    def _batch(self, feeds: Sequence[Feed]) -> tuple[Tensor, At, tuple[Tensor, Tensor] | None]:
        """ids [B, T], where they stand, and the (row, column) of every wanted token (None: the last of every row)."""
        first = feeds[0]
        n = [f.stop - f.start for f in feeds]
        T, upto = max(n), max(f.stop for f in feeds)
        self.slots.grow(upto)
        rows = [f.row for f in feeds]
        row: slice | Tensor
        if rows == list(range(rows[0], rows[0] + len(rows))):
            row = slice(rows[0], rows[0] + len(rows))  # neighbours are read without a copy
        else:
            row = torch.tensor(rows, device=self.device)
        together = all(f.start == first.start for f in feeds)
        tokens = [f.ids[f.start : f.stop] + [0] * (T - k) for f, k in zip(feeds, n, strict=True)]
        ids = torch.tensor(tokens, device=self.device)
        starts = torch.tensor([[f.start] for f in feeds], device=self.device)
        pos = starts if T == 1 else starts + torch.arange(T, device=self.device)
        ragged = any(k != T for k in n)
        at = At(
            pos=pos,
            n=torch.tensor(n, device=self.device) if ragged else None,
            rows=row,
            upto=upto,
            start=first.start if together and not isinstance(row, Tensor) else None,
        )
        if not ragged and all(f.keep == 1 for f in feeds):
            return ids, at, None
        wanted = [(i, j) for i, (f, k) in enumerate(zip(feeds, n, strict=True)) for j in range(k - f.keep, k)]
        i, j = torch.tensor(wanted, device=self.device).unbind(1)
        return ids, at, (i, j)


class SharedMemory(OwnMemory):
    """Unmodified transformers models whose attention writes keys and values through Cache.update."""

    def _memory(self, rows: int) -> Slots:
        config = text_config(self.model)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        field = {"k": Field((heads, size)), "v": Field((heads, size))}
        specs = [field] * config.num_hidden_layers
        return Slots(specs, rows, FIRST_LENGTH, self.model.dtype, self.device)

    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        ids, at, last = self._batch(feeds)
        self.slots.at, self.slots.seen = at, at.upto - ids.shape[1]
        keep = 1 if last is None else 0  # transformers' logits_to_keep: 0 is all
        out = self.model(
            input_ids=ids,
            position_ids=at.pos,
            attention_mask=self._masks(at),
            past_key_values=self.slots,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return out[:, -1] if last is None else out[last]

    def _masks(self, at: At) -> Tensor | dict[str, Tensor]:
        config = text_config(self.model)
        keys = torch.arange(at.upto, device=self.device)
        full = keys <= at.pos[:, :, None]  # a pad's query sees more than it should; its output is never read
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        if not window:
            return self._as_asked(full)
        near = full & (keys > at.pos[:, :, None] - window)
        near = near | ~near.any(-1, keepdim=True)  # a pad far behind the last key would see nothing, and be NaN
        if kinds <= {"sliding_attention"}:
            return self._as_asked(near)
        return {"full_attention": self._as_asked(full), "sliding_attention": self._as_asked(near)}

    def _as_asked(self, seen: Tensor) -> Tensor:
        """[B, T, S] True where visible -> [B, 1, T, S] in the form that the attention implementation takes."""
        if self.model.config._attn_implementation == "sdpa":
            return seen[:, None]
        lowest = torch.finfo(self.model.dtype).min
        return torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device).masked_fill(~seen, lowest)[:, None]


class CachePerRow:
    """Any transformers model with a cache of its own kind, one row at a time."""

    def __init__(self, model: Any, rows: int) -> None:
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
        value = getattr(config, name, None) or getattr(getattr(config, "spec", None), name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _vocab(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
