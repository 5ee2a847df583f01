"""Vectors that positions add to the embedding: modules (x [B, T, D], at) -> [B, T, D]."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.memory import At


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


class CyclicTables(nn.Module):
    """x + sum over tables of table[(position + phase) mod its length].

    phase: 0, or with `random_phase` one draw per row and call from PyTorch's generator while training.
    """

    roles = {"weight": "position"}

    def __init__(self, d: int, lengths: tuple[int, ...], random_phase: bool) -> None:
        super().__init__()
        self.lengths, self.random_phase = lengths, random_phase
        self.weight = nn.Parameter(torch.empty(sum(lengths), d))  # the tables one below the other
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, at: At) -> Tensor:
        pos = at.pos[:1] if at.start is not None else at.pos
        if self.training and self.random_phase:
            pos = pos + torch.randint(0, math.lcm(*self.lengths), (x.shape[0], 1), device=pos.device)
        first = 0
        for length in self.lengths:
            x = x + F.embedding(pos % length + first, self.weight)
            first += length
        return x


class Sinusoids(nn.Module):
    """x + scale * (sin(p f_0), cos(p f_0), sin(p f_1), ...), f_m = base^(-2m/D)."""

    def __init__(self, d: int, base: float, scale: float) -> None:
        super().__init__()
        self.d, self.base, self.scale = d, base, scale

    def forward(self, x: Tensor, at: At) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        pos = at.pos[:1] if at.start is not None else at.pos
        f = self.base ** -(torch.arange(0, self.d, 2, device=pos.device, dtype=wide) / self.d)
        angle = pos[..., None].to(wide) * f  # [B, T, ceil(D/2)]
        waves = torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., : self.d]
        return x + (self.scale * waves).to(x.dtype)
