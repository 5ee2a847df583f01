"""Position schemes: what tells tokens apart by their place.   B batch, T time, S keys, H heads, h head size.

A scheme may add vectors to the embedding, turn queries and keys in every layer, add to the attention scores, or do none
of it. What happens beyond the context a model was trained on is stated by each; `stretched` makes a model run there.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from models.cost import WIDTH, Ops
from models.parts.position_table import CyclicTables, PositionTable, Sinusoids
from models.parts.rotation import RopeScaling, Rotation, StepRotation, Unscaled
from models.parts.score_bias import AlibiBias, FireBias
from models.spec import ConfigError, Part, kind_of

if TYPE_CHECKING:
    from models.lm import LM
    from models.parts.block import BlockSpec


class Position(Part):
    """A kind of position scheme."""

    kinds: ClassVar[dict[str, type]]

    @property
    def embeds(self) -> bool:
        """Whether it adds to the embedding, so that it belongs to the whole model and not to one layer."""
        return False

    @property
    def turns(self) -> bool:
        """Whether it turns queries and keys."""
        return False

    @property
    def biases(self) -> bool:
        """Whether it adds to attention scores."""
        return False

    @property
    def shared(self) -> bool:
        """Whether one score bias serves all layers, so that it belongs to the whole model and not to one layer."""
        return False

    def embedding(self, d: int, seq_len: int) -> nn.Module | None:
        """What adds positions to the embedding: a module (x [B, T, D], at) -> [B, T, D]."""
        return None

    def rotation(self, head_dim: int) -> Rotation | None:
        """What turns queries and keys of one layer."""
        return None

    def make_bias(self, block: BlockSpec) -> nn.Module | None:
        """A score bias: a module (at, n_keys, cached) -> [B or 1, H, T, S], added to the scaled scores."""
        return None

    def score_bias(self, block: BlockSpec) -> nn.Module | None:
        """The score bias that a layer's mixer owns."""
        return None if self.shared else self.make_bias(block)

    def shared_bias(self, block: BlockSpec) -> nn.Module | None:
        """The score bias that the model owns; its tensor stands in at.tables["score_bias"]."""
        return self.make_bias(block) if self.shared else None

    def n_parameters(self, d: int, seq_len: int) -> int:
        """Of `embedding`."""
        return 0

    def bias_parameters(self, block: BlockSpec) -> int:
        """Of `make_bias`."""
        return 0

    def embedding_ops(self, d: int) -> Ops:
        """Arithmetic per token of adding to the embedding."""
        return Ops()

    def bias_ops(self, block: BlockSpec, T: int) -> Ops:
        """Arithmetic per token of making one score bias at context T."""
        return Ops()

    def rotation_ops(self, block: BlockSpec) -> Ops:
        """Arithmetic per token of turning one layer's queries and keys; the layers share the sines."""
        return Ops()

    def ops(self, block: BlockSpec, T: int) -> Ops:
        """Arithmetic per token of one layer at context T, without `embedding_ops` and a shared bias's `bias_ops`."""
        added = block.attention.scored(block) * block.attention.n_keys(T) if self.biases else 0
        made = Ops() if self.shared else self.bias_ops(block, T)
        return self.rotation_ops(block) + made + Ops(additions=added)

    def refuses(self, block: BlockSpec) -> str | None:
        return None


@dataclass(frozen=True)
class NoPosition(Position):
    """Nothing; causal attention alone tells places apart, weakly.   Source: NoPE, arXiv:2305.19466.

    Beyond the trained context: runs, quality falls.
    """


class Added(Position):
    """What adds a vector per position to the embedding."""

    embeds = property(lambda self: True)  # type: ignore[assignment]

    def embedding_ops(self, d: int) -> Ops:
        return Ops(additions=d, table_bytes=d * WIDTH / 8)


@dataclass(frozen=True)
class Learned(Added):
    """x + W[position], one learned vector per position (GPT-2).

    Beyond the trained context: refused; there is no vector for position seq_len. `stretched` appends rows.
    """

    def embedding(self, d: int, seq_len: int) -> nn.Module | None:
        return PositionTable(d, seq_len)

    def n_parameters(self, d: int, seq_len: int) -> int:
        return d * seq_len


