"""Linear maps y = x W^T + b, marked with what they are for.

`matrix` goes into a branch, `residual` is a branch's last one (its initialisation shrinks with depth), `head` gives
logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from models.roles import mark
from models.spec import Part


class Linear(Part):
    """A kind of linear layer: `build(d_in, d_out, bias, role)` and `n_parameters(d_in, d_out, bias)`."""

    kinds: ClassVar[dict[str, type]]

    def build(self, d_in: int, d_out: int, bias: bool, role: str) -> nn.Module:
        raise NotImplementedError

    def n_parameters(self, d_in: int, d_out: int, bias: bool) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class Dense(Linear):
    """A full matrix."""

    def build(self, d_in: int, d_out: int, bias: bool, role: str) -> nn.Module:
        layer = nn.Linear(d_in, d_out, bias=bias)
        return mark(layer, weight=role, bias="bias") if bias else mark(layer, weight=role)

    def n_parameters(self, d_in: int, d_out: int, bias: bool) -> int:
        return d_in * d_out + (d_out if bias else 0)


Linear.kinds = {"dense": Dense}
