"""From token ids to the residual stream and back: the table, its factorisation and scale.   V vocabulary, D width."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from models.cost import WIDTH, Ops, product
from models.roles import mark
from models.spec import ConfigError, Part


class Embedding(Part):
    """A kind of embedding: how wide its table is, and what stands between the table and the stream."""

    kinds: ClassVar[dict[str, type]]

    def width(self, d: int) -> int:
        """Width of the table and of what the head reads."""
        return d

    def widen(self, d: int) -> nn.Module | None:
        """What makes [..., width] from the table into [..., D]; none: nothing."""
        return None

    def narrow(self, d: int) -> nn.Module | None:
        """What makes [..., D] into [..., width] before the head, with a matrix of its own; none: nothing."""
        return None

    def n_parameters(self, d: int) -> int:
        """Besides table and head."""
        return 0

    def refuses(self, d: int) -> str | None:
        return None

    def ops(self, d: int) -> Ops:
        """Besides the head: the look-up, and both changes of width."""
        return Ops(table_bytes=self.width(d) * WIDTH / 8)


@dataclass(frozen=True)
class Table(Embedding):
    """x = s E[token].   Source: arXiv:1706.03762 (s = sqrt(D)); Gemma, arXiv:2403.08295.

    scale: s: none is 1, `sqrt` is sqrt(D), `learned` starts at sqrt(D) and is trained, or a number
    """

    scale: Literal["none", "sqrt", "learned"] | float = "none"

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def widen(self, d: int) -> nn.Module | None:
        return None if self.scale == "none" else Scale(_scale(self.scale, d), self.scale == "learned")

    def n_parameters(self, d: int) -> int:
        return int(self.scale == "learned")

    def ops(self, d: int) -> Ops:
        return super().ops(d) + (Ops() if self.scale == "none" else Ops(multiplies=d))


@dataclass(frozen=True)
class Factored(Embedding):
    """x = s U E[token] with E [V, r] and U [D, r]; before the head U^T brings the stream back to r.

    Source: ALBERT, arXiv:1909.11942.

    rank: r, the table's width, below D
    tied: whether the way back is U's transpose or a matrix of its own
    scale: s: none is 1, `sqrt` is sqrt(D), `learned` starts at sqrt(D) and is trained, or a number
    """

    rank: int = 128
    tied: bool = True
    scale: Literal["none", "sqrt", "learned"] | float = "none"

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank} must be at least 1")

    @classmethod
    def small(cls) -> Factored:
        """Fits the width that the conformance suite uses."""
        return cls(rank=8)

    def width(self, d: int) -> int:
        return self.rank

    def refuses(self, d: int) -> str | None:
        if self.rank >= d:
            return f"rank={self.rank} is not below d_model={d}, so factoring only adds; use a table"
        return None

    def widen(self, d: int) -> nn.Module:
        scale = None if self.scale == "none" else Scale(_scale(self.scale, d), self.scale == "learned")
        return Widen(self.width(d), d, scale)

    def narrow(self, d: int) -> nn.Module | None:
        return None if self.tied else mark(nn.Linear(d, self.width(d), bias=False), weight="matrix")

    def n_parameters(self, d: int) -> int:
        return self.width(d) * d * (1 if self.tied else 2) + (self.scale == "learned")

    def ops(self, d: int) -> Ops:
        scale = Ops() if self.scale == "none" else Ops(multiplies=d)
        return super().ops(d) + 2 * product(self.width(d), d) + scale


class Scale(nn.Module):
    """s x."""

    roles = {"scale": "scalar"}

    def __init__(self, scale: float, learned: bool) -> None:
        super().__init__()
        self.start = scale
        self.scale = nn.Parameter(torch.tensor(scale)) if learned else None
        self.initial = {"scale": scale}

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.start if self.scale is None else self.scale.to(x.dtype))


class Widen(nn.Module):
    """x U^T, then the scale; `back` is x U."""

    def __init__(self, rank: int, d: int, scale: nn.Module | None) -> None:
        super().__init__()
        self.up = mark(nn.Linear(rank, d, bias=False), weight="matrix")
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return x if self.scale is None else self.scale(x)

    def back(self, x: Tensor) -> Tensor:
        return x @ self.up.weight.to(x.dtype)


def _scale(scale: str | float, d: int) -> float:
    return scale if isinstance(scale, float) else math.sqrt(d)


def _check_scale(scale: str | float) -> None:
    if isinstance(scale, float) and not (scale > 0 and math.isfinite(scale)):
        raise ConfigError(f"scale={scale} must be a number above 0; none, sqrt and learned are the other choices")


Embedding.kinds = {"table": Table, "factored": Factored}
