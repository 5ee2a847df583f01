"""The training loss as one module: what DDP wraps and torch.compile compiles.   B rows, T tokens, N = B T, V words.

Whatever is trained on, plain cross-entropy is reported beside it, so that runs with different losses compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.cross_entropy import IGNORE, linear_cross_entropy, wide_logits, z_loss
from models.memory import At
from models.spec import Part

if TYPE_CHECKING:
    from models.lm import LM


class Objective(Part):
    """What is minimised at each token: `of(logits [N, V], target [N], nll [N])` -> [N]; every target is a real one."""

    kinds: ClassVar[dict[str, type]]

    def of(self, logits: Tensor, target: Tensor, nll: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-log p(target)."""


@dataclass(frozen=True)
class Smoothed(Objective):
    """(1 - e) (-log p(target)) + e mean over v of -log p(v).   Source: label smoothing, arXiv:1512.00567.

    epsilon: e, in [0, 1)
    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon={self.epsilon} must lie in (0, 1); 0.1 is usual, cross_entropy has none")

    def of(self, logits: Tensor, target: Tensor, nll: Tensor) -> Tensor:
        uniform = torch.logsumexp(logits, -1) - logits.mean(-1)
        return (1 - self.epsilon) * nll + self.epsilon * uniform


@dataclass(frozen=True)
class Focal(Objective):
    """(1 - p(target))^g (-log p(target)): tokens that are known already count less.   Source: arXiv:1708.02002.

    gamma: g, above 0
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma} must be above 0; 2 is usual, 0 would be cross_entropy")

    def of(self, logits: Tensor, target: Tensor, nll: Tensor) -> Tensor:
        # 1 - p, and a floor: at p = 1 the power's gradient would be infinite for gamma below 1.
        return (-torch.expm1(-nll)).clamp(min=1e-7) ** self.gamma * nll


@dataclass(frozen=True)
class Attenuated(Objective):
    """-log p(target), times `factor` where the target is the likeliest token already.

    factor: weight of tokens that are right, in [0, 1); 0 skips them
    """

    factor: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.factor < 1:
            raise ValueError(f"factor={self.factor} must lie in [0, 1); 1 would be cross_entropy")

    def of(self, logits: Tensor, target: Tensor, nll: Tensor) -> Tensor:
        return torch.where(logits.argmax(-1) == target, self.factor * nll, nll)


@dataclass(frozen=True)
class Margin(Objective):
    """-log p(target) + w max(0, m - (z_target - largest other z)): the best token shall lead by a margin.

    margin: m, in logits
    weight: w
    """

    margin: float = 1.0
    weight: float = 0.1

    def __post_init__(self) -> None:
        for name in ("margin", "weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")

    def of(self, logits: Tensor, target: Tensor, nll: Tensor) -> Tensor:
        own = logits.gather(-1, target[:, None])
        others = logits.scatter(-1, target[:, None], float("-inf"))
        return nll + self.weight * F.relu(self.margin - own[:, 0] + others.amax(-1))


@dataclass(frozen=True)
class Confident(Objective):
    """-log p(target) + w H(p), H the distribution's entropy; a negative w is the confidence penalty, arXiv:1701.06548.

    weight: w
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        if self.weight == 0:
            raise ValueError("weight=0 is cross_entropy; -0.1 is the usual confidence penalty")

    def of(self, logits: Tensor, target: Tensor, nll: Tensor) -> Tensor:
        logp = logits.log_softmax(-1)
        return nll - self.weight * (logp.exp() * logp).sum(-1)


Objective.kinds = {
    "cross_entropy": CrossEntropy,
    "smoothed": Smoothed,
    "focal": Focal,
    "attenuated": Attenuated,
    "margin": Margin,
    "entropy": Confident,
}


class Loss(nn.Module):
    """Next-token loss of a language model over one micro-batch, summed over its targets.

    Summed, not averaged: the mean over the global batch is taken once, by whoever knows the global count.
    z_loss: weight of the squared log-normaliser (1e-4 is common); 0 = none.
    objective: what is minimised; plain cross-entropy never builds its own [N, V] twice.
    Losses that parts bring along (load balance) are added per target.
    """

    def __init__(self, model: LM, z_loss: float = 0.0, objective: Objective | None = None):
        super().__init__()
        self.model, self.z_loss = model, z_loss
        self.objective = None if isinstance(objective, CrossEntropy) else objective

    def forward(
        self, ids: Tensor, targets: Tensor, pos: Tensor | None = None, doc: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """ids: [B, T].  targets: [B, T], -100 = none.  pos, doc: [B, T] positions and document ids of packed rows.

        Returns (loss, nll): sums in nats. nll is plain cross-entropy, whatever the training loss is.
        """
        b, t = ids.shape
        at = At.full(b, t, ids.device)
        if pos is not None or doc is not None:
            at = At(pos=at.pos if pos is None else pos, upto=t, doc=doc)
        at = at._replace(tables={})
        x, target = self.model.hidden(ids, at).flatten(0, 1), targets.flatten()
        bias = cast(nn.Linear, self.model.get_output_embeddings()).bias
        link = self.model.link if self.model.has_link else None
        if self.objective is None:
            loss, nll = linear_cross_entropy(x, self.model.head_weight(), target, self.z_loss, bias, link)
        else:
            loss, nll = self._own(wide_logits(x, self.model.head_weight(), bias, link), target)
        for _, extra in (at.tables or {}).get("losses", ()):
            loss = loss + extra * (target != IGNORE).sum()
        return loss, nll

    def _own(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        assert self.objective is not None
        real = target != IGNORE
        at = target.clamp(min=0)
        nll = F.cross_entropy(logits, at, reduction="none")
        loss = torch.where(real, self.objective.of(logits, at, nll), 0.0).sum()
        if self.z_loss:
            loss = loss + self.z_loss * z_loss(logits, target)
        return loss, torch.where(real, nll, 0.0).sum().detach()
