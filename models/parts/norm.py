"""Norms over the last axis, of width D. Statistics are taken in float32 at least, one token at a time."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from kernels.rms_norm import rms_norm
from models.cost import Ops, elementwise
from models.parts.activation import Activation, Tanh
from models.parts.numeric import require, straight_through, wide
from models.roles import mark
from models.spec import Part, kind_of

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class Norm(Part):
    """A kind of norm over width d: `build`, `n_parameters`, `ops` (of one token); bias is the family's default."""

    kinds: ClassVar[dict[str, type]]

    def build(self, d: int, bias: bool) -> nn.Module:
        raise NotImplementedError

    def n_parameters(self, d: int, bias: bool) -> int:
        raise NotImplementedError

    def ops(self, d: int, bias: bool) -> Ops:
        raise NotImplementedError

    def refuses(self, block: BlockSpec) -> str | None:
        return None


@dataclass(frozen=True)
class LayerNorm(Norm):
    """y = (x - mean) / sqrt(variance + eps) * gain + bias.   Source: arXiv:1607.06450.

    eps: added to the variance, > 0
    bias: whether there is a bias; none: as the family's `bias` says
    """

    eps: float = 1e-5
    bias: bool | None = None

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def build(self, d: int, bias: bool) -> nn.Module:
        bias = self.bias if self.bias is not None else bias
        norm = nn.LayerNorm(d, self.eps, bias=bias)
        return mark(norm, weight="gain", bias="bias") if bias else mark(norm, weight="gain")

    def n_parameters(self, d: int, bias: bool) -> int:
        return d * (2 if (self.bias if self.bias is not None else bias) else 1)

    def ops(self, d: int, bias: bool) -> Ops:
        shift = 1 if (self.bias if self.bias is not None else bias) else 0
        return elementwise(d, multiplies=3, additions=3 + shift) + Ops(divisions=2, reductions=2)


@dataclass(frozen=True)
class RMSNorm(Norm):
    """y = x / sqrt(mean(x^2) + eps) * gain.   Source: arXiv:1910.07467.

    eps: added to the mean square, > 0
    gain: whether channels have a learned gain
    """

    eps: float = 1e-5
    gain: bool = True

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def build(self, d: int, bias: bool) -> nn.Module:
        return RootMeanSquareNorm(d, self.eps, self.gain)

    def n_parameters(self, d: int, bias: bool) -> int:
        return d if self.gain else 0

    def ops(self, d: int, bias: bool) -> Ops:
        return _rms_ops(d, d, self.gain)


