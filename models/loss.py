"""The training loss as one module: what DDP wraps and torch.compile compiles.   B rows, T tokens, N = B T, V words.

Whatever is trained on, plain cross-entropy is reported beside it, so that runs with different losses compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.linear_cross_entropy import IGNORE, linear_cross_entropy, wide_logits, z_loss
from models.memory import At
from models.parts.linear import AdaptiveLinear
from models.spec import ConfigError, Part, kind_of

if TYPE_CHECKING:
    from models.lm import LM


class Objective(Part):
    """What is minimised at each token: `of(logits [N, V], target [N], nll [N], share [N])` -> [N].

    Every target is a real one. share: the token's bytes of text, of the mean; only where `by_bytes` says so, else None.
    """

    kinds: ClassVar[dict[str, type]]
    by_bytes: ClassVar[bool] = False  # whether it has to know how many bytes of text a token stands for

    def of(self, logits: Tensor, target: Tensor, nll: Tensor, share: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def smoothing(self) -> float | None:
        """e, where `of` is cross-entropy with label smoothing e, which needs no [N, V]; None: it is something else."""
        return None

    def of_weights(self, layers: Sequence[AdaptiveLinear]) -> Tensor | None:
        """What the model's weights add at each token, if anything. layers: those that learn their bits."""
        return None

    def rules(self) -> tuple[Objective, ...]:
        """What rules one after the other; `rules()[stage(step)]` does at an update."""
        return (self,)

    def stage(self, step: int) -> int:
        """Which of `rules()` is minimised at an update, counted from 0. Of its number alone, so a resume repeats it."""
        return 0


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-log p(target)."""

    def smoothing(self) -> float | None:
        return 0.0

    def of(self, logits: Tensor, target: Tensor, nll: Tensor, share: Tensor | None = None) -> Tensor:
        return nll


@dataclass(frozen=True)
class Smoothed(Objective):
    """(1 - e) (-log p(target)) + e mean over v of -log p(v).   Source: label smoothing, arXiv:1512.00567.

    epsilon: e, in [0, 1)
    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon={self.epsilon} must lie in (0, 1); 0.1 is usual, cross_entropy has none")

    def smoothing(self) -> float | None:
        return self.epsilon

    def of(self, logits: Tensor, target: Tensor, nll: Tensor, share: Tensor | None = None) -> Tensor:
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

    def of(self, logits: Tensor, target: Tensor, nll: Tensor, share: Tensor | None = None) -> Tensor:
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

    def of(self, logits: Tensor, target: Tensor, nll: Tensor, share: Tensor | None = None) -> Tensor:
        return torch.where(logits.argmax(-1) == target, self.factor * nll, nll)


@dataclass(frozen=True)
class Margin(Objective):
    """-log p(target) + w max(0, m - (z_target - largest other z)): the best token shall lead by a margin.

    z_target - z_other is ln(p(target) / p(other)), so this is the hinge on their ratio, too: a ratio of r is m = ln r.

    margin: m, in logits
    weight: w
    """

    margin: float = 1.0
    weight: float = 0.1

    def __post_init__(self) -> None:
        for name in ("margin", "weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")

    def of(self, logits: Tensor, target: Tensor, nll: Tensor, share: Tensor | None = None) -> Tensor:
        return nll + self.weight * F.relu(self.margin + behind(logits, target))


@dataclass(frozen=True)
class Ratio(Objective):
    """-log p(target) + w r where r = p(other) / p(target) is at most 1, else -log p(target) + w (1 + ln r).

    other is the best token but the target. Unlike a margin it never stops to push. r itself would give a token that is
    far behind a gradient that grows with r, without bound; going on along its tangent keeps that of z_target within w.

    weight: w
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight={self.weight} must be above 0")

    def of(self, logits: Tensor, target: Tensor, nll: Tensor, share: Tensor | None = None) -> Tensor:
        return nll + self.weight * (1 + F.elu(behind(logits, target)))  # elu(d) = e^d - 1 below 0, else d


@dataclass(frozen=True)
class Confident(Objective):
    """-log p(target) + w H(p), H the distribution's entropy; a negative w is the confidence penalty, arXiv:1701.06548.

    weight: w
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        if self.weight == 0:
            raise ValueError("weight=0 is cross_entropy; -0.1 is the usual confidence penalty")

    def of(self, logits: Tensor, target: Tensor, nll: Tensor, share: Tensor | None = None) -> Tensor:
        return nll + self.weight * entropy(logits)


