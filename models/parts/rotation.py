"""Rotation of queries and keys by position, and what stretches it to longer contexts.   r turned channels of a head.

Pair m = 0 .. r/2 - 1 consists of channels m and m + r/2 and turns by position * f_m radians, f_m = base^(-2m/r). A
scaling changes the f_m once, for all positions, so keys that are already in memory stay right.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.memory import At
from models.spec import Part


class RopeScaling(Part):
    """A kind of scaling: frequencies [r/2] -> frequencies [r/2], and what cos and sin are multiplied by."""

    kinds: ClassVar[dict[str, type]]

    def frequencies(self, f: Tensor, base: float) -> Tensor:
        """f_m = base^(-2m/r), in float32 or float64 -> what is used instead."""
        return f

    def magnitude(self) -> float:
        return 1.0

    def refuses(self, turned: int) -> str | None:
        return None


@dataclass(frozen=True)
class Unscaled(RopeScaling):
    """f."""


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """f / factor: position interpolation.   Source: arXiv:2306.15595.

    factor: how many times longer the context is than in training, above 1
    """

    factor: float = 4.0

    def frequencies(self, f: Tensor, base: float) -> Tensor:
        return f / self.factor

    def refuses(self, turned: int) -> str | None:
        return _factor(self.factor)


@dataclass(frozen=True)
class NTKScaling(RopeScaling):
    """(base * factor^(r/(r-2)))^(-2m/r): the fastest pair stays, the slowest turns `factor` times slower.

    Source: "NTK-aware scaled RoPE", discussed in arXiv:2309.00071, section 3.1.

    factor: how many times longer the context is than in training, above 1
    """

    factor: float = 4.0

    def frequencies(self, f: Tensor, base: float) -> Tensor:
        m = torch.arange(len(f), dtype=f.dtype, device=f.device)
        return f * self.factor ** (-m / (len(f) - 1))  # factor^(r/(r-2) * -2m/r)

    def refuses(self, turned: int) -> str | None:
        if turned < 4:
            return f"ntk needs a fastest and a slowest pair, but {turned} turned channels are one pair"
        return _factor(self.factor)


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """f * w_m + f / factor * (1 - w_m), where w_m falls from 1 to 0 between pairs that turn fast and slow times.

    `fast` and `slow` are turns within the original context; cos and sin are multiplied by `magnitude`.
    Source: YaRN, arXiv:2309.00071, with the ends of the ramp at whole pairs, as its authors' code and transformers do.

    factor: how many times longer the context is than in training, above 1
    original: context of the training that is stretched, in tokens
    fast: pairs that turn more often than this stay as they are
    slow: pairs that turn less often than this are interpolated
    attention: what cos and sin are multiplied by; none: 0.1 ln(factor) + 1
    """

    factor: float = 4.0
    original: int = 1024
    fast: float = 32.0
    slow: float = 1.0
    attention: float | None = None

    @classmethod
    def small(cls) -> YarnScaling:
        """Has its ends among the two pairs of the conformance suite's heads."""
        return cls(original=4096, fast=12.0, slow=0.03)

    def frequencies(self, f: Tensor, base: float) -> Tensor:
        last = 2 * len(f) - 1

        def pair(turns: float) -> float:
            """The (fractional) m that turns so often within the original context."""
            return len(f) * math.log(self.original / (turns * 2 * math.pi)) / math.log(base)

        low, high = max(math.floor(pair(self.fast)), 0), min(math.ceil(pair(self.slow)), last)
        m = torch.arange(len(f), dtype=f.dtype, device=f.device)
        slow = ((m - low) / (high - low if high != low else 1e-3)).clamp(0, 1)
        return f * (1 - slow) + f / self.factor * slow

    def magnitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1 if self.attention is None else self.attention

    def refuses(self, turned: int) -> str | None:
        if self.original < 1:
            return f"original={self.original} must be at least 1 token"
        if not self.fast > self.slow > 0:
            return f"fast={self.fast} must be above slow={self.slow}, and both above 0"
        if self.attention is not None and not self.attention > 0:
            return f"attention={self.attention} must be above 0"
        return _factor(self.factor)


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """f where a turn takes fewer than original/high tokens, f / factor where more than original/low, both between.

    Between: (1 - s) f / factor + s f, s = (original f / 2 pi - low) / (high - low).
    Source: Llama 3.1, arXiv:2407.21783.

    factor: how many times slower the slow pairs turn, above 1
    low: turns within the original context up to which a pair is slow
    high: turns within the original context from which a pair is fast
    original: context of the training that is stretched, in tokens
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    @classmethod
    def small(cls) -> Llama3Scaling:
        """Has its ends among the two pairs of the conformance suite's heads."""
        return cls(original=1500)

    def frequencies(self, f: Tensor, base: float) -> Tensor:
        s = ((self.original * f / (2 * math.pi) - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - s) * f / self.factor + s * f

    def refuses(self, turned: int) -> str | None:
        if self.original < 1:
            return f"original={self.original} must be at least 1 token"
        if not self.high > self.low > 0:
            return f"high={self.high} must be above low={self.low}, and both above 0"
        return _factor(self.factor)


def _factor(factor: float) -> str | None:
    return None if factor > 1 else f"factor={factor} must be above 1; leave scaling out for the trained context"


class Rotation:
    """Turns the first r channels of [B, T, H, h] by position.

    Tables are made once per call and shared by all layers with the same `key`.
    """

    def __init__(
        self, head_dim: int, base: float, turned: int | None = None, scaling: RopeScaling | None = None
    ) -> None:
        self.head_dim, self.base, self.turned = head_dim, base, turned or head_dim
        self.scaling = scaling or Unscaled()
        self.key: Hashable = ("rotary", self.turned, base, self.scaling)

    def angles(self, pos: Tensor, wide: torch.dtype) -> Tensor:
        """[B, T] -> [B, T, r/2] in radians."""
        exponent = torch.arange(0, self.turned, 2, device=pos.device, dtype=wide) / self.turned
        return pos[..., None].to(wide) * self.scaling.frequencies(self.base**-exponent, self.base)

    def tables(self, at: At, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and signed sin, [B or 1, T, 1, r], in float32 (float64 for a float64 model)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        pos = at.pos[:1] if at.start is not None else at.pos
        angle, size = self.angles(pos, wide), self.scaling.magnitude()
        cos, sin = angle.cos(), angle.sin()
        if size != 1.0:
            cos, sin = cos * size, sin * size
        return torch.cat([cos, cos], -1)[:, :, None], torch.cat([-sin, sin], -1)[:, :, None]

    def __call__(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """[x1 cos - x2 sin, x2 cos + x1 sin] for the halves x1, x2: x * cos + (x2, x1) * (-sin, sin)."""
        cos, sin = tables
        if self.turned == self.head_dim:
            return torch.addcmul(x * cos, x.roll(self.turned // 2, -1), sin).to(x.dtype)
        part, rest = x.split((self.turned, self.head_dim - self.turned), -1)
        part = torch.addcmul(part * cos, part.roll(self.turned // 2, -1), sin).to(x.dtype)
        return torch.cat([part, rest], -1)


class StepRotation(Rotation):
    """All pairs turn by one angle, a whole number of equal steps: 2 pi (position mod steps) / steps."""

    def __init__(self, head_dim: int, steps: int, turned: int | None = None) -> None:
        super().__init__(head_dim, 1.0, turned)
        self.steps = steps
        self.key = ("soap", self.turned, steps)

    def angles(self, pos: Tensor, wide: torch.dtype) -> Tensor:
        angle = (pos % self.steps).to(wide) * (2 * math.pi / self.steps)
        return angle[..., None].expand(*angle.shape, self.turned // 2)


RopeScaling.kinds = {
    "none": Unscaled,
    "linear": LinearScaling,
    "ntk": NTKScaling,
    "yarn": YarnScaling,
    "llama3": Llama3Scaling,
}
