"""Number formats: in what precision parts compute, and rounding that gradients pass through."""

from __future__ import annotations

import torch
from torch import Tensor

from models.spec import ConfigError


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 when it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """Exactly `value` in the forward pass, the gradient of x in the backward pass.   Source: arXiv:1308.3432."""
    return value.detach() + (x - x.detach())


def require(holds: bool, message: str) -> None:
    """Refuses an option. Raises ConfigError with the message unless it holds."""
    if not holds:
        raise ConfigError(message)
