"""Learned curves of one variable: straight pieces, or a natural cubic spline, between knots (x_0, y_0) ... (x_n, y_n).

Places of knots are stored as x_0 and the logarithm-like inverse of softplus of the distances between them, so that they
stay in order whatever an optimizer does. Curves are computed in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.parts.numeric import wide

GAP = 1e-3  # knots stay at least so far apart, or a slope could divide by zero


def fill(parameter: Tensor, values: list[float]) -> None:
    """Writes numbers into a parameter: an `initial` (models/roles.py) that pickles."""
    parameter.copy_(torch.tensor(values).view(parameter.shape))


def inverse_softplus(y: float) -> float:
    """x with log(1 + e^x) = y, for y > 0."""
    return y + math.log(-math.expm1(-y))


def straight(x: Tensor, xs: Tensor, ys: Tensor, right: Tensor) -> Tensor:
    """Straight pieces between knots: constant left of the first one, of slope `right` beyond the last. Continuous.

    x: any shape.  xs, ys: [n], xs ascending.  right: ().
    """
    slopes = ys.diff() / xs.diff()
    slope = torch.cat([slopes.new_zeros(1), slopes, right.view(1)])
    start = torch.cat([xs[:1], xs])  # of each piece, and the height there
    height = torch.cat([ys[:1], ys])
    return _pieces(x, xs, torch.stack([start, height, slope], -1))


def spline(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Natural cubic spline, with straight ends: value, slope and curvature are continuous everywhere.

    x: any shape.  xs, ys: [n], xs ascending.  M are the second derivatives at the knots, M_0 = M_n = 0, and
    h_(i-1) M_(i-1) + 2 (h_(i-1) + h_i) M_i + h_i M_(i+1) = 6 (slope_i - slope_(i-1)).
    Source: Press et al., Numerical Recipes, section 3.3.
    """
    h = xs.diff()
    slopes = ys.diff() / h
    matrix = torch.diag(2 * (h[:-1] + h[1:])) + torch.diag(h[1:-1], 1) + torch.diag(h[1:-1], -1)
    inner, _ = torch.linalg.solve_ex(matrix, 6 * slopes.diff())  # diagonally dominant, so never singular
    M = F.pad(inner, (1, 1))
    first = slopes - h * (2 * M[:-1] + M[1:]) / 6
    last = slopes[-1:] + h[-1:] * M[-2:-1] / 6
    none = h.new_zeros(1)
    rows = [
        torch.cat([xs[:1], xs]),
        torch.cat([ys[:1], ys]),
        torch.cat([first[:1], first, last]),
        torch.cat([none, M[:-1] / 2, none]),
        torch.cat([none, M.diff() / (6 * h), none]),
    ]
    return _pieces(x, xs, torch.stack(rows, -1))


def _pieces(x: Tensor, xs: Tensor, table: Tensor) -> Tensor:
    """A polynomial per piece. table: [n + 1, 1 + terms], of each piece its start and the coefficients from there."""
    piece = torch.searchsorted(xs.detach(), x.detach().contiguous(), right=True)
    start, *terms = F.embedding(piece, table).unbind(-1)
    t, y = x - start, terms[-1]
    for term in reversed(terms[:-1]):
        y = y * t + term
    return y


class Curve(nn.Module):
    """A learned curve through n equally spaced knots on [-span, span] that starts as `start`; elementwise.

    form: `one` and `last` are straight pieces that go on with slope 1, or the last piece's; `spline` is a cubic spline.
    """

    roles = {"first": "scalar", "gaps": "scalar", "heights": "scalar"}

    def __init__(
        self, n: int, span: float, start: Callable[[float], float], form: Literal["one", "last", "spline"]
    ) -> None:
        super().__init__()
        self.form = form
        h = 2 * span / (n - 1)
        heights = [start(-span + i * h) for i in range(n)]
        gap = inverse_softplus(h - GAP)
        self.first = nn.Parameter(torch.tensor(-span))
        self.gaps = nn.Parameter(torch.full((n - 1,), gap))
        self.heights = nn.Parameter(torch.tensor(heights))
        self.initial = {"first": -span, "gaps": gap, "heights": partial(fill, values=heights)}

    def places(self) -> Tensor:
        """x of the knots, [n], ascending."""
        gaps = F.softplus(wide(self.gaps)) + GAP
        return wide(self.first) + F.pad(gaps.cumsum(0), (1, 0))

    def forward(self, x: Tensor) -> Tensor:
        xs, ys, h = self.places(), wide(self.heights), wide(x)
        if self.form == "spline":
            return spline(h, xs, ys).to(x.dtype)
        last = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]) if self.form == "last" else torch.ones_like(ys[-1])
        return straight(h, xs, ys, last).to(x.dtype)
