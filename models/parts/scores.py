"""Softmax attention over scores with all its options, as one module that every mixer with scores owns.

B batch, T queries, S keys, H heads, K key heads, h head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cost import Ops
from models.memory import At
from models.parts.attend import Seen, attend, attention_weights, repeat_heads, what_is_seen

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class Scores(nn.Module):
    """Queries, keys and values -> weighted sums.

    spec: has window, softmax, softcap, sink and dropout.  scale: of the products; None: 1 / sqrt(h).
    Plain softmax is fused, with a soft-cap where rows attend to themselves; `fused = False` computes the same step by
    step.
    """

    def __init__(self, spec: Any, block: BlockSpec, n_heads: int, scale: float | None = None) -> None:
        super().__init__()
        self.window: int | None = spec.window
        self.softcap: float | None = spec.softcap
        self.dropout: float = block.dropout if spec.dropout is None else spec.dropout
        self.scale = scale
        self.softmax: nn.Module = spec.softmax.build(n_heads)
        self.fused: bool = spec.softmax.fused
        self.sink: nn.Module | None = spec.sink.build(n_heads)
        self.bias: nn.Module | None = block.position.score_bias(block)
        self.shared_bias: bool = block.position.shared

    def _whole(self, seen: Seen) -> bool:
        """Whether one call does it all: rows that attend to themselves, with every option but bias and dropout."""
        biased = self.bias is not None or self.shared_bias
        return self.fused and seen.causal and not biased and not (self.training and self.dropout)

    def _masked(self, seen: Seen) -> bool:
        """Whether the mask is needed as a tensor."""
        if self._whole(seen):
            return False
        simple = self.fused and self.softcap is None and self.sink is None and self.bias is None
        return not simple or self.shared_bias or seen.narrow

    def prepare(self, at: At, cached: bool) -> None:
        """Puts masks, and a bias without parameters, where the layers of a call share them."""
        assert at.tables is not None
        if ("seen", self.window) not in at.tables:
            at.tables["seen", self.window] = what_is_seen(at, at.pos.shape[1], cached, self.window)
        if self._masked(at.tables["seen", self.window]):
            self._written_out(at)
        key = getattr(self.bias, "key", None)
        if key is not None and key not in at.tables:
            assert self.bias is not None
            at.tables[key] = self.bias(at, at.upto if cached else at.pos.shape[1], cached)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: At, cached: bool) -> Tensor:
        """q [B, H, T, h], k [B, K, S, h], v [B, K, S, v] -> [B, H, T, v]."""
        assert at.tables is not None
        dropout = self.dropout if self.training else 0.0
        seen = at.tables["seen", self.window]
        bias, sink = self._bias(at, k.shape[2], cached), self._sink(q)
        if self._whole(seen):
            return attend(q, k, v, seen, 0.0, self.scale, None, sink, self.softcap)
        if self._masked(seen):
            seen = self._written_out(at)
        if self.fused and self.softcap is None:
            return attend(q, k, v, seen, dropout, self.scale, bias, sink)
        weights = attention_weights(q, k, seen, self.softmax, self.scale, self.softcap, bias, sink)
        if seen.last:
            v = v[:, :, -seen.last :]
        weights = F.dropout(weights, dropout) if dropout else weights
        return weights.to(v.dtype) @ repeat_heads(v, weights.shape[1])

    def weights(self, q: Tensor, k: Tensor, at: At, cached: bool = False) -> Tensor:
        """The attention weights [B, H, T, S] alone, without dropout, for inspection. A sink's share is left out."""
        bias, sink = self._bias(at, k.shape[2], cached), self._sink(q)
        return attention_weights(q, k, self._written_out(at), self.softmax, self.scale, self.softcap, bias, sink)

    def _written_out(self, at: At) -> Seen:
        assert at.tables is not None
        key = ("mask", self.window)
        if key not in at.tables:
            at.tables[key] = at.tables["seen", self.window].written_out(at.pos.shape[1], at.pos.device)
        return at.tables[key]

    def _bias(self, at: At, n_keys: int, cached: bool) -> Tensor | None:
        assert at.tables is not None
        if self.shared_bias:
            return at.tables["score_bias"]
        if self.bias is None:
            return None
        key = getattr(self.bias, "key", None)
        return self.bias(at, n_keys, cached) if key is None else at.tables[key]

    def _sink(self, q: Tensor) -> Tensor | None:
        if self.sink is None:
            return None
        return self.sink(torch.empty((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device))


def scores_ops(spec: Any, block: BlockSpec, n_heads: int, head_dim: int, v_head_dim: int, T: int) -> Ops:
    """Arithmetic per token of scores and weighted sums at context T. One query's row has min(T, window) keys."""
    S = min(T, spec.window or T)
    products = Ops(multiplies=(head_dim + v_head_dim) * S, additions=(head_dim + v_head_dim) * S)
    products += Ops(multiplies=S)  # by the scale
    if spec.softcap is not None:
        products += Ops(multiplies=2 * S, exponentials=S)
    return n_heads * (products + spec.softmax.ops(S)) + spec.sink.ops(n_heads)


def scores_refuse(spec: Any, block: BlockSpec) -> str | None:
    """Why the options do not fit, of those that every mixer with scores has."""
    if spec.window is not None and spec.window < 1:
        return f"window={spec.window} must be at least 1; 1 is a token that sees itself only"
    if spec.window is not None and spec.window >= block.seq_len:
        return f"window={spec.window} has no effect at seq_len={block.seq_len}; make it smaller or leave it out"
    if spec.dropout is not None and not 0 <= spec.dropout < 1:
        return f"dropout={spec.dropout} must lie in [0, 1)"
    if spec.softcap is not None and not spec.softcap > 0:
        return f"softcap={spec.softcap} must be above 0; 50 is usual, none is no cap"
    if reason := spec.softmax.refuses(block):
        return f"softmax: {reason}"
    if spec.sink.build(1) is not None and not spec.softmax.sums_to_one:
        return "a sink adds to the sum that weights are divided by, and this softmax divides by no sum of weights"
    return None