@dataclass(frozen=True)
class Sinusoidal(Added):
    """x + scale * (sin(p f_0), cos(p f_0), sin(p f_1), ...), f_m = base^(-2m/d).   Source: arXiv:1706.03762.

    Beyond the trained context: runs, the loss rises: these sums of waves were never seen.

    base: the slowest wave takes about 2 pi base tokens
    scale: of the waves; 0.03 gives them the size that token embeddings start with (0.02). The paper has 1, beside
        embeddings that are multiplied by sqrt(d)
    """

    base: float = 10000.0
    scale: float = 0.03

    def embedding(self, d: int, seq_len: int) -> nn.Module | None:
        return Sinusoids(d, self.base, self.scale)

    def embedding_ops(self, d: int) -> Ops:
        return Ops(additions=d, multiplies=1.5 * d, exponentials=d)

    def refuses(self, block: BlockSpec) -> str | None:
        if not self.scale > 0:
            return f"scale={self.scale} must be above 0; 0.03 is about the size of embeddings at their start"
        return _base(self.base)


@dataclass(frozen=True)
class Cyclic(Added):
    """x + sum_n W_n[(p + phase) mod n], one learned table of n rows for each length n.   Source: ReaLLM-Forge.

    Beyond the trained context: runs; places repeat after the least common multiple of the lengths (2310 by default).

    lengths: of the tables; without common divisors they tell the most places apart
    random_phase: training adds one random phase to a row's positions, drawn by the dropout generator, so that no place
        is special; otherwise, and always outside of training, the phase is 0
    """

    lengths: tuple[int, ...] = (2, 3, 5, 7, 11)
    random_phase: bool = False
    lists: ClassVar[tuple[str, ...]] = ("lengths",)  # options that are lists themselves and not one value per layer

    def embedding(self, d: int, seq_len: int) -> nn.Module | None:
        return CyclicTables(d, self.lengths, self.random_phase)

    def n_parameters(self, d: int, seq_len: int) -> int:
        return d * sum(self.lengths)

    def embedding_ops(self, d: int) -> Ops:
        return len(self.lengths) * super().embedding_ops(d)

    def refuses(self, block: BlockSpec) -> str | None:
        if not self.lengths or min(self.lengths) < 2:
            return f"lengths={list(self.lengths)}: at least one is needed, and each from 2 on; 2, 3, 5, 7, 11 is usual"
        if len(set(self.lengths)) < len(self.lengths):
            return f"lengths={list(self.lengths)}: two tables of one length are one table; leave one out"
        if math.lcm(*self.lengths) >= 2**31:
            return f"lengths={list(self.lengths)} repeat after 2^31 places or more only; leave some out"
        return None


class Turning(Position):
    """What turns queries and keys. `fraction` of each head's channels is turned."""

    fraction: float
    turns = property(lambda self: True)  # type: ignore[assignment]

    def turned(self, head_dim: int) -> int:
        """Channels of a head that are turned, the leading ones."""
        return round(head_dim * self.fraction)

    def rotation_ops(self, block: BlockSpec) -> Ops:
        heads, h = block.attention.rotated(block)
        r = self.turned(h)
        sines = Ops(exponentials=self._sines(r), multiplies=self._sines(r) / 2)
        return heads * r * Ops(multiplies=2, additions=1) + 1 / block.layer.count * sines

    def _sines(self, r: int) -> int:
        return r

    def refuses(self, block: BlockSpec) -> str | None:
        heads, h = block.attention.rotated(block)
        if not heads:
            kind = kind_of(block.attention)
            return f"it turns queries and keys, and attention={kind} has none to turn; use another scheme in this layer"
        if not 0 < self.fraction <= 1:
            return f"fraction={self.fraction} must lie in (0, 1]"
        if self.fraction == 1 and h % 2:
            return f"it turns pairs of channels, so head_dim={h} must be even; try {max(h - 1, 2)} or {h + 1}"
        r = self.turned(h)
        if abs(r - h * self.fraction) > 1e-6 or r % 2 or r < 2:
            near = min(max(2 * round(h * self.fraction / 2), 2), h)
            return (
                f"it turns pairs of channels, and fraction={self.fraction} of head_dim={h} is no even number; "
                f"try {near / h:.6g}"
            )
        return None


@dataclass(frozen=True)
class Rotary(Turning):
    """Pairs (m, m + r/2) of each query and key are turned by position * base^(-2m/r).   Source: arXiv:2104.09864.

    r = fraction * head size. Pairs are halves apart (as in Llama), not neighbours; converters permute. Beyond the
    trained context: runs, the loss rises steadily, unless `scaling` stretches the angles.

    base: the slowest pair turns by 1/base per token, about
    fraction: of each head's channels that are turned, the leading ones; the rest know no place (partial rotary)
    scaling: how angles are stretched to a context longer than the training's
    """

    base: float = 10000.0
    fraction: float = 1.0
    scaling: RopeScaling = field(default_factory=Unscaled)

    def rotation(self, head_dim: int) -> Rotation | None:
        return Rotation(head_dim, self.base, self.turned(head_dim), self.scaling)

    def refuses(self, block: BlockSpec) -> str | None:
        if reason := super().refuses(block) or _base(self.base):
            return reason
        if reason := self.scaling.refuses(self.turned(block.attention.rotated(block)[1])):
            return f"scaling={kind_of(self.scaling)}: {reason}"
        return None


