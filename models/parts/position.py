"""Position schemes: what tells tokens apart by their place.   B batch, T time, H heads, h head size.

A scheme may add a table to the embedding, turn queries and keys in every layer, or do neither. What happens beyond the
context a model was trained on is stated by each.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.memory import At
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class Position(Part):
    """A kind of position scheme."""

    kinds: ClassVar[dict[str, type]]
    embeds: ClassVar[bool] = False  # adds to the embedding, so it belongs to the whole model and not to one layer

    def embedding(self, d: int, seq_len: int) -> nn.Module | None:
        """What adds positions to the embedding: a module (x [B, T, D], at) -> [B, T, D]."""
        return None

    def rotation(self, head_dim: int) -> Rotation | None:
        """What turns queries and keys of one layer."""
        return None

    def n_parameters(self, d: int, seq_len: int) -> int:
        return 0

    def refuses(self, block: BlockSpec) -> str | None:
        return None


@dataclass(frozen=True)
class NoPosition(Position):
    """Nothing; causal attention alone tells places apart, weakly.   Source: NoPE, arXiv:2305.19466.

    Beyond the trained context: runs, quality falls.
    """


@dataclass(frozen=True)
class Learned(Position):
    """A learned vector per position, added to the embedding (GPT-2).

    Beyond the trained context: refused; there is no vector for position seq_len.
    """

    embeds: ClassVar[bool] = True

    def embedding(self, d: int, seq_len: int) -> nn.Module | None:
        return PositionTable(d, seq_len)

    def n_parameters(self, d: int, seq_len: int) -> int:
        return d * seq_len


@dataclass(frozen=True)
class Rotary(Position):
    """Pairs (i, i + h/2) of each query and key are turned by position * base^(-2i/h).   Source: arXiv:2104.09864.

    Pairs are halves apart (as in Llama), not neighbours; converters permute. Beyond the trained context: runs, the loss
    rises steadily.

    base: the slowest pair turns by 1/base per token, about
    """

    base: float = 10000.0

    def rotation(self, head_dim: int) -> Rotation | None:
        return Rotation(head_dim, self.base)

    def refuses(self, block: BlockSpec) -> str | None:
        h = block.attention.width(block.d_model)
        if h % 2:
            return f"rotary positions turn pairs, so head_dim={h} must be even; try {h - 1} or {h + 1}"
        return None if self.base > 1 else f"base={self.base} must be above 1; 10000 is usual"


class PositionTable(nn.Module):
    """x + table[position]."""

    roles = {"weight": "position"}

    def __init__(self, d: int, seq_len: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(seq_len, d))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, at: At) -> Tensor:
        """x: [B, T, D].  Raises ValueError beyond the table; pads may stand anywhere."""
        length = self.weight.shape[0]
        if at.upto > length:
            raise ValueError(f"position {at.upto - 1} has no learned vector: this model's seq_len is {length}")
        if at.start is not None and at.start + x.shape[1] <= length:
            return x + self.weight[at.start : at.start + x.shape[1]]
        pos = at.pos if at.n is None else at.pos.clamp(max=length - 1)  # only pads may lie beyond
        return x + F.embedding(pos, self.weight)


class Rotation:
    """Turns [B, T, H, h] by position. Tables are made once per call and shared by all layers with the same `key`."""

    def __init__(self, head_dim: int, base: float) -> None:
        self.head_dim, self.base = head_dim, base
        self.key: Hashable = ("rotary", head_dim, base)

    def tables(self, at: At, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and signed sin, [B or 1, T, 1, h], in float32 (float64 for a float64 model)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        pos = at.pos[:1] if at.start is not None else at.pos
        exponent = torch.arange(0, self.head_dim, 2, device=pos.device, dtype=wide) / self.head_dim
        angle = pos[..., None].to(wide) * self.base**-exponent  # [B, T, h/2]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1)[:, :, None], torch.cat([-sin, sin], -1)[:, :, None]

    def __call__(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """[x1 cos - x2 sin, x2 cos + x1 sin] for the halves x1, x2: x * cos + (x2, x1) * (-sin, sin)."""
        cos, sin = tables
        return torch.addcmul(x * cos, x.roll(self.head_dim // 2, -1), sin).to(x.dtype)


Position.kinds = {"none": NoPosition, "learned": Learned, "rotary": Rotary}