@dataclass(frozen=True)
class Rank(Objective):
    """-log p(target) (1 + w ln(rank) / ln V): tokens that are far from the top weigh more.

    rank: 1 + how many tokens have a larger logit, a constant for the gradient; the last of V weighs 1 + w. Its
    logarithm, because of 50,000 tokens nearly all ranks that occur are small.

    weight: w
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight={self.weight} must be above 0; 0 would be cross_entropy")

    def of(self, logits: Tensor, target: Tensor, nll: Tensor, share: Tensor | None = None) -> Tensor:
        rank = 1 + (logits > logits.gather(-1, target[:, None])).sum(-1)
        return nll * (1 + self.weight * rank.to(nll.dtype).log() / math.log(max(2, logits.shape[-1])))


@dataclass(frozen=True)
class Flatness(Objective):
    """-log p(target) (1 + w H(p) / ln V): tokens of which the model knows little weigh more, up to 1 + w.

    H(p), the distribution's entropy, is a constant for the gradient: it weighs, and is not minimised (`entropy` is).

    weight: w
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight={self.weight} must be above 0; 0 would be cross_entropy")

    def of(self, logits: Tensor, target: Tensor, nll: Tensor, share: Tensor | None = None) -> Tensor:
        return nll * (1 + self.weight * entropy(logits.detach()) / math.log(max(2, logits.shape[-1])))


@dataclass(frozen=True)
class PerByte(Objective):
    """-log p(target) b(target) / mean b: each token weighs as many bytes of UTF-8 text as it stands for.

    So every byte of the text counts the same, and not every token. A token without text (an end of document) weighs
    one byte, or it would not be learned. The mean is that over the vocabulary: a constant, whatever the batch holds.
    """

    by_bytes: ClassVar[bool] = True

    def of(self, logits: Tensor, target: Tensor, nll: Tensor, share: Tensor | None = None) -> Tensor:
        assert share is not None
        return nll * share


@dataclass(frozen=True)
class BitBalanced(Objective):
    """-log p(target) + w b, b the mean bits of a weight in the layers that learn their bits (`adaptive_bits`).

    Without it their bits only grow where that lowers the loss. b is a mean, so w does not depend on the model's size:
    w times as many weights as they have is the weight of a penalty on their sum.

    weight: w
    """

    weight: float = 0.01

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight={self.weight} must be above 0; 0 would be cross_entropy")

    def smoothing(self) -> float | None:
        return 0.0

    def of(self, logits: Tensor, target: Tensor, nll: Tensor, share: Tensor | None = None) -> Tensor:
        return nll

    def of_weights(self, layers: Sequence[AdaptiveLinear]) -> Tensor | None:
        if not layers:
            raise ConfigError(
                "loss=bit_balanced: no layer of the model learns its bits; model.attention.linear=adaptive_bits and "
                "model.mlp.linear=adaptive_bits do"
            )
        bits = torch.stack([layer.bits() * layer.weight.numel() for layer in layers]).sum()
        return self.weight * bits / sum(layer.weight.numel() for layer in layers)


@dataclass(frozen=True)
class Term:
    """loss: an objective.  weight: its factor."""

    loss: Objective = CrossEntropy()
    weight: float = 1.0