@dataclass(frozen=True)
class Soap(Turning):
    """All pairs (m, m + r/2) are turned by one angle, 2 pi (position mod steps) / steps.   Source: ReaLLM-Forge.

    Symmetric overlapping angular positions: hardware needs one table of `steps` sines, an eighth of it by symmetry.
    Nothing is kept between calls. Beyond the trained context: runs; places `steps` apart are alike.

    steps: equal steps of a full turn
    fraction: of each head's channels that are turned, the leading ones
    """

    steps: int = 512
    fraction: float = 1.0

    def rotation(self, head_dim: int) -> Rotation | None:
        return StepRotation(head_dim, self.steps, self.turned(head_dim))

    def _sines(self, r: int) -> int:
        return 2

    def refuses(self, block: BlockSpec) -> str | None:
        return super().refuses(block) or (
            None if self.steps >= 2 else f"steps={self.steps} must be at least 2, or all places are alike"
        )


class Biasing(Position):
    """What adds to the attention scores."""

    biases = property(lambda self: True)  # type: ignore[assignment]

    def refuses(self, block: BlockSpec) -> str | None:
        if not block.attention.scored(block):
            return (
                f"it adds to attention scores, and attention={kind_of(block.attention)} has none; use another scheme "
                "in this layer"
            )
        return None


@dataclass(frozen=True)
class ALiBi(Biasing):
    """score - slope_h (i - j), slope_h = 2^(-8h/H), h = 1 .. H.   Source: arXiv:2108.12409.

    Where H is no power of two, the slopes of the power below are filled up with every other one of twice that.
    Beyond the trained context: runs, far tokens fade.
    """

    def make_bias(self, block: BlockSpec) -> nn.Module | None:
        return AlibiBias(block.attention.scored(block))

    def bias_ops(self, block: BlockSpec, T: int) -> Ops:
        keys = block.attention.n_keys(T)
        return 1 / block.layer.count * Ops(additions=keys, multiplies=block.attention.scored(block) * keys)


@dataclass(frozen=True)
class FIRE(Biasing):
    """score + MLP_h(psi(i - j + eps) / psi(max(i, |m L|) + eps)), psi(u) = ln(c u + b + eps).

    c > 0 (a softplus) and m are learned; the MLP is ReLU layers 1 -> width (hidden times) -> H.
    Source: arXiv:2310.04418. Beyond the trained context: runs; distances are seen relative to the query's place, so the
    loss stays about flat for some lengths.

    width: of the hidden layers
    hidden: how many hidden layers; 0: the ratio times one learned number per head
    final_relu: whether a ReLU stands behind the last layer too, so that biases are never negative
    shared: one bias for all layers instead of one for each
    c: where c starts, > 0
    b: added in the logarithm, >= 1, or the logarithm would cross 0
    threshold: L; places before |m L| are measured against |m L|
    eps: keeps the ratio finite, > 0
    """

    width: int = 32
    hidden: int = 1
    final_relu: bool = False
    shared: bool = False  # type: ignore[assignment]
    c: float = 0.1
    b: float = 1.0
    threshold: float = 512.0
    eps: float = 1e-6

    def make_bias(self, block: BlockSpec) -> nn.Module | None:
        H = block.attention.scored(block)
        return FireBias(H, self.width, self.hidden, self.final_relu, self.c, self.b, self.threshold, self.eps)

    def _sizes(self, block: BlockSpec) -> list[tuple[int, int]]:
        sizes = [1, *[self.width] * self.hidden, block.attention.scored(block)]
        return list(itertools.pairwise(sizes))

    def bias_parameters(self, block: BlockSpec) -> int:
        return 2 + sum(a * b for a, b in self._sizes(block)) + self.hidden * self.width

    def bias_ops(self, block: BlockSpec, T: int) -> Ops:
        macs, hidden = sum(a * b for a, b in self._sizes(block)), self.hidden * self.width
        relus = hidden + (block.attention.scored(block) if self.final_relu else 0)
        per_key = Ops(multiplies=macs + 1, additions=macs + hidden + relus + 3, exponentials=1, divisions=1)
        return block.attention.n_keys(T) * per_key + Ops(exponentials=1, additions=3, multiplies=1)

    def refuses(self, block: BlockSpec) -> str | None:
        if reason := super().refuses(block):
            return reason
        if self.hidden < 0 or self.width < 1:
            return f"hidden={self.hidden} must be at least 0 and width={self.width} at least 1"
        if self.hidden == 0 and self.width != 32:
            return f"width={self.width} has no effect with hidden=0; leave it out"
        for name, low in (("c", 0.0), ("threshold", 0.0), ("eps", 0.0)):
            if not getattr(self, name) > low:
                return f"{name}={getattr(self, name)} must be above {low:g}"
        return None if self.b >= 1 else f"b={self.b} must be at least 1: ln(c u + b) is divided by and would cross 0"


