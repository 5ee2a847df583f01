"""What every embedding offers, and the plain one: a row per token and perhaps a scale.   V vocabulary, D width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.linear_cross_entropy import IGNORE
from models.cost import WIDTH, Ops
from models.roles import mark
from models.spec import ConfigError, Part

if TYPE_CHECKING:
    from models.family import Family


class Embedding(Part):
    """A kind of embedding: what table and head are, and what stands between them and the stream.

    joins: whether logits are put together from several that are softmaxed apart (`apart`, `join`, `cross_entropy`).
    """

    kinds: ClassVar[dict[str, type]]
    joins: ClassVar[bool] = False

    def width(self, d: int) -> int:
        """Width of the table and of what the head reads."""
        return d

    def rows(self, vocab: int) -> int:
        """Rows of the table, and of the head."""
        return vocab

    def table(self, vocab: int, d: int) -> nn.Module:
        """ids [...] -> [..., width]; has `weight`, [vocab, width], the row of every id."""
        return mark(nn.Embedding(vocab, self.width(d)), weight="embedding")

    def head(self, vocab: int, d: int) -> nn.Module:
        """[..., width] -> logits; its matrices are called as the table's, so that they can be tied."""
        return mark(nn.Linear(self.width(d), vocab, bias=False), weight="head")

    def apart(self, z: Tensor) -> Sequence[Tensor]:
        """Products with the head's rows, [..., rows] -> what is softmaxed apart."""
        return (z,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The logits of ids, [..., V], from the logits of what is softmaxed apart."""
        return parts[0]

    def cross_entropy(
        self, x: Tensor, weight: Tensor, targets: Tensor, z_weight: float, bend: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """kernels.linear_cross_entropy without the [N, V] of `join`. bend: LM.bend."""
        raise NotImplementedError

    def nlls(self, parts: Sequence[Tensor], targets: Tensor) -> Tensor:
        """[k] summed cross-entropies in nats.   parts: k of [N, V_i].  targets: ids [N], -100 = none."""
        return F.cross_entropy(parts[0], targets, ignore_index=IGNORE, reduction="sum")[None]

    def widen(self, d: int) -> nn.Module | None:
        """What makes [..., width] from the table into [..., D]; none: nothing."""
        return None

    def narrow(self, d: int) -> nn.Module | None:
        """What makes [..., D] into [..., width] before the head, with a matrix of its own; none: nothing."""
        return None

    def n_parameters(self, d: int) -> int:
        """Besides table and head."""
        return 0

    def refuses(self, spec: Family) -> str | None:
        """Why a model cannot have it; None: it can."""
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
        check_scale(self.scale)

    def widen(self, d: int) -> nn.Module | None:
        return None if self.scale == "none" else Scale(scale_of(self.scale, d), self.scale == "learned")

    def n_parameters(self, d: int) -> int:
        return int(self.scale == "learned")

    def ops(self, d: int) -> Ops:
        return super().ops(d) + (Ops() if self.scale == "none" else Ops(multiplies=d))


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


def scale_of(scale: str | float, d: int) -> float:
    return scale if isinstance(scale, float) else math.sqrt(d)


def check_scale(scale: str | float) -> None:
    if isinstance(scale, float) and not (scale > 0 and math.isfinite(scale)):
        raise ConfigError(f"scale={scale} must be a number above 0; none, sqrt and learned are the other choices")