@dataclass(frozen=True)
class Sum(Objective):
    """Several objectives, each times its weight. Each holds -log p(target): weights of sum 1 keep that once.

    terms: a list of {loss: ..., weight: ...}
    """

    terms: tuple[Term, ...] = (Term(Margin(), 0.5), Term(Confident(), 0.5))

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("terms=[]: a sum of nothing; give at least one {loss: ..., weight: ...}")
        for term in self.terms:
            if term.weight == 0:
                raise ValueError(f"terms: weight=0 of {kind_of(term.loss)} leaves it out; so should the list")
            _not_a_schedule("terms", term.loss)

    @property
    def by_bytes(self) -> bool:  # type: ignore[override]
        return any(term.loss.by_bytes for term in self.terms)

    def of(self, logits: Tensor, target: Tensor, nll: Tensor, share: Tensor | None = None) -> Tensor:
        each = [term.weight * term.loss.of(logits, target, nll, share) for term in self.terms]
        return torch.stack(each).sum(0)

    def of_weights(self, layers: Sequence[AdaptiveLinear]) -> Tensor | None:
        given = [(term.weight, term.loss.of_weights(layers)) for term in self.terms]
        there = [weight * x for weight, x in given if x is not None]
        return torch.stack(there).sum() if there else None


@dataclass(frozen=True)
class Stage:
    """loss: an objective.  until: the update at which the next one takes over, as `step` in the log counts them."""

    loss: Objective = CrossEntropy()
    until: int | None = None


@dataclass(frozen=True)
class Scheduled(Objective):
    """One objective after the other: each rules the updates up to its `until`, the last one those that are left.

    stages: a list of {loss: ..., until: ...}, the last one without `until`
    """

    stages: tuple[Stage, ...] = (Stage(Smoothed(), 1000), Stage())

    def __post_init__(self) -> None:
        *first, last = [stage.until for stage in self.stages] or [0]
        if last is not None or None in first:
            raise ValueError("stages: every one but the last needs `until`, and the last has none")
        ends = [0, *(until for until in first if until is not None)]
        if any(a >= b for a, b in pairwise(ends)):
            raise ValueError(f"stages: until={', '.join(map(str, ends[1:]))} must grow, from 1 at least")
        for stage in self.stages:
            _not_a_schedule("stages", stage.loss)

    def rules(self) -> tuple[Objective, ...]:
        return tuple(stage.loss for stage in self.stages)

    def stage(self, step: int) -> int:
        return sum(stage.until is not None and step >= stage.until for stage in self.stages)


def _not_a_schedule(where: str, loss: Objective) -> None:
    if isinstance(loss, Scheduled):
        raise ValueError(f"{where}: a schedule stands outermost; its stages may be sums")


def behind(logits: Tensor, target: Tensor) -> Tensor:
    """[N]: by how much the best other token's logit exceeds the target's, ln(p(other) / p(target))."""
    own = logits.gather(-1, target[:, None])[:, 0]
    return logits.scatter(-1, target[:, None], float("-inf")).amax(-1) - own


