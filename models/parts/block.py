"""A layer: mixer and MLP on a residual stream, and the spec of one with every per-layer list resolved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from models.cost import Ops
from models.memory import At, Mem
from models.parts.attention import Attention
from models.parts.mlp import MLP
from models.parts.norm import Norm, RootMeanSquareNorm
from models.parts.placement import Placement, Pre
from models.parts.position import Position
from models.parts.residual import Add, Residual, Sum
from models.spec import ConfigError, Part, kind_of


@dataclass(frozen=True)
class Layer:
    """Which layer of how many."""

    index: int
    count: int


@dataclass(frozen=True)
class BlockSpec:
    """What one block is built from: single values only. Parts read from it what is not their own.

    placement, residual: of the mixer's branch; mlp_placement, mlp_residual: of the MLP's.
    parallel: both branches read the same input; the mixer's placement and residual rule hold for both.
    """

    layer: Layer
    d_model: int
    seq_len: int
    bias: bool
    dropout: float
    norm: Norm
    position: Position
    attention: Attention
    mlp: MLP
    placement: Placement = field(default_factory=Pre)
    mlp_placement: Placement = field(default_factory=Pre)
    residual: Residual = field(default_factory=Add)
    mlp_residual: Residual = field(default_factory=Add)
    parallel: bool = False

    def bias_of(self, part: Any) -> bool:
        """The part's own `bias`, or the family's."""
        return self.bias if part.bias is None else part.bias

    def check(self) -> None:
        """Asks every part what it cannot stand beside. Raises ConfigError with the reason."""
        where = f"layer {self.layer.index}: " if self.layer.count > 1 else ""
        for name in ("attention", "position", "norm", "mlp", "residual", "mlp_residual"):
            part = getattr(self, name)
            if reason := part.refuses(self):
                raise ConfigError(f"{name}={kind_of(part)}: {reason}" + (f" ({where[:-2]})" if where else ""))

    def n_norms(self) -> int:
        """Norms of a block. Parallel branches share the one on their input and the one on their sum."""
        if self.parallel:
            return self.placement.before + 2 * self.placement.output + self.placement.after
        return self.placement.n_norms + (self.mlp_placement.n_norms if self.mlp.branches else 0)

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """The sums of a block, one for each branch, or one for both."""
        return (self.residual, self.mlp_residual) if self.mlp.branches and not self.parallel else (self.residual,)

    def own_parameters(self) -> int:
        """Of norms and residual rules, which no layer shares."""
        norms = self.n_norms() * self.norm.n_parameters(self.d_model, self.bias)
        return norms + sum(r.n_parameters(self.d_model) for r in self.residuals)

    def n_parameters(self) -> int:
        return self.own_parameters() + self.attention.n_parameters(self) + self.mlp.n_parameters(self)

    def ops(self, T: int) -> Ops:
        """Operations per token at context T."""
        d = self.d_model
        total = self.n_norms() * self.norm.ops(d, self.bias) + sum((r.ops(d) for r in self.residuals), Ops())
        total += self.attention.ops(self, T) + self.mlp.ops(self)
        return total + Ops(additions=d) if self.parallel else total


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
        lists = value.lists if hasattr(value, "lists") else ()
        resolved = {k: v if k in lists else at_layer(v, layer, f"{name}.{k}") for k, v in options.items()}
        if resolved != options:
            return dataclasses.replace(value, **resolved)
    return value


class Block(nn.Module):
    """Two branches on the residual stream x, mixer first: x = join(x, branch(x)), normed where the placement says.

    mixer, mlp: modules of another layer, when the layers share them; none: the block's own.
    """

    mixer: Any
    mlp: Any
    join_mlp: Any

    def __init__(self, spec: BlockSpec, mixer: nn.Module | None = None, mlp: nn.Module | None = None) -> None:
        super().__init__()
        place, place2 = spec.placement, spec.mlp_placement
        second = spec.mlp.branches and not spec.parallel  # a branch with an input and a sum of its own
        self.parallel, self.has_mlp = spec.parallel, spec.mlp.branches
        self.mixer_norm = self._norm(spec, place.before)
        self._own_or_lent("mixer", mixer, lambda: spec.attention.build(spec))
        self.mixer_output_norm = self._norm(spec, place.output)
        self.join_mixer = spec.residual.build(spec.d_model)
        self.mixer_after_norm = self._norm(spec, place.after)
        self.mlp_norm = self._norm(spec, second and place2.before)
        self._own_or_lent("mlp", mlp, lambda: spec.mlp.build(spec))
        self.mlp_output_norm = self._norm(spec, place.output if spec.parallel else second and place2.output)
        self.join_mlp = spec.mlp_residual.build(spec.d_model) if second else None
        self.mlp_after_norm = self._norm(spec, second and place2.after)
        self.dropout = spec.dropout
        # A plain sum that an RMSNorm reads next is one operation.
        self.sum_then_norm = (
            type(self.join_mixer) is Sum
            and self.mixer_after_norm is None
            and isinstance(self.mlp_norm, RootMeanSquareNorm)
        )

    @staticmethod
    def _norm(spec: BlockSpec, wanted: bool) -> nn.Module | None:
        return spec.norm.build(spec.d_model, spec.bias) if wanted else None

    def _own_or_lent(self, name: str, lent: nn.Module | None, build: Any) -> None:
        """A lent module is no submodule, or its weights would be saved and counted twice."""
        if lent is None:
            setattr(self, name, build())
        else:
            object.__setattr__(self, name, lent)

    def forward(self, x: Tensor, at: At, mem: Mem | None = None, shared: tuple = ()) -> tuple[Tensor, tuple]:
        h = _through(self.mixer_norm, x)  # [B, T, D]
        y, shared = self.mixer(h, at, mem, shared)
        y = self.drop(_through(self.mixer_output_norm, y))
        if self.parallel:
            y = y + self.drop(_through(self.mlp_output_norm, self.mlp(h, at)))
            return _through(self.mixer_after_norm, self.join_mixer(x, y)), shared
        if self.sum_then_norm:
            x, h = self.mlp_norm.of_sum(x, y)  # type: ignore[union-attr,operator]
        else:
            x = _through(self.mixer_after_norm, self.join_mixer(x, y))
            if not self.has_mlp:
                return x, shared
            h = _through(self.mlp_norm, x)
        y = self.drop(_through(self.mlp_output_norm, self.mlp(h, at)))
        return _through(self.mlp_after_norm, self.join_mlp(x, y)), shared

    def drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def matrix_parameters(self) -> int:
        """Elements of the matrices that one application multiplies by, lent ones included."""
        modules = {id(p): p for part in (self, self.mixer, self.mlp) for p in part.parameters()}
        return sum(p.numel() for p in modules.values() if p.dim() == 2)


def _through(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
