"""Biases that positions add to attention scores.   B batch, T queries, S keys, H heads.

A bias is a module (at, n_keys, cached) -> [B or 1, H, T, S], in float32 at least. Its entries for keys that a query
does not see are finite and mean nothing. One without parameters has a `key`: layers of a call with that key share it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.memory import At
from models.roles import mark


def distances(at: At, n_keys: int, cached: bool) -> tuple[Tensor, Tensor]:
    """Positions of the queries [B or 1, T], and how far each key is away, |i - j|, [B or 1, T, S].

    cached: a key's index is its position; otherwise keys are the call's own tokens.
    """
    pos = at.pos[:1] if at.start is not None else at.pos
    keys = torch.arange(n_keys, device=pos.device)[None] if cached else pos
    return pos, (pos[:, :, None] - keys[:, None, :]).abs()


def alibi_slopes(n_heads: int) -> list[float]:
    """2^(-8 i / n) for i = 1 .. n, n the largest power of two in n_heads; the rest are every other one for 2n heads."""
    n = 2 ** int(math.log2(n_heads))
    return [2 ** (-8 * i / n) for i in range(1, n + 1)] + [2 ** (-4 * i / n) for i in range(1, 2 * (n_heads - n), 2)]


class AlibiBias(nn.Module):
    """-slope_h * |i - j|."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.slopes = alibi_slopes(n_heads)
        self.key: Hashable = ("alibi", n_heads)

    def forward(self, at: At, n_keys: int, cached: bool) -> Tensor:
        away = distances(at, n_keys, cached)[1].to(torch.float32)
        return torch.stack([away * -slope for slope in self.slopes], 1)


class FireBias(nn.Module):
    """MLP_h(psi(|i - j| + eps) / psi(max(i, |m L|) + eps)), psi(u) = ln(c u + b + eps), c = softplus(raw)."""

    roles = {"raw": "scalar", "m": "scalar"}

    def __init__(
        self, n_heads: int, width: int, hidden: int, final_relu: bool, c: float, b: float, threshold: float, eps: float
    ) -> None:
        super().__init__()
        self.b, self.threshold, self.eps, self.final_relu = b, threshold, eps, final_relu
        self.initial = {"raw": math.log(math.expm1(c)), "m": 1.0}
        self.raw = nn.Parameter(torch.empty(()))
        self.m = nn.Parameter(torch.empty(()))
        sizes = [1, *[width] * hidden, n_heads]
        # The last layer has no bias: it would add one number to all scores of a row, which softmax does not see.
        self.layers = nn.ModuleList(
            _curve_layer(d_in, d_out, bias=i < hidden) for i, (d_in, d_out) in enumerate(pairwise(sizes))
        )

    def forward(self, at: At, n_keys: int, cached: bool) -> Tensor:
        pos, away = distances(at, n_keys, cached)
        wide = torch.promote_types(self.m.dtype, torch.float32)
        # Autocast would round the ratio to 8 bits, and far tokens would be told apart no more.
        with torch.autocast(pos.device.type, enabled=False):
            start = (self.m.to(wide) * self.threshold).abs()
            x = self.psi(away.to(wide)) / self.psi(torch.maximum(pos.to(wide), start))[:, :, None]  # [B, T, S]
            x = x[..., None]
            for i, layer in enumerate(self.layers):
                bias = layer.bias.to(wide) if layer.bias is not None else None  # type: ignore[union-attr,operator]
                x = F.linear(x, layer.weight.to(wide), bias)  # type: ignore[union-attr,operator,arg-type]
                if i < len(self.layers) - 1 or self.final_relu:
                    x = F.relu(x)
            return x.permute(0, 3, 1, 2)

    def psi(self, u: Tensor) -> Tensor:
        return (F.softplus(self.raw.to(u.dtype)) * (u + self.eps) + self.b + self.eps).log()


def _curve_layer(d_in: int, d_out: int, bias: bool) -> nn.Linear:
    """A small layer that starts at uniform +-1/sqrt(d_in), whatever the model's matrices start at, without decay."""

    def start(parameter: Tensor) -> None:
        parameter.uniform_(-(d_in**-0.5), d_in**-0.5)

    layer: Any = nn.Linear(d_in, d_out, bias=bias)
    layer.initial = {"weight": start, "bias": start}
    return mark(layer, weight="scalar", bias="scalar") if bias else mark(layer, weight="scalar")
