"""Linear maps of grouped rows: y_i = W_g x_i + b_g for row i of group g.   n rows, G groups, D in, M out.

Rows of a group lie together; `ends` says where each group ends, on the device, so that torch.compile needs no number of
rows in advance: to it, a call is one node. The groups are a loop of matrix products (a GPU waits once, for `ends`).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.op import NAMESPACE, Op


def grouped_linear_reference(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    """Row by row, in the dtype that is given."""
    group = (torch.arange(x.shape[0], device=x.device)[:, None] >= ends).sum(1)
    y = torch.einsum("nd,nmd->nm", x, weight[group])
    return y if bias is None else y + bias[group]


def _spans(ends: Tensor, rows: int) -> list[tuple[int, int]]:
    """First and last-plus-one row of each group. Rows of no group would be whatever stood in memory."""
    stops = ends.tolist()
    spans = list(pairwise([0, *stops]))
    if [0, *stops][-1] != rows or any(first > stop for first, stop in spans):
        raise ValueError(f"grouped_linear: ends must rise to the {rows} rows there are, and are {stops}")
    return spans


@torch.library.custom_op(f"{NAMESPACE}::grouped_linear", mutates_args=())
def _grouped(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.empty(x.shape[0], weight.shape[1], dtype=x.dtype, device=x.device)
    for g, (first, stop) in enumerate(_spans(ends, x.shape[0])):
        if stop > first:
            y[first:stop] = F.linear(x[first:stop], weight[g], None if bias is None else bias[g])
    return y


@_grouped.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op(f"{NAMESPACE}::grouped_outer", mutates_args=())
def _outer(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """[G, M, D]: the sum of y_i x_i^T over the rows of each group."""
    out = torch.empty(ends.shape[0], y.shape[1], x.shape[1], dtype=y.dtype, device=y.device)
    for g, (first, stop) in enumerate(_spans(ends, x.shape[0])):
        torch.mm(y[first:stop].T, x[first:stop], out=out[g])
    return out


@_outer.register_fake
def _(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return y.new_empty(ends.shape[0], y.shape[1], x.shape[1])


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, ends, bias = inputs
    ctx.save_for_backward(x, weight, ends)
    ctx.has_bias = bias is not None


def _backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
    """dx_i = W_g^T dy_i,   dW_g = sum of dy_i x_i^T,   db_g = sum of dy_i."""
    x, weight, ends = ctx.saved_tensors
    dx = _grouped(dy, weight.transpose(1, 2), ends, None)
    db = _outer(dy, dy.new_ones(dy.shape[0], 1), ends)[..., 0] if ctx.has_bias else None
    return dx, _outer(dy, x, ends), None, db


_grouped.register_autograd(_backward, setup_context=_save)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, D], weight [G, M, D], ends [G] int64, rising to n, bias [G, M] or None, of one dtype -> [n, M].

    Empty groups are allowed; their gradients are zero. Raises ValueError for ends that fall, or do not end with n.
    """
    return _grouped(x, weight, ends, bias)


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """shape: rows, groups, in, out; the second group is empty."""
    n, groups, d, m = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    ends = torch.randint(n + 1, (groups,), generator=generator).sort().values
    ends[1:2], ends[-1] = ends[0], n
    return {"x": draw(n, d), "weight": draw(groups, m, d), "ends": ends, "bias": draw(groups, m)}


OP = Op(
    "grouped_linear",
    grouped_linear,
    grouped_linear_reference,
    _inputs,
    shapes=((1, 1, 1, 1), (7, 3, 5, 9), (33, 4, 16, 8)),
    empty=(0, 2, 3, 4),
    paths=("auto",),
)
