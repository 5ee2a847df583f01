"""Decoding memory addressed by (row, position in that row).   R rows, L length, B batch, T tokens, S visible keys.

One object serves `generate`, beams, chunked prefill, continuous batching and unmodified transformers models. A mixer
declares what it wants remembered (`Field`), a call says where its tokens stand (`At`), `Mem` holds the tensors of one
block application and `Slots` those of all of them. A key's index in memory IS its position, so a token that was rolled
back, or padding that was written past a row's end, is hidden by its position until it is overwritten: rolling back is
an integer. A state (`per_token=False`) has no such integer; it needs a snapshot.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache


class Field(NamedTuple):
    """What a mixer remembers under one name.

    per_token: one entry of `shape` per token, stored [R, *shape[:-1], L + 1, shape[-1]] (token axis second to last, as
    attention reads it). Otherwise one state of `shape` per row, stored [R, *shape] in float32 at least: it is rounded
    anew at every token, and in bfloat16 a small step would be lost whole.
    """

    shape: tuple[int, ...]
    per_token: bool = True


class At(NamedTuple):
    """Where the tokens of one call stand. Batches are RIGHT-padded inside.

    pos: [B, T] position of each token in its own row (pads: any value).  n: [B] real tokens of this call; None: all T.
    rows: memory rows, [B] or a slice (neighbouring rows are read without a copy); None: rows 0..B-1 are all there are.
    upto: keys 0..upto-1 can be visible; a host integer, so nothing waits for the device.
    doc: [B, T] document ids of packed training rows; tokens see their own document only.
    start: host integer; set when every row's tokens stand at start, start+1, ...: memory is then written by a slice and
    most calls need no mask at all.  tables: what the layers of this call share (rotary tables, masks), by key.
    """

    pos: Tensor
    n: Tensor | None = None
    rows: Tensor | slice | None = None
    upto: int = 0
    doc: Tensor | None = None
    start: int | None = None
    tables: dict[Hashable, Any] | None = None

    @classmethod
    def full(cls, B: int, T: int, device: torch.device | str | None = None, start: int = 0) -> At:
        """Rows of T real tokens from position `start`: training, and decoding without padding."""
        pos = torch.arange(start, start + T, device=device).expand(B, T)
        return cls(pos, upto=start + T, start=start)

    def add_loss(self, name: str, loss: Tensor) -> None:
        """A part's own training loss per token (a scalar, load balance for one), which the training loss adds up."""
        assert self.tables is not None
        self.tables.setdefault("losses", []).append((name, loss))


