"""How a branch's output o joins the residual stream x.   D model width; x and o are [..., D]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from models.cost import Ops
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class Residual(Part):
    """A kind of residual rule: `build(d)` gives a module (x, o) -> [..., D]."""

    kinds: ClassVar[dict[str, type]]

    def build(self, d: int) -> nn.Module:
        raise NotImplementedError

    def n_parameters(self, d: int) -> int:
        raise NotImplementedError

    def ops(self, d: int) -> Ops:
        raise NotImplementedError

    def refuses(self, block: BlockSpec) -> str | None:
        return None


@dataclass(frozen=True)
class Add(Residual):
    """x + o.   Source: arXiv:1512.03385."""

    def build(self, d: int) -> nn.Module:
        return Sum()

    def n_parameters(self, d: int) -> int:
        return 0

    def ops(self, d: int) -> Ops:
        return Ops(additions=d)


@dataclass(frozen=True)
class Scaled(Residual):
    """x + a o.   Source: learned from 0 it is ReZero, arXiv:2003.04887; fixed, arXiv:2203.00555.

    alpha: a, or where it starts
    learned: whether a is trained
    gated: a = alpha + o . v / sqrt(D) with v trained from 0, so that each token has its own step
    """

    alpha: float = 0.5
    learned: bool = False
    gated: bool = False

    def build(self, d: int) -> nn.Module:
        return ScaledSum(self.alpha, self.learned, d if self.gated else None)

    def n_parameters(self, d: int) -> int:
        return self.learned + (d if self.gated else 0)

    def ops(self, d: int) -> Ops:
        gate = Ops(multiplies=d + 1, additions=d, reductions=1) if self.gated else Ops()
        return Ops(multiplies=d, additions=d) + gate

    def refuses(self, block: BlockSpec) -> str | None:
        if self.alpha == 0 and not self.learned and not self.gated:
            return "a fixed alpha=0 removes the branch; make it learned (rezero) or another number"
        return None


@dataclass(frozen=True)
class ReZero(Scaled):
    """x + a o with a trained from 0: every branch starts silent.   Source: arXiv:2003.04887.

    alpha: where a starts
    learned: whether a is trained
    gated: a = alpha + o . v / sqrt(D) with v trained from 0, so that each token has its own step
    """

    alpha: float = 0.0
    learned: bool = True


@dataclass(frozen=True)
class Slerp(Residual):
    """[sin((1-a) w) x + sin(a w) (x+o)] / sin w, w the angle between x and x+o: a step on the arc between them.

    Where the two are parallel, opposite, or one is zero, the arc is a line: x + a o. Source: Shoemake, SIGGRAPH 1985.

    alpha: a, how far along the arc, or where it starts
    learned: whether a is trained
    eps: below this sine of the angle the line is taken
    """

    alpha: float = 0.5
    learned: bool = False
    eps: float = 1e-3

    def build(self, d: int) -> nn.Module:
        return ArcStep(self.alpha, self.learned, self.eps)

    def n_parameters(self, d: int) -> int:
        return int(self.learned)

    def ops(self, d: int) -> Ops:
        # Three dot products, two norms' roots, one angle, three sines, the weighted sum.
        return Ops(multiplies=5 * d + 4, additions=5 * d + 2, exponentials=4, divisions=5, reductions=3)

    def refuses(self, block: BlockSpec) -> str | None:
        if self.alpha == 0 and not self.learned:
            return "a fixed alpha=0 removes the branch; make it learned or another number"
        return None if 0 < self.eps < 1 else f"eps={self.eps} must lie in (0, 1), or parallel vectors divide 0 by 0"


@dataclass(frozen=True)
class Confidence(Residual):
    """x + o (c + o . v / sqrt(D)): the branch scales itself by how well it fits a learned direction v, from 0.

    constant: c; at 0 the branch starts silent and v alone can wake it
    learned: whether c is trained
    """

    constant: float = 1.0
    learned: bool = True

    def build(self, d: int) -> nn.Module:
        return ScaledSum(self.constant, self.learned, d)

    def n_parameters(self, d: int) -> int:
        return d + self.learned

    def ops(self, d: int) -> Ops:
        return Ops(multiplies=2 * d + 1, additions=2 * d, reductions=1)


class Sum(nn.Module):
    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        return x + o


class ScaledSum(nn.Module):
    """x + (a + o . v / sqrt(D)) o."""

    roles = {"alpha": "scalar", "direction": "bias"}

    def __init__(self, alpha: float, learned: bool, gated: int | None) -> None:
        super().__init__()
        self.start = alpha
        self.alpha = nn.Parameter(torch.tensor(alpha)) if learned else None
        self.direction = nn.Parameter(torch.zeros(gated)) if gated else None
        self.initial = {"alpha": alpha}

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        a: Tensor | float = self.start if self.alpha is None else self.alpha.to(o.dtype)
        if self.direction is not None:
            v = self.direction.to(o.dtype) / self.direction.shape[0] ** 0.5
            a = (o * v).sum(-1, keepdim=True) + a
        return x + a * o


class ArcStep(nn.Module):
    roles = {"alpha": "scalar"}

    def __init__(self, alpha: float, learned: bool, eps: float) -> None:
        super().__init__()
        self.start, self.eps = alpha, eps
        self.alpha = nn.Parameter(torch.tensor(alpha)) if learned else None
        self.initial = {"alpha": alpha}

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        p, q = x.to(wide), (x + o).to(wide)
        a = torch.as_tensor(self.start if self.alpha is None else self.alpha, dtype=wide, device=x.device)
        dot = (p * q).sum(-1, keepdim=True)
        size = (p.square().sum(-1, keepdim=True) * q.square().sum(-1, keepdim=True)).clamp_min(1e-30).sqrt()
        cosine = dot / size
        line = cosine.abs() >= (1 - self.eps**2) ** 0.5
        line = line | (size <= 1e-12)
        # What the line replaces is computed at a right angle instead, or its gradient would be 0 * inf.
        angle = torch.where(line, torch.zeros_like(cosine), cosine).acos()
        arc = (((1 - a) * angle).sin() * p + (a * angle).sin() * q) / angle.sin()
        return torch.where(line, p + a * (q - p), arc).to(x.dtype)


Residual.kinds = {"add": Add, "scaled": Scaled, "rezero": ReZero, "slerp": Slerp, "confidence": Confidence}
