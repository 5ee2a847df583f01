"""What softmaxes share: the base class of kinds, and modules that apply a function to rows of scores under a mask.

H heads, T queries, S keys, V vocabulary. A kind builds a module with
    forward(scores [..., H, T, S], seen) -> weights of the same shape and dtype. `seen` (bool, broadcastable; None: all)
        says which keys count. Where it is false, or a score is -inf, the weight is exactly 0; a row without keys has
        weights 0. A row's weights depend on that row's visible keys alone.
    log_weights(z [..., V]) -> [..., V], so that softmax(log_weights(z)) is the kind's output distribution. Finite:
        weights below `FLOOR` count as `FLOOR`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from models.cost import Ops, elementwise
from models.parts.numeric import require, wide
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec

LARGEST = 1e9  # scores are held within +-LARGEST, so that their powers up to the fourth stay finite in float32
FLOOR = 1e-12
ZEROS = "it gives {} the probability 0, whose loss is infinite and without gradient; use it in attention"
HIGHEST = 80.0  # e^80 = 5.5e34, of which float32 can still add thousands


class Softmax(Part):
    """A kind of softmax: `build`, `n_parameters`, `ops` (of one row of n_keys: one query of one head).

    n_heads: heads of the scores; None: the output softmax over a vocabulary row, whose parameters have shape ().
    fused: whether it is plain softmax, so that attention may use the fused kernel.
    sums_to_one: whether the weights of a row do, with default options.
    cancels: options without effect on an output softmax, because they multiply or shift a whole row alike.
    """

    kinds: ClassVar[dict[str, type]]
    fused: ClassVar[bool] = False
    sums_to_one: ClassVar[bool] = True
    cancels: ClassVar[tuple[str, ...]] = ()

    def build(self, n_heads: int | None) -> nn.Module:
        raise NotImplementedError

    def n_parameters(self, n_heads: int | None) -> int:
        return 0

    def ops(self, n_keys: int) -> Ops:
        raise NotImplementedError

    def refuses(self, block: BlockSpec) -> str | None:
        return None

    def refuses_output(self) -> str | None:
        """Why it, or an option of it, cannot give the probabilities of the next token; None: it can."""
        usual = type(self)()
        for name in self.cancels:
            if getattr(self, name) != getattr(usual, name):
                return (
                    f"{name}={getattr(self, name)} has no effect in the output, where a row's weights are normalised "
                    f"to probabilities; leave it at {getattr(usual, name)}"
                )
        return None


def clean(scores: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores in float32 at least, finite and 0 where not seen; and what is seen, in the shape of the scores."""
    visible = scores != -torch.inf
    if seen is not None:
        visible = visible & seen
    return torch.where(visible, wide(scores).clamp(-LARGEST, LARGEST), 0.0), visible


def hide(x: Tensor, visible: Tensor) -> Tensor:
    """x with the least of numbers where not visible: finite, so that a row without keys gives no NaN."""
    return x.masked_fill(~visible, torch.finfo(x.dtype).min / 4)


class Rows(nn.Module):
    """Scores to weights. Kinds say `logs`, the logarithm of the weights before anything divides them."""

    def logs(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def log_weights(self, z: Tensor) -> Tensor:
        return self.logs(wide(z).clamp(-LARGEST, LARGEST)).to(z.dtype)


class Normalised(Rows):
    """y_i = w(x_i) / sum_j w(x_j), from log w."""

    def forward(self, scores: Tensor, seen: Tensor | None = None) -> Tensor:
        z, visible = clean(scores, seen)
        return torch.where(visible, hide(self.logs(z), visible).softmax(-1), 0.0).to(scores.dtype)


def count(visible: Tensor) -> Tensor:
    """How many keys each query sees, [..., T, 1]; at least 1."""
    return visible.sum(-1, keepdim=True).clamp(min=1)


def number(module: Any, name: str, start: float | None, learned: bool, shape: tuple[int, ...]) -> None:
    """Gives a module with `roles` and `initial` a number: a parameter of that shape when learned, else a float."""
    if learned and start is not None:
        setattr(module, name, nn.Parameter(torch.full(shape, start)))
        module.roles[name], module.initial[name] = "scalar", start
    else:
        setattr(module, name, start)


def check_base(kind: str, base: float) -> None:
    require(base > 1, f"{kind}: base={base} must be above 1, or greater scores weigh less")


def normalised_ops(n_keys: int) -> Ops:
    """Maximum, differences, exponentials, sum, and products with its inverse."""
    return elementwise(n_keys, multiplies=1, additions=3, exponentials=1) + Ops(divisions=1, reductions=2)
