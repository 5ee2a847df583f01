"""Mixers: what moves information between tokens.   B batch, T time, S keys, D model, H heads, K key heads, h head size.

A mixer is a module with
    memory() -> {name: Field}                     what it wants remembered; {} = nothing
    prepare(at, cached, dtype)                    puts into at.tables what the layers of a call can share
    forward(x [B, T, D], at, mem, shared) -> (y, shared)     shared carries e.g. value residuals, functionally
    flops_per_token(T) -> float                   forward FLOPs besides its matrices, at context T
This file holds the base of all kinds; attention.py ends with their registry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import nn

from models.cost import Ops
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class Attention(Part):
    """A kind of mixer: `build(block)`, `n_parameters(block)`, `ops(block, T)`, and what positions may act on in it."""

    kinds: ClassVar[dict[str, type]]

    def build(self, block: BlockSpec) -> nn.Module:
        raise NotImplementedError

    def n_parameters(self, block: BlockSpec) -> int:
        """Of the mixer, a score bias of its own included."""
        raise NotImplementedError

    def ops(self, block: BlockSpec, T: int) -> Ops:
        """Arithmetic per token at context T, that of its position scheme (`position.ops`) included."""
        raise NotImplementedError

    def width(self, d_model: int) -> int:
        """Size of one head."""
        raise NotImplementedError

    def rotated(self, block: BlockSpec) -> tuple[int, int]:
        """Heads (of queries and of keys together) and channels of each that a rotation turns; (0, 0): it has none."""
        return 0, 0

    def scored(self, block: BlockSpec) -> int:
        """Heads whose scores a position scheme may add to; 0: it has no scores."""
        return 0

    def n_keys(self, T: int) -> int:
        """Keys that a query sees at context T at most."""
        return T

    def refuses(self, block: BlockSpec) -> str | None:
        return None