def entropy(logits: Tensor) -> Tensor:
    """[N] in nats."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


Objective.kinds = {
    "cross_entropy": CrossEntropy,
    "smoothed": Smoothed,
    "focal": Focal,
    "attenuated": Attenuated,
    "margin": Margin,
    "top1_ratio": Ratio,
    "entropy": Confident,
    "rank": Rank,
    "flatness": Flatness,
    "per_byte": PerByte,
    "bit_balanced": BitBalanced,
    "sum": Sum,
    "schedule": Scheduled,
}


class Loss(nn.Module):
    """Next-token loss of a language model over one micro-batch, summed over its targets.

    Summed, not averaged: the mean over the global batch is taken once, by whoever knows the global count.
    z_loss: weight of the squared log-normaliser (1e-4 is common); 0 = none.
    objective: what is minimised; plain cross-entropy never builds its own [N, V] twice.
    token_bytes: [V] bytes of text that each token stands for; only objectives with `by_bytes` read it.
    Losses that parts bring along (load balance) are added per target.
    """

    share: Tensor | None

    def __init__(
        self,
        model: LM,
        z_loss: float = 0.0,
        objective: Objective | None = None,
        token_bytes: Tensor | None = None,
    ):
        super().__init__()
        self.model, self.z_loss = model, z_loss
        self.rules = (CrossEntropy() if objective is None else objective).rules()
        self.bits_learned = [m for m in model.modules() if isinstance(m, AdaptiveLinear)]
        for rule in self.rules:
            rule.of_weights(self.bits_learned)  # raises where there are none to weigh
        share: Tensor | None = None
        if any(rule.by_bytes for rule in self.rules):
            if token_bytes is None:
                raise ConfigError("loss=per_byte: the data's tokenizer does not say how many bytes a token stands for")
            wide = token_bytes.clamp(min=1).to(model.device, torch.float32)
            share = wide / wide.mean()
        self.register_buffer("share", share, persistent=False)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        pos: Tensor | None = None,
        doc: Tensor | None = None,
        stage: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """ids: [B, T].  targets: [B, T], -100 = none.  pos, doc: [B, T] positions and document ids of packed rows.

        stage: `objective.stage(step)`, an int so that each stage compiles to a graph of its own.
        Returns (loss, nll): sums in nats. nll is plain cross-entropy, whatever the training loss is.
        """
        x, at = self._states(ids, pos, doc)
        target = targets.flatten()
        bias = cast(nn.Linear, self.model.get_output_embeddings()).bias
        rule, joins = self.rules[stage], self.model.spec.embedding.joins
        smoothing = rule.smoothing()
        if joins and smoothing == 0:  # [N, V] is much more than [N, sum V_i]
            of = self.model.spec.embedding.cross_entropy
            loss, nll = of(x, self.model.head_weight(), target, self.z_loss, self.model.bend)
        elif smoothing is not None and not joins:
            softmax = self.model.output_softmax
            loss, nll = linear_cross_entropy(
                x, self.model.head_weight(), target, bias=bias, z_weight=self.z_loss, smoothing=smoothing,
                softcap=self.model.spec.logit_softcap, link=None if softmax is None else softmax.log_weights,
            )  # fmt: skip
        else:
            link = self.model.link if self.model.has_link else None
            loss, nll = self._own(rule, wide_logits(x, self.model.head_weight(), bias, link), target)
        if (extra := rule.of_weights(self.bits_learned)) is not None:
            loss = loss + extra * (target != IGNORE).sum()
        for _, extra in (at.tables or {}).get("losses", ()):
            loss = loss + extra * (target != IGNORE).sum()
        return loss, nll

    def nlls(self, ids: Tensor, targets: Tensor, pos: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        """[k] `forward`'s nll of each of the k streams that the embedding has, in nats; their sum is all of it."""
        x, _ = self._states(ids, pos, doc)
        bias = cast(nn.Linear, self.model.get_output_embeddings()).bias
        parts = self.model.spec.embedding.apart(wide_logits(x, self.model.head_weight(), bias))
        return self.model.spec.embedding.nlls([self.model.bend(part) for part in parts], targets.flatten())

    def _states(self, ids: Tensor, pos: Tensor | None, doc: Tensor | None) -> tuple[Tensor, At]:
        """[N, D] before the head, and where the tokens stand, with what parts left in its tables."""
        b, t = ids.shape
        at = At.full(b, t, ids.device)
        if pos is not None or doc is not None:
            at = At(pos=at.pos if pos is None else pos, upto=t, doc=doc)
        at = at._replace(tables={})
        return self.model.hidden(ids, at).flatten(0, 1), at

    def _own(self, rule: Objective, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        real = target != IGNORE
        at = target.clamp(min=0)
        nll = F.cross_entropy(logits, at, reduction="none")
        share = self.share[at] if self.share is not None and rule.by_bytes else None
        loss = torch.where(real, rule.of(logits, at, nll, share), 0.0).sum()
        if self.z_loss:
            loss = loss + self.z_loss * z_loss(logits, target)
        return loss, torch.where(real, nll, 0.0).sum().detach()
