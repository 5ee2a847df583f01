"""Several aligned token streams as one: a table and a head per stream, ids in mixed radix.   k streams, V_i words each.

A position's tokens s_1 .. s_k are one id, s_1 + V_1 (s_2 + V_2 (s_3 + ...)), below V = V_1 V_2 ... V_k. Its embedding
is the sum of the streams' rows and its logit the sum of the streams' logits, so that the softmax over ids is the
product of the streams' softmaxes and cross-entropy over ids is the sum of the k cross-entropies. So whatever knows ids
(memory, generation, scoring) needs to know nothing of streams, and training needs no [N, V].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.linear_cross_entropy import IGNORE, wide_logits
from models.cost import Ops
from models.parts.table import Embedding
from models.spec import ConfigError

if TYPE_CHECKING:
    from models.family import Family


@dataclass(frozen=True)
class Streams(Embedding):
    """x = sum over i of E_i[s_i], logit(s_1 .. s_k) = sum over i of z_i[s_i], z_i = E_i h; k aligned token streams.

    The loss is the sum of the streams' cross-entropies, which is exactly that of the ids. The mean of them is this
    over k: gradients and their norm differ by that constant, so Adam without clipping trains the same. A soft-cap or
    output softmax acts on each z_i, as tanh of a sum is no sum. Given what came before, a position's streams are
    independent of each other.

    sizes: V_1 .. V_k, as many words as each stream has; vocab_size is their product. The first stream is the text's
    """

    joins: ClassVar[bool] = True
    lists: ClassVar[tuple[str, ...]] = ("sizes",)
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or min(self.sizes) < 2:
            raise ConfigError(
                f"sizes={list(self.sizes)} must name the words of two streams or more, at least 2 each, as in "
                "sizes: [65, 2, 12]; for one stream there is embedding=table"
            )

    @classmethod
    def small(cls) -> Streams:
        """Fits the vocabulary that the conformance suite uses."""
        return cls(sizes=(5, 3, 2))

    def refuses(self, spec: Family) -> str | None:
        if spec.vocab_size not in (None, math.prod(self.sizes)):
            product = " x ".join(map(str, self.sizes))
            return (
                f"sizes={list(self.sizes)} make {product} = {math.prod(self.sizes)} ids, and vocab_size is "
                f"{spec.vocab_size}; give the sizes of the streams that the tokens were made of"
            )
        return None

    # ---- ids and streams

    def digits(self, ids: Tensor) -> list[Tensor]:
        """ids [...] -> s_1 .. s_k, each [...]. The last is not reduced, so that an id beyond V stays beyond V_k."""
        found = []
        for size in self.sizes[:-1]:
            found.append(ids % size)
            ids = ids // size
        return [*found, ids]

    def apart(self, z: Tensor) -> Sequence[Tensor]:
        """[..., sum V_i] -> k of [..., V_i]."""
        return z.split(self.sizes, -1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """k of [..., V_i] -> the ids' logits [..., V]: every sum of one logit of each stream."""
        joined = parts[0]
        for part in parts[1:]:
            joined = (part[..., :, None] + joined[..., None, :]).flatten(-2)
        return joined

    # ---- what the model is built of

    def rows(self, vocab: int) -> int:
        return sum(self.sizes)

    def table(self, vocab: int, d: int) -> nn.Module:
        return StreamTable(self, self.width(d), "embedding")

    def head(self, vocab: int, d: int) -> nn.Module:
        return StreamTable(self, self.width(d), "head")

    def ops(self, d: int) -> Ops:
        """k rows, and their sum."""
        return len(self.sizes) * super().ops(d) + Ops(additions=(len(self.sizes) - 1) * self.width(d))

    # ---- the loss

    def cross_entropy(
        self, x: Tensor, weight: Tensor, targets: Tensor, z_weight: float, bend: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """From [N, sum V_i]; the log-normaliser of ids is the sum of the streams'."""
        logits = [bend(part) for part in self.apart(wide_logits(x, weight))]
        nll = self.nlls(logits, targets).sum()
        if not z_weight:
            return nll, nll.detach()
        lse = torch.stack([part.logsumexp(-1) for part in logits]).sum(0)
        return nll + z_weight * (lse.square() * (targets != IGNORE)).sum(), nll.detach()

    def nlls(self, parts: Sequence[Tensor], targets: Tensor) -> Tensor:
        real = targets != IGNORE
        return torch.stack(
            [
                F.cross_entropy(part, digit.where(real, IGNORE), ignore_index=IGNORE, reduction="sum")
                for part, digit in zip(parts, self.digits(targets), strict=True)
            ]
        )


class StreamTable(nn.Module):
    """The rows of all streams, one stream after the other: as a table ids -> sums of rows, as a head the way back."""

    bias = None

    def __init__(self, streams: Streams, width: int, role: str) -> None:
        super().__init__()
        self.streams, self.roles = streams, {"rows": role}
        self.rows = nn.Parameter(torch.empty(sum(streams.sizes), width))

    @property
    def weight(self) -> Tensor:
        """[V, D]: the row of every id, made anew at each call; V is large, so only for what is no training."""
        ids = torch.arange(math.prod(self.streams.sizes), device=self.rows.device)
        return self.look_up(ids)

    def look_up(self, ids: Tensor) -> Tensor:
        x, first = None, 0
        for digit, size in zip(self.streams.digits(ids), self.streams.sizes, strict=True):
            row = F.embedding(digit + first, self.rows)
            x, first = row if x is None else x + row, first + size
        assert x is not None
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.roles["rows"] == "embedding":
            return self.look_up(x)
        return self.streams.join(self.streams.apart(F.linear(x, self.rows)))
