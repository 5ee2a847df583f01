"""A layer: mixer and MLP on a residual stream, and the spec of one with every per-layer list resolved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from models.memory import At, Mem
from models.parts.attention import Attention
from models.parts.mlp import MLP
from models.parts.norm import Norm
from models.parts.position import Position
from models.spec import ConfigError, Part, kind_of


@dataclass(frozen=True)
class Layer:
    """Which layer of how many."""

    index: int
    count: int


@dataclass(frozen=True)
class BlockSpec:
    """What one block is built from: single values only. Parts read from it what is not their own."""

    layer: Layer
    d_model: int
    seq_len: int
    bias: bool
    dropout: float
    norm: Norm
    position: Position
    attention: Attention
    mlp: MLP

    def bias_of(self, part: Any) -> bool:
        """The part's own `bias`, or the family's."""
        return self.bias if part.bias is None else part.bias

    def check(self) -> None:
        """Asks every part what it cannot stand beside. Raises ConfigError with the reason."""
        where = f"layer {self.layer.index}: " if self.layer.count > 1 else ""
        for name in ("attention", "position", "norm", "mlp"):
            part = getattr(self, name)
            if reason := part.refuses(self):
                raise ConfigError(f"{name}={kind_of(part)}: {reason}" + (f" ({where[:-2]})" if where else ""))

    def n_parameters(self) -> int:
        norms = 2 * self.norm.n_parameters(self.d_model, self.bias)
        return norms + self.attention.n_parameters(self) + self.mlp.n_parameters(self)


def at_layer(value: Any, layer: Layer, name: str) -> Any:
    """The value of one layer: lists give their entry (there must be one per layer), in a part's options too.

    Raises ConfigError when a list has another length than there are layers.
    """
    if isinstance(value, tuple):
        if len(value) != layer.count:
            raise ConfigError(
                f"{name} lists {len(value)} values for n_layers={layer.count}; give one, or one per layer"
            )
        return at_layer(value[layer.index], layer, name)
    if isinstance(value, Part) and dataclasses.is_dataclass(value):
        options = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        resolved = {k: at_layer(v, layer, f"{name}.{k}") for k, v in options.items()}
        if resolved != options:
            return dataclasses.replace(value, **resolved)
    return value


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): pre-norm."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.mixer_norm = spec.norm.build(spec.d_model, spec.bias)
        self.mixer: Any = spec.attention.build(spec)
        self.mlp_norm = spec.norm.build(spec.d_model, spec.bias)
        self.mlp = spec.mlp.build(spec)
        self.dropout = spec.dropout

    def forward(self, x: Tensor, at: At, mem: Mem | None = None, shared: tuple = ()) -> tuple[Tensor, tuple]:
        y, shared = self.mixer(self.mixer_norm(x), at, mem, shared)  # [B, T, D]
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.mlp_norm(x), at)), shared

    def drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training) if self.dropout else y
