"""What the final norm reads: the last layer's output, or a mixture over depth.   S = 1 + layers sources, D width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cost import Ops
from models.spec import ConfigError, Part


class Depth(Part):
    """A kind of mixture: `build(n_layers, d)` gives a module (sources: S tensors [..., D]) -> [..., D], or none."""

    kinds: ClassVar[dict[str, type]]

    def build(self, n_layers: int, d: int) -> nn.Module | None:
        raise NotImplementedError

    def n_parameters(self, n_layers: int, d: int) -> int:
        raise NotImplementedError

    def ops(self, n_layers: int, d: int) -> Ops:
        raise NotImplementedError

    def refuses(self, n_layers: int) -> str | None:
        return None


@dataclass(frozen=True)
class Last(Depth):
    """x_L: the last layer's output."""

    def build(self, n_layers: int, d: int) -> nn.Module | None:
        return None

    def n_parameters(self, n_layers: int, d: int) -> int:
        return 0

    def ops(self, n_layers: int, d: int) -> Ops:
        return Ops()


@dataclass(frozen=True)
class Weighted(Depth):
    """sum_l w_l x_l over embedding and layers, w trained from one-hot on the last.

    Source: DenseFormer, arXiv:2402.02622.
    """

    def build(self, n_layers: int, d: int) -> nn.Module:
        return WeightedSum(n_layers + 1)

    def n_parameters(self, n_layers: int, d: int) -> int:
        return n_layers + 1

    def ops(self, n_layers: int, d: int) -> Ops:
        return Ops(multiplies=(n_layers + 1) * d, additions=n_layers * d)


@dataclass(frozen=True)
class Routed(Depth):
    """sum over the k best of softmax(W x_L)_l x_l: every token chooses its depths.

    With k = 1 the softmax over one choice is the constant 1 and W would get no gradient, so k is at least 2.

    top_k: k, sources that are mixed
    """

    top_k: int = 2

    def __post_init__(self) -> None:
        if self.top_k < 2:
            raise ConfigError(
                f"top_k={self.top_k}: the softmax over one source is constant, so the router cannot learn"
            )

    def build(self, n_layers: int, d: int) -> nn.Module:
        return Router(n_layers + 1, d, self.top_k)

    def refuses(self, n_layers: int) -> str | None:
        S = n_layers + 1
        return f"top_k={self.top_k} exceeds the {S} sources (embedding and layers)" if self.top_k > S else None

    def n_parameters(self, n_layers: int, d: int) -> int:
        return (n_layers + 1) * d

    def ops(self, n_layers: int, d: int) -> Ops:
        S, k = n_layers + 1, self.top_k
        return Ops(
            multiplies=S * d + k * d, additions=S * d + k * d + S * k, exponentials=k, divisions=k, reductions=1 + k
        )


@dataclass(frozen=True)
class Attended(Depth):
    """sum_l softmax_l(q . x_l / rms(x_l) / sqrt(D)) x_l with q trained from 0: attention of each token over its depths.

    It starts as the mean of all layers.
    """

    def build(self, n_layers: int, d: int) -> nn.Module:
        return DepthAttention(d)

    def n_parameters(self, n_layers: int, d: int) -> int:
        return d

    def ops(self, n_layers: int, d: int) -> Ops:
        S = n_layers + 1
        return Ops(
            multiplies=S * (4 * d + 1),
            additions=S * 3 * d,
            exponentials=S,
            divisions=3 * S,
            reductions=2 + S,
        )


class WeightedSum(nn.Module):
    roles = {"weight": "scalar"}

    def __init__(self, sources: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(sources))
        self.initial = {"weight": self.on_last}

    @staticmethod
    def on_last(weight: Tensor) -> None:
        weight.zero_()
        weight[-1] = 1.0

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        weight = self.weight.to(sources[0].dtype)
        return sum((weight[i] * x for i, x in enumerate(sources[1:], 1)), weight[0] * sources[0])


class Router(nn.Module):
    roles = {"weight": "matrix"}

    def __init__(self, sources: int, d: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sources, d).normal_(std=0.02))
        self.top_k = top_k

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        scores = sources[-1] @ self.weight.to(sources[-1].dtype).T  # [..., S]
        best, which = scores.topk(self.top_k, -1)
        weights = torch.zeros_like(scores).scatter(-1, which, best.softmax(-1).to(scores.dtype))
        return torch.einsum("...s,s...d->...d", weights, torch.stack(list(sources)))


class DepthAttention(nn.Module):
    roles = {"query": "bias"}

    def __init__(self, d: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(d))

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        stack = torch.stack(list(sources), -2)  # [..., S, D]
        scores = F.rms_norm(stack, stack.shape[-1:], eps=1e-6) @ self.query.to(stack.dtype) / self.query.shape[0] ** 0.5
        weights = scores.softmax(-1)[..., None]
        return (weights * stack).sum(-2)


Depth.kinds = {"last": Last, "weighted": Weighted, "routed": Routed, "attended": Attended}
