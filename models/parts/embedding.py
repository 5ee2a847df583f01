"""From token ids to the residual stream and back: kinds of embedding.   V vocabulary, D width, r a narrower one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from models.cost import Ops, product
from models.parts.streams import Streams
from models.parts.table import Embedding, Scale, Table, check_scale, scale_of
from models.roles import mark
from models.spec import ConfigError

if TYPE_CHECKING:
    from models.family import Family


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
        check_scale(self.scale)
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank} must be at least 1")

    @classmethod
    def small(cls) -> Factored:
        """Fits the width that the conformance suite uses."""
        return cls(rank=8)

    def width(self, d: int) -> int:
        return self.rank

    def refuses(self, spec: Family) -> str | None:
        if self.rank >= spec.d_model:
            return f"rank={self.rank} is not below d_model={spec.d_model}, so factoring only adds; use a table"
        return None

    def widen(self, d: int) -> nn.Module:
        scale = None if self.scale == "none" else Scale(scale_of(self.scale, d), self.scale == "learned")
        return Widen(self.width(d), d, scale)

    def narrow(self, d: int) -> nn.Module | None:
        return None if self.tied else mark(nn.Linear(d, self.width(d), bias=False), weight="matrix")

    def n_parameters(self, d: int) -> int:
        return self.width(d) * d * (1 if self.tied else 2) + (self.scale == "learned")

    def ops(self, d: int) -> Ops:
        scale = Ops() if self.scale == "none" else Ops(multiplies=d)
        return super().ops(d) + 2 * product(self.width(d), d) + scale


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


Embedding.kinds = {"table": Table, "factored": Factored, "streams": Streams}
