"""What turns attention scores, or the head's logits, into weights.   H heads, T queries, S keys, V vocabulary.

A kind builds a module with
    forward(scores [..., H, T, S], seen) -> weights of the same shape and dtype; `seen` (bool, broadcastable; None: all)
        says which keys count. Where it is false, or a score is -inf, the weight is exactly 0; a row without keys has
        weights 0. A row's weights depend on that row's visible keys alone.
    log_weights(z [..., V]) -> [..., V]           so that softmax(log_weights(z)) is the kind's output distribution;
        finite (weights below `FLOOR` count as `FLOOR`)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from models.cost import Ops, elementwise
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec

LARGEST = 1e9  # scores are held within +-LARGEST, so that squares and cubes of any score stay finite in float32


class Softmax(Part):
    """A kind of softmax: `build`, `n_parameters`, `ops` (of one row of n_keys: one query of one head).

    n_heads: heads of the scores; None: the output softmax over a vocabulary row, whose parameters have shape ().
    fused: whether it is plain softmax, so that attention may use the fused kernel.  sums_to_one: whether rows do.
    """

    kinds: ClassVar[dict[str, type]]
    fused: ClassVar[bool] = False
    sums_to_one: ClassVar[bool] = True

    def build(self, n_heads: int | None) -> nn.Module:
        raise NotImplementedError

    def n_parameters(self, n_heads: int | None) -> int:
        return 0

    def ops(self, n_keys: int) -> Ops:
        raise NotImplementedError

    def refuses(self, block: BlockSpec) -> str | None:
        return None

    def refuses_output(self) -> str | None:
        """Why it cannot give the probabilities of the next token; None: it can."""
        return None


@dataclass(frozen=True)
class PlainSoftmax(Softmax):
    """y_i = e^(x_i - max x) / sum_j e^(x_j - max x).   Source: arXiv:1706.03762."""

    fused = True

    def build(self, n_heads: int | None) -> nn.Module:
        return Normalised()

    def ops(self, n_keys: int) -> Ops:
        return elementwise(n_keys, additions=3, exponentials=1, multiplies=1) + Ops(divisions=1, reductions=2)


def clean(scores: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores in float32 at least, finite and 0 where not seen; and what is seen, in the shape of the scores."""
    visible = scores != -torch.inf
    if seen is not None:
        visible = visible & seen
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.where(visible, wide.clamp(-LARGEST, LARGEST), 0.0), visible


def normalise(logs: Tensor, visible: Tensor) -> Tensor:
    """softmax of logs over the visible entries; 0 elsewhere and in rows without any."""
    weights = logs.masked_fill(~visible, -2 * LARGEST).softmax(-1)
    return torch.where(visible, weights, 0.0)


class Normalised(nn.Module):
    """y_i = w(x_i) / sum_j w(x_j), computed from log w, which kinds override."""

    def log_weights(self, z: Tensor) -> Tensor:
        return z

    def forward(self, scores: Tensor, seen: Tensor | None = None) -> Tensor:
        z, visible = clean(scores, seen)
        return normalise(self.log_weights(z), visible).to(scores.dtype)


Softmax.kinds = {"softmax": PlainSoftmax}
