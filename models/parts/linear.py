"""Linear maps y = x W^T + b, marked with what they are for.

`matrix` goes into a branch, `residual` is a branch's last one (its initialisation shrinks with depth), `head` gives
logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from models.cost import Ops, product
from models.roles import mark
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class Linear(Part):
    """A kind of linear layer: `build`, `n_parameters`, `ops` (of one token).

    `build(d_in, d_out, bias, role)` gives a module whose `weight` is the latent full-precision matrix [d_out, d_in].
    """

    kinds: ClassVar[dict[str, type]]

    def build(self, d_in: int, d_out: int, bias: bool, role: str) -> nn.Module:
        raise NotImplementedError

    def n_parameters(self, d_in: int, d_out: int, bias: bool) -> int:
        return d_in * d_out + (d_out if bias else 0)

    def ops(self, d_in: int, d_out: int, bias: bool) -> Ops:
        raise NotImplementedError

    def refuses(self, block: BlockSpec) -> str | None:
        return None


@dataclass(frozen=True)
class Dense(Linear):
    """y = W x + b."""

    def build(self, d_in: int, d_out: int, bias: bool, role: str) -> nn.Module:
        layer = nn.Linear(d_in, d_out, bias=bias)
        return mark(layer, weight=role, bias="bias") if bias else mark(layer, weight=role)

    def ops(self, d_in: int, d_out: int, bias: bool) -> Ops:
        return product(d_in, d_out, bias=bias)


Linear.kinds = {"dense": Dense}
