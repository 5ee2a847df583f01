"""Attention sinks: a share of the attention that goes to nothing.   H heads.

A sink is a module; `sink(like)` gives its score l as [1, H or 1, 1, 1], where `like` says device and dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.cost import Ops
from models.spec import Part


class Sink(Part):
    """A kind of sink: sum_j e^(s_j) v_j / (e^l + sum_j e^(s_j)), a further key of score l and value 0.

    It is never masked, so a token may attend to nothing. Source of the idea: "attention is off by one" (E. Miller,
    2023) and the laboratory's flash_lobo. With a softmax other than the plain one, the key stands in its row likewise.
    """

    kinds: ClassVar[dict[str, type]]

    def build(self, n_heads: int) -> nn.Module | None:
        return None

    def n_parameters(self, n_heads: int) -> int:
        return 0

    def ops(self, n_heads: int) -> Ops:
        return Ops()


@dataclass(frozen=True)
class NoSink(Sink):
    """All attention goes to tokens."""


@dataclass(frozen=True)
class FixedSink(Sink):
    """e^l is a constant: with l = 0 softmax is off by one, e^s / (1 + sum e^s).

    score: l
    """

    score: float = 0.0

    def build(self, n_heads: int) -> nn.Module | None:
        return Constant(self.score)

    def ops(self, n_heads: int) -> Ops:
        return Ops(additions=n_heads)


@dataclass(frozen=True)
class LearnedSink(Sink):
    """l is one learned number per layer (learned off-by-one, flash_lobo).

    score: where l starts
    """

    score: float = 0.0

    def build(self, n_heads: int) -> nn.Module | None:
        return LearnedScore(None, self.score)

    def n_parameters(self, n_heads: int) -> int:
        return 1

    def ops(self, n_heads: int) -> Ops:
        return Ops(additions=n_heads, exponentials=n_heads)


@dataclass(frozen=True)
class HeadSink(Sink):
    """l is one learned number per head (flash_lobo per head; the sinks of gpt-oss, arXiv:2508.10925).

    score: where l starts
    """

    score: float = 0.0

    def build(self, n_heads: int) -> nn.Module | None:
        return LearnedScore(n_heads, self.score)

    def n_parameters(self, n_heads: int) -> int:
        return n_heads

    def ops(self, n_heads: int) -> Ops:
        return Ops(additions=n_heads, exponentials=n_heads)


class Constant(nn.Module):
    def __init__(self, score: float) -> None:
        super().__init__()
        self.score = score

    def forward(self, like: Tensor) -> Tensor:
        return like.new_full((1, 1, 1, 1), self.score)


class LearnedScore(nn.Module):
    roles = {"score": "scalar"}

    def __init__(self, n_heads: int | None, start: float) -> None:
        super().__init__()
        self.initial = {"score": start}
        self.score = nn.Parameter(torch.full((n_heads,) if n_heads else (), start))

    def forward(self, like: Tensor) -> Tensor:
        return self.score.reshape(1, -1, 1, 1).to(like.dtype)


Sink.kinds = {"none": NoSink, "fixed": FixedSink, "learned": LearnedSink, "head": HeadSink}