class Mem:
    """Tensors of one block application. `append` writes new tokens and returns all; `read`/`write` carry a state."""

    def __init__(
        self, fields: dict[str, Field], rows: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.fields = fields
        self.tensors: dict[str, Tensor] = {}
        for name, field in fields.items():
            shape = (*field.shape[:-1], length + 1, field.shape[-1]) if field.per_token else field.shape
            kept = dtype if field.per_token else torch.promote_types(dtype, torch.float32)
            self.tensors[name] = torch.zeros(rows, *shape, dtype=kept, device=device)

    def append(self, at: At, **new: Tensor) -> list[Tensor]:
        """Writes each [B, *shape[:-1], T, shape[-1]]; returns what can be visible, [B, *shape[:-1], upto, shape[-1]].

        Pads go to the trash column (index L), which is never read, unless a slice can be written: then they lie behind
        their row's end, hidden by position. Raises ValueError if `upto` exceeds the length.
        """
        out: list[Tensor] = []
        where: tuple[Tensor, Tensor] | None = None
        for name, x in new.items():
            memory = self.tensors[name]
            length, T = memory.shape[-2] - 1, x.shape[-2]
            if at.upto > length:
                raise ValueError(f"{at.upto} tokens do not fit in a memory of length {length}; make it longer")
            if at.start is not None and not isinstance(at.rows, Tensor):
                rows = memory if at.rows is None else memory[at.rows]
                rows[..., at.start : at.start + T, :] = x
            else:
                where = where or self._where(at, T, length)
                row, pos = where
                index: tuple[Any, ...] = (row, *(slice(None),) * (memory.dim() - 3), pos)
                memory[index] = x.movedim(-2, 1).to(memory.dtype)
            out.append(self._rows(memory.narrow(-2, 0, at.upto), at))
        return out

    def read(self, at: At, name: str) -> Tensor:
        """The state of this call's rows, [B, *shape]."""
        return self._rows(self.tensors[name], at)

    def write(self, at: At, name: str, x: Tensor) -> None:
        """Replaces the state of this call's rows by x [B, *shape]."""
        self.tensors[name][slice(None) if at.rows is None else at.rows] = x.to(self.tensors[name].dtype)

    @staticmethod
    def _rows(memory: Tensor, at: At) -> Tensor:
        if isinstance(at.rows, Tensor):
            return memory.index_select(0, at.rows)
        return memory if at.rows is None else memory[at.rows]

    def _where(self, at: At, T: int, trash: int) -> tuple[Tensor, Tensor]:
        """Row and column of each token, [B, 1] and [B, T]."""
        pos = at.pos
        if at.n is not None:
            pos = torch.where(torch.arange(T, device=pos.device) < at.n[:, None], pos, trash)
        if isinstance(at.rows, Tensor):
            return at.rows[:, None], pos
        first = at.rows.start or 0 if at.rows is not None else 0
        return torch.arange(first, first + pos.shape[0], device=pos.device)[:, None], pos


class Snapshot(NamedTuple):
    """A copy of the states (not of per-token memory) of some rows, and how many tokens had been seen."""

    seen: int
    rows: Tensor | None
    states: list[dict[str, Tensor]]


class Slots(Cache):
    """`rows` x `length` of memory for every application. The engine's has a fixed size; generate()'s grows by doubling.

    specs: for each application the fields of its mixer.  `slots[k]` is the Mem of application k.
    seen: tokens (pads included) that went through the Hugging Face door; the engine keeps its own count per row.
    """

    def __init__(
        self,
        specs: Sequence[dict[str, Field]],
        rows: int,
        length: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        # Cache.__init__ wants transformers' own layer objects; everything of Cache that touches them is replaced below.
        self.layers: list = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self.mem = [Mem(fields, rows, length, dtype, device) for fields in specs]
        self.rows, self.length, self.seen = rows, length, 0
        self.at: At | None = None  # where a foreign model's update() writes

    def __getitem__(self, k: int) -> Mem:
        return self.mem[k]

    def __len__(self) -> int:
        return len(self.mem)

    def __repr__(self) -> str:
        return f"Slots({len(self.mem)} applications, rows={self.rows}, length={self.length}, seen={self.seen})"

    @property
    def has_state(self) -> bool:
        """Whether some mixer carries a state, so that rolling back needs a snapshot."""
        return any(not field.per_token for mem in self.mem for field in mem.fields.values())

    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(t.numel() * t.element_size() for mem in self.mem for t in mem.tensors.values())

    def grow(self, need: int) -> None:
        """Makes room for `need` tokens a row; at least doubles, so that n tokens cost O(n) copies."""
        if need <= self.length:
            return
        new = max(need, 2 * self.length)
        for mem in self.mem:
            for name, field in mem.fields.items():
                if field.per_token:
                    old = mem.tensors[name]
                    larger = old.new_zeros(*old.shape[:-2], new + 1, old.shape[-1])
                    larger[..., : self.length, :] = old[..., : self.length, :]
                    mem.tensors[name] = larger
        self.length = new

    def reset_rows(self, rows: Tensor | Sequence[int] | slice) -> None:
        """Empties rows for new sequences.

        States must start at zero. Per-token memory is hidden by position, but a NaN or inf that an overflowing request
        left behind would still reach the sum as 0 * NaN, so it is zeroed too.
        """
        index = rows if isinstance(rows, (slice, Tensor)) else list(rows)
        for mem in self.mem:
            for tensor in mem.tensors.values():
                tensor[index] = 0

    def rollback(self, seen: int) -> None:
        """Forgets all tokens from position `seen` on. Raises ValueError for states: they need snapshot(), restore()."""
        if seen > self.seen:
            raise ValueError(f"cannot roll back to {seen} tokens: only {self.seen} were seen")
        if self.has_state and seen != self.seen:
            raise ValueError("this model carries a state: take snapshot() before the tokens and restore() it instead")
        self.seen = seen

    def snapshot(self, rows: Tensor | None = None) -> Snapshot:
        """Copies the states of `rows` (None: all). Per-token memory needs no copy: restoring it is `seen`."""
        states = [
            {
                name: (mem.tensors[name] if rows is None else mem.tensors[name][rows]).clone()
                for name, field in mem.fields.items()
                if not field.per_token
            }
            for mem in self.mem
        ]
        return Snapshot(self.seen, rows, states)

    def restore(self, snapshot: Snapshot) -> None:
        """Puts states and the count of seen tokens back to a snapshot."""
        for mem, states in zip(self.mem, snapshot.states, strict=True):
            for name, state in states.items():
                mem.tensors[name][slice(None) if snapshot.rows is None else snapshot.rows] = state
        self.seen = snapshot.seen

    # ---- what transformers asks of a Cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def crop(self, tokens: int) -> None:
        """Negative: forget the last -tokens (transformers >= 5.20); positive: keep the first `tokens` (before)."""
        self.rollback(self.seen + tokens if tokens <= 0 else min(tokens, self.seen))

    def reset(self) -> None:
        self.reset_rows(slice(None))
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        for mem in self.mem:
            mem.tensors = {name: t.index_select(0, beam_idx.to(t.device)) for name, t in mem.tensors.items()}
        self.rows = int(beam_idx.shape[0])

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        if self.has_state:
            raise ValueError("assisted generation rolls tokens back, which a model with a state cannot do")

    is_compileable = property(lambda self: False)
    is_croppable = property(lambda self: not self.has_state)
    is_initialized = property(lambda self: True)
    is_sliding = property(lambda self: [False] * len(self.mem))
    batch_size = property(lambda self: self.rows)
    max_batch_size = property(lambda self: self.rows)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """For unmodified transformers models: keys and values [B, H, T, h] at `self.at`, which models.foreign sets."""
        assert self.at is not None, "a foreign model writes to Slots through models.foreign.Foreign only"
        keys, values = self.mem[layer_idx].append(self.at, k=key_states, v=value_states)
        return keys, values


def visible(at: At, cached: bool, window: int | None = None) -> Tensor:
    """[B or 1, T, S] True where a query may see a key; every query sees at least one, so no row becomes NaN.

    cached: keys come from memory, S = upto and a key's index is its position; otherwise S = T.
    window: a token sees itself and the window - 1 before it.
    """
    pos = at.pos[:1] if at.start is not None else at.pos
    keys = torch.arange(at.upto, device=pos.device)[None, None] if cached else pos[:, None, :]
    query = pos[:, :, None]
    ok = keys <= query
    if window is not None:
        ok = ok & (keys > query - window)
    if at.doc is not None:
        ok = ok & (at.doc[:, :, None] == at.doc[:, None, :])
    if cached and window is not None and at.n is not None:
        # A pad's own position may lie past everything that is remembered; it then sees key 0 instead of nothing.
        pad = torch.arange(pos.shape[1], device=pos.device) >= at.n[:, None]
        ok = ok | (pad[:, :, None] & (keys == 0))
    return ok
