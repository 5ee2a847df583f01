"""Linear cross-entropy: from hidden states and the head matrix to the summed loss.   N tokens, D model, V vocabulary.

loss = sum over targets of  lse(z) - z[target] + z_weight * lse(z)^2,   z = x W^T (+ b).
lse is the log-sum-exp over the vocabulary; the z-loss term keeps it near zero (PaLM, arXiv:2204.02311).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_weight: float = 0.0,
    bias: Tensor | None = None,
    link: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed loss and summed plain cross-entropy, both in nats and float32 (float64 for float64 input).

    x: [N, D].  weight: [V, D].  targets: [N] int64, -100 = no target.  bias: [V] or None.
    link: what stands between the product and the logits (a soft-cap), [N, V] -> [N, V]; none: nothing.
    Returns (loss, nll): nll is cross-entropy alone and carries no gradient when it differs from loss.
    """
    logits = wide_logits(x, weight, bias, link)
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    if not z_weight:
        return nll, nll.detach()
    return nll + z_weight * z_loss(logits, targets), nll.detach()


def wide_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, link: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """[N, V] in float32, or float64 for float64 input."""
    logits = F.linear(x, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if link is None else link(logits)


def z_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of lse^2 over the targets."""
    return (torch.logsumexp(logits, dim=-1).square() * (targets != IGNORE)).sum()