class RootMeanSquareNorm(nn.Module):
    """RMSNorm; [..., D] -> [..., D] in x's dtype."""

    weight: Tensor | None

    def __init__(self, d: int, eps: float, gain: bool) -> None:
        super().__init__()
        _gain(self, d, gain)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)

    def of_sum(self, x: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
        """x + o and its norm, which a GPU makes in one pass."""
        y, s = rms_norm(x, self.weight, eps=self.eps, residual=o)
        return s, y


@dataclass(frozen=True)
class PartialRMSNorm(Norm):
    """y = x / sqrt(mean(x_1^2 ... x_k^2) + eps) * gain, k = ceil(fraction D).   Source: pRMSNorm, arXiv:1910.07467.

    fraction: share of the channels, the first ones, that the mean square is taken from, in (0, 1]
    eps: added to the mean square, > 0
    """

    fraction: float = 0.0625
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        require(0 < self.fraction <= 1, f"prmsnorm: fraction={self.fraction} must lie in (0, 1]; 0.0625 is usual")

    @classmethod
    def small(cls) -> PartialRMSNorm:
        """More than one channel of a narrow model."""
        return cls(fraction=0.5)

    def channels(self, d: int) -> int:
        """k. Products such as 0.07 * 100 = 7.000000000000001 are not rounded up."""
        return math.ceil(round(self.fraction * d, 9))

    def build(self, d: int, bias: bool) -> nn.Module:
        return SliceNorm(d, range(self.channels(d)), self.eps)

    def n_parameters(self, d: int, bias: bool) -> int:
        return d

    def ops(self, d: int, bias: bool) -> Ops:
        return _rms_ops(d, self.channels(d), True)


@dataclass(frozen=True)
class SliceRMSNorm(Norm):
    """y = x / sqrt(mean of the squares of k channels + eps) * gain.   Source: a krmsnorm as in pRMSNorm, 1910.07467.

    k: number of channels, at most all D
    which: the first or last k channels, or k that are drawn once
    seed: of that draw (the same channels in every layer); none: 0
    bits: the k channels are first rounded to 2^bits equal steps between the token's least and greatest of them (the
        gradient passes through the rounding); none: they are not
    fallback: a token for which the root mean square of the k channels is off by more than this share of the true one
        uses the true one; none: no token does
    eps: added to the mean square, > 0
    """

    k: int = 10
    which: Literal["first", "last", "random"] = "first"
    seed: int | None = None
    bits: Literal[8, 16] | None = None
    fallback: float | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        require(self.k >= 1, f"krmsnorm: k={self.k} must be at least 1")
        require(self.bits in (None, 8, 16), f"krmsnorm: bits={self.bits} must be 8, 16 or none")
        require(
            self.seed is None or self.which == "random",
            f"krmsnorm: seed={self.seed} has no effect with which={self.which}, which draws nothing",
        )
        require(
            self.fallback is None or self.fallback > 0,
            f"krmsnorm: fallback={self.fallback} must be above 0; at 0 every token has the true one, which is rmsnorm",
        )

    def channels(self, d: int) -> list[int]:
        """The k channels, ascending. The draw is by Python's generator, whose numbers do not change with versions."""
        if self.which == "random":
            draw = random.Random(self.seed or 0)
            order = sorted((draw.random(), i) for i in range(d))
            return sorted(i for _, i in order[: self.k])
        k = min(self.k, d)
        return list(range(k)) if self.which == "first" else list(range(d - k, d))

    def build(self, d: int, bias: bool) -> nn.Module:
        return SliceNorm(d, self.channels(d), self.eps, self.bits, self.fallback)

    def n_parameters(self, d: int, bias: bool) -> int:
        return d

    def ops(self, d: int, bias: bool) -> Ops:
        k = min(self.k, d)
        total = _rms_ops(d, k, True)
        if self.bits:
            total += elementwise(k, multiplies=2, additions=5) + Ops(divisions=1, reductions=2)
        if self.fallback:
            total += elementwise(d, multiplies=1, additions=1) + Ops(additions=2, multiplies=1, divisions=1)
            total += Ops(reductions=1)
        return total


class SliceNorm(nn.Module):
    """The root mean square of some channels scales all of them; [..., D] -> [..., D] in x's dtype."""

    weight: Tensor
    index: Tensor

    def __init__(
        self, d: int, channels: range | list[int], eps: float, bits: int | None = None, fallback: float | None = None
    ) -> None:
        super().__init__()
        _gain(self, d, True)
        self.eps, self.bits, self.fallback = eps, bits, fallback
        first, last = channels[0], channels[-1]
        self.channels = list(channels)
        # A slice is a view; any other choice needs an index, which the config gives again after loading.
        self.slice = slice(first, last + 1) if last - first + 1 == len(channels) else None
        if self.slice is None:
            self.register_buffer("index", torch.tensor(self.channels), persistent=False)

    def rebuild_buffers(self) -> None:
        if self.slice is None:
            self.index.copy_(torch.tensor(self.channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is None and self.fallback is None:
            counted = self.index if self.slice is None else (self.slice.start, self.slice.stop)
            return rms_norm(x, self.weight, eps=self.eps, channels=counted)
        h = wide(x)
        part = h.index_select(-1, self.index) if self.slice is None else h[..., self.slice]
        if self.bits:
            part = _stepped(part, self.bits)
        square = part.square().mean(-1, keepdim=True)
        if self.fallback is not None:
            true = h.square().mean(-1, keepdim=True)
            off = (square.sqrt() - true.sqrt()).abs() > self.fallback * true.sqrt()
            square = torch.where(off.detach(), true, square)
        return (h * torch.rsqrt(square + self.eps) * self.weight).to(x.dtype)


def _stepped(x: Tensor, bits: int) -> Tensor:
    """Each row rounded to 2^bits equally spaced values between its least and greatest; the gradient is x's."""
    low, high = x.detach().aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(x.dtype).tiny)
    return straight_through(low + step * ((x - low) / step).round(), x)


@dataclass(frozen=True)
class Hypersphere(Norm):
    """y = R x / sqrt(||x||^2 + eps D) * gain: every token on a sphere of radius R (before the gain).

    Source: nGPT, arXiv:2410.01131, for the sphere; with R = sqrt(D) it is RMSNorm, arXiv:1910.07467.

    radius: R, or where it starts when learned; none: sqrt(D). R is a parameter or a buffer, so checkpoints hold it
    learned_radius: whether R is trained
    gain: whether channels have a learned gain
    scale: c. A fixed R is multiplied by it. A learned R is c times the trained number, which starts at R / c: c then
        scales the number's gradient and step
    eps: added to the mean square, > 0
    """

    radius: float | None = None
    learned_radius: bool = False
    gain: bool = True
    scale: float = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        _check_radius("hypersphere", self.radius)
        require(self.scale > 0, f"hypersphere: scale={self.scale} must be above 0")

    def build(self, d: int, bias: bool) -> nn.Module:
        return SphereNorm(d, self)

    def n_parameters(self, d: int, bias: bool) -> int:
        return (d if self.gain else 0) + self.learned_radius

    def ops(self, d: int, bias: bool) -> Ops:
        return _rms_ops(d, d, self.gain) + Ops(multiplies=1)


class SphereNorm(nn.Module):
    """[..., D] -> [..., D] in x's dtype."""

    weight: Tensor | None
    radius: Tensor

    def __init__(self, d: int, spec: Hypersphere) -> None:
        super().__init__()
        _gain(self, d, spec.gain)
        self.d, self.eps, self.scale = d, spec.eps, spec.scale
        start = math.sqrt(d) if spec.radius is None else spec.radius
        _radius(self, start / spec.scale if spec.learned_radius else start, spec.learned_radius)

    def forward(self, x: Tensor) -> Tensor:
        radius = self.scale / math.sqrt(self.d) * wide(self.radius)
        gain = radius.expand(self.d) if self.weight is None else radius * wide(self.weight)
        return rms_norm(x, gain, eps=self.eps)


@dataclass(frozen=True)
class Capped(Norm):
    """y = x if ||x|| <= R, else R x / ||x||: long vectors are shortened to the sphere, short ones pass.

    Source: projection to a ball, Boyd and Vandenberghe, Convex Optimization, section 8.1.

    radius: R, or where it starts when learned; none: sqrt(D). It is a parameter or a buffer, so checkpoints hold it
    learned_radius: whether R is trained; only tokens beyond it have a say
    """

    radius: float | None = None
    learned_radius: bool = False

    def __post_init__(self) -> None:
        _check_radius("capped", self.radius)

    def build(self, d: int, bias: bool) -> nn.Module:
        return CappedNorm(d, self)

    def n_parameters(self, d: int, bias: bool) -> int:
        return int(self.learned_radius)

    def ops(self, d: int, bias: bool) -> Ops:
        return elementwise(d, multiplies=2, additions=1) + Ops(additions=1, multiplies=1, divisions=2, reductions=1)


class CappedNorm(nn.Module):
    """[..., D] -> [..., D] in x's dtype."""

    radius: Tensor

    def __init__(self, d: int, spec: Capped) -> None:
        super().__init__()
        _radius(self, math.sqrt(d) if spec.radius is None else spec.radius, spec.learned_radius)

    def forward(self, x: Tensor) -> Tensor:
        h = wide(x)
        # Nothing is added to the norm: it is divided by the larger of two, of which one is above 0.
        square = self.radius.to(h.dtype).square().clamp(min=1e-12)
        return (h * (square / h.square().sum(-1, keepdim=True).maximum(square)).sqrt()).to(x.dtype)


@dataclass(frozen=True)
class DynamicTanh(Norm):
    """y = gain * act(alpha x) + bias: no statistic at all.   Source: DyT, arXiv:2503.10622.

    Nothing brings small numbers to size 1, so the source scales embeddings by sqrt(D) (`embedding: {scale: sqrt}`).

    alpha: number that x is multiplied by, or where it starts
    learned_alpha: whether it is trained
    activation: act; tanh in the source
    gain: whether channels have a learned gain
    bias: whether channels have a learned bias
    """

    alpha: float = 1.0
    learned_alpha: bool = True
    activation: Activation = field(default_factory=Tanh)
    gain: bool = True
    bias: bool = True

    def __post_init__(self) -> None:
        require(self.alpha != 0, "dyt: alpha=0 makes every token alike; 1 is usual")

    def build(self, d: int, bias: bool) -> nn.Module:
        return Squash(d, self)

    def n_parameters(self, d: int, bias: bool) -> int:
        return d * (self.gain + self.bias) + self.learned_alpha + self.activation.n_parameters()

    def ops(self, d: int, bias: bool) -> Ops:
        return elementwise(d, multiplies=1 + self.gain, additions=self.bias) + d * self.activation.ops()


class Squash(nn.Module):
    """DyT; [..., D] -> [..., D] in x's dtype."""

    def __init__(self, d: int, spec: DynamicTanh) -> None:
        super().__init__()
        self.act = spec.activation.build()
        self.initial = {"alpha": spec.alpha}
        self.alpha = nn.Parameter(torch.tensor(spec.alpha)) if spec.learned_alpha else spec.alpha
        self.weight = nn.Parameter(torch.ones(d)) if spec.gain else None
        self.bias = nn.Parameter(torch.zeros(d)) if spec.bias else None
        self.roles = {"alpha": "scalar", "weight": "gain", "bias": "bias"}

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(wide(x) * self.alpha)
        h = h if self.weight is None else h * self.weight
        return (h if self.bias is None else h + self.bias).to(x.dtype)


@dataclass(frozen=True)
class NoNorm(Norm):
    """y = x."""

    def build(self, d: int, bias: bool) -> nn.Module:
        return nn.Identity()

    def n_parameters(self, d: int, bias: bool) -> int:
        return 0

    def ops(self, d: int, bias: bool) -> Ops:
        return Ops()

    def refuses(self, block: BlockSpec) -> str | None:
        if block.norm == self and {kind_of(block.placement), kind_of(block.mlp_placement)} != {"pre"}:
            return "it is the same wherever it stands, so a placement has no effect; leave it out"
        return None


def _rms_ops(d: int, k: int, gain: bool) -> Ops:
    """k squares and their mean, a root and its inverse, then d products."""
    squares = elementwise(k, multiplies=1, additions=1) + Ops(divisions=2, reductions=1)
    return squares + elementwise(d, multiplies=1 + gain)


def _gain(module: nn.Module, d: int, wanted: bool) -> None:
    """Gives the module a `weight` of ones, or None."""
    module.weight = nn.Parameter(torch.ones(d)) if wanted else None  # type: ignore[assignment]
    module.roles = {"weight": "gain"}  # type: ignore[assignment]


def _radius(module: nn.Module, start: float, learned: bool) -> None:
    """Gives the module a `radius`: a parameter, or a buffer that checkpoints hold."""
    if learned:
        module.radius = nn.Parameter(torch.tensor(start))
        module.roles = {**getattr(module, "roles", {}), "radius": "scalar"}  # type: ignore[assignment]
        module.initial = {"radius": start}  # type: ignore[assignment]
    else:
        module.register_buffer("radius", torch.tensor(start))


def _check_eps(eps: float) -> None:
    require(eps > 0, f"eps={eps} must be above 0, or a zero vector gives NaN; 1e-5 is usual")


def _check_radius(kind: str, radius: float | None) -> None:
    require(radius is None or radius > 0, f"{kind}: radius={radius} must be above 0; none is sqrt(d_model)")


Norm.kinds = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "prmsnorm": PartialRMSNorm,
    "krmsnorm": SliceRMSNorm,
    "hypersphere": Hypersphere,
    "capped": Capped,
    "dyt": DynamicTanh,
    "identity": NoNorm,
}