@dataclass(frozen=True)
class Mixed(Position):
    """Several schemes at once: one that adds to the embedding, one that turns, one that adds to scores.

    Beyond the trained context: as its parts; a learned table refuses.

    absolute: learned, sinusoidal, cyclic or none
    rotary: rotary, soap or none
    bias: fire, alibi or none
    """

    absolute: Position = field(default_factory=Learned)
    rotary: Position = field(default_factory=Rotary)
    bias: Position = field(default_factory=NoPosition)

    embeds = property(lambda self: self.absolute.embeds)  # type: ignore[assignment]
    turns = property(lambda self: self.rotary.turns)  # type: ignore[assignment]
    biases = property(lambda self: self.bias.biases)  # type: ignore[assignment]
    shared = property(lambda self: self.bias.shared)  # type: ignore[assignment]

    def embedding(self, d: int, seq_len: int) -> nn.Module | None:
        return self.absolute.embedding(d, seq_len)

    def rotation(self, head_dim: int) -> Rotation | None:
        return self.rotary.rotation(head_dim)

    def make_bias(self, block: BlockSpec) -> nn.Module | None:
        return self.bias.make_bias(block)

    def n_parameters(self, d: int, seq_len: int) -> int:
        return self.absolute.n_parameters(d, seq_len)

    def bias_parameters(self, block: BlockSpec) -> int:
        return self.bias.bias_parameters(block)

    def embedding_ops(self, d: int) -> Ops:
        return self.absolute.embedding_ops(d)

    def bias_ops(self, block: BlockSpec, T: int) -> Ops:
        return self.bias.bias_ops(block, T)

    def rotation_ops(self, block: BlockSpec) -> Ops:
        return self.rotary.rotation_ops(block)

    def refuses(self, block: BlockSpec) -> str | None:
        for name, base in (("absolute", Added), ("rotary", Turning), ("bias", Biasing)):
            part = getattr(self, name)
            if not isinstance(part, (base, NoPosition)):
                kinds = ", ".join(kind for kind, cls in Position.kinds.items() if issubclass(cls, base))
                return f"{name}={kind_of(part)} does something else there; there is {kinds}, none"
            if reason := part.refuses(block):
                return f"{name}={kind_of(part)}: {reason}"
        return None


def stretched(model: LM, seq_len: int, rows: Literal["cycle", "small"] = "cycle") -> LM:
    """A copy of a model that runs at a longer context, `seq_len` tokens, with the same weights.

    rows: what a learned position table gets for new positions. "cycle": its own rows again from the first on; "small":
        draws of the size that rows start with, N(0, init_std), always the same ones.
    Other schemes have no limit of their own, so only the limit is raised. Raises ConfigError for a shorter context.
    """
    if seq_len < model.spec.seq_len:
        raise ConfigError(f"seq_len={seq_len} is shorter than the model's {model.spec.seq_len}; it runs there as it is")
    other = copy.deepcopy(model)
    other.config.seq_len = seq_len
    other.spec = other.config.spec
    if isinstance(other.position, PositionTable):
        table = other.position.weight
        n, d = table.shape
        if rows == "cycle":
            new = table.data[torch.arange(seq_len, device=table.device) % n]
        else:
            draws = torch.randn(seq_len - n, d, generator=torch.Generator().manual_seed(0)) * other.spec.init_std
            new = torch.cat([table.data, draws.to(table)])
        other.position.weight = nn.Parameter(new, table.requires_grad)
    return other


def _base(base: float) -> str | None:
    return None if base > 1 else f"base={base} must be above 1; 10000 is usual"


Position.kinds = {
    "none": NoPosition,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "cyclic": Cyclic,
    "rotary": Rotary,
    "soap": Soap,
    "fire": FIRE,
    "alibi": ALiBi,
    "mixed": Mixed,
}
