"""CountSketch: y[b(j)] += s(j) x[j], every number of a row added to one of m buckets with a sign.

n numbers in, m buckets, b(j) a bucket and s(j) = +-1 per number; no scale. For random tables E<Sx, Sy> = <x, y> and
Var = (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_j^2 y_j^2) / m. Nothing is added by two programs or threads at once, and each
bucket's numbers are added in their order in the row, so results repeat bit by bit. The gradient is a gather:
dx[j] = s(j) dy[b(j)].
Source: Charikar, Chen and Farach-Colton, Finding Frequent Items in Data Streams, 2002.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.cpu import array, numba, spread
from kernels.op import NAMESPACE, Build, Op, pick, tl, triton, wide

ROWS, TILE = 8, 128  # of a program: rows, so that tables are read once for them, by buckets or numbers


class CountSketch(NamedTuple):
    """Tables of a sketch. buckets [n] int32; signs [n] int8; and by bucket, for GPUs: order [n] int32, the numbers of
    bucket k at offsets[k] to offsets[k + 1], j where the sign is + and ~j where it is -; offsets [m + 1] int32.
    """

    buckets: Tensor
    signs: Tensor
    order: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, buckets: Tensor, signs: Tensor, m: int) -> CountSketch:
        """Sorts once. Raises ValueError for buckets outside 0..m-1 or signs other than +-1."""
        if buckets.shape != signs.shape or buckets.dim() != 1:
            raise ValueError(f"buckets {tuple(buckets.shape)} and signs {tuple(signs.shape)} must be [n] both")
        if m < 1 or (len(buckets) and not 0 <= int(buckets.min()) <= int(buckets.max()) < m):
            raise ValueError(f"buckets must be 0..{m - 1} for m={m}")
        if not bool((signs.abs() == 1).all()):
            raise ValueError("signs must be +1 or -1")
        order = torch.argsort(buckets, stable=True)
        ends = torch.arange(m + 1, device=buckets.device, dtype=buckets.dtype)
        offsets = torch.searchsorted(buckets[order].contiguous(), ends).int()
        order = torch.where(signs[order] > 0, order, ~order).int()
        return cls(buckets.int().contiguous(), signs.to(torch.int8).contiguous(), order, offsets)

    @classmethod
    def draw(cls, n: int, m: int, generator: torch.Generator | None = None) -> CountSketch:
        """Random buckets and signs, on the CPU."""
        if n < 1 or m < 1:
            raise ValueError(f"a sketch of {n} numbers in {m} buckets is nothing; both must be positive")
        buckets = torch.randint(m, (n,), generator=generator)
        return cls.of(buckets, torch.randint(2, (n,), generator=generator) * 2 - 1, m)


def count_sketch_reference(x: Tensor, buckets: Tensor, signs: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """The definition, float32 at least inside."""
    flat = (x.to(wide(x.dtype)) * signs).reshape(-1, x.shape[-1])
    y = flat.new_zeros(len(flat), len(offsets) - 1).index_add(1, buckets, flat)
    return y.view(*x.shape[:-1], -1 if x.numel() else len(offsets) - 1).to(x.dtype)


if triton is not None:

    @triton.jit
    def _sketch_kernel(x, order, offsets, y, rows, m, x_row, ROWS: tl.constexpr, TILE: tl.constexpr):
        """ROWS rows by TILE buckets: step i adds the i-th number of every bucket, as often as the fullest has one."""
        bucket = tl.program_id(0) * TILE + tl.arange(0, TILE)
        row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        start = tl.load(offsets + bucket, mask=bucket < m, other=0)
        stop = tl.load(offsets + bucket + 1, mask=bucket < m, other=0)
        total = tl.zeros((ROWS, TILE), tl.float32)
        for i in range(0, tl.max(stop - start, 0)):
            full = start + i < stop
            j = tl.load(order + start + i, mask=full, other=0)
            place = tl.where(j < 0, -1 - j, j)[None, :]
            v = tl.load(x + row * x_row + place, mask=(row < rows) & full[None, :], other=0.0).to(tl.float32)
            total += tl.where(j[None, :] < 0, -v, v)
        inside = (row < rows) & (bucket < m)[None, :]
        tl.store(y + row * m + bucket[None, :], total.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _gather_kernel(dy, buckets, signs, dx, rows, n, dy_row, ROWS: tl.constexpr, TILE: tl.constexpr):
        j = tl.program_id(0) * TILE + tl.arange(0, TILE)
        row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        bucket = tl.load(buckets + j, mask=j < n, other=0)[None, :]
        sign = tl.load(signs + j, mask=j < n, other=0).to(tl.float32)[None, :]
        inside = (row < rows) & (j < n)[None, :]
        v = tl.load(dy + row * dy_row + bucket, mask=inside, other=0.0).to(tl.float32) * sign
        tl.store(dx + row * n + j[None, :], v.to(dx.dtype.element_ty), mask=inside)


@cache
def _compiled() -> SimpleNamespace:
    """Numba's functions over rows [first, stop).

    Four rows at once are 1.2 times as fast as one by one, bucket by bucket is 20 times slower. The public function, 32
    rows on one core: 98,560 numbers to 65,536 buckets 1.9 ms, index_add_ 3.1, scatter_add_ 3.2; 11,264 to 8,192, which
    the first cache holds, 0.17, 0.22 and 0.22.
    """
    njit = numba().njit(nogil=True, error_model="numpy")

    @njit
    def scatter(x, buckets, signs, y, first, stop):
        row = first
        while row + 4 <= stop:
            x0, x1, x2, x3 = x[row], x[row + 1], x[row + 2], x[row + 3]
            y0, y1, y2, y3 = y[row], y[row + 1], y[row + 2], y[row + 3]
            y[row : row + 4] = 0
            for j in range(len(buckets)):
                k, s = buckets[j], signs[j]
                y0[k] += x0[j] * s
                y1[k] += x1[j] * s
                y2[k] += x2[j] * s
                y3[k] += x3[j] * s
            row += 4
        while row < stop:
            x0, y0 = x[row], y[row]
            y0[:] = 0
            for j in range(len(buckets)):
                y0[buckets[j]] += x0[j] * signs[j]
            row += 1

    @njit
    def gather(dy, buckets, signs, dx, first, stop):
        for row in range(first, stop):
            g, d = dy[row], dx[row]
            for j in range(len(buckets)):
                d[j] = g[buckets[j]] * signs[j]

    return SimpleNamespace(scatter=scatter, gather=gather)


def _rows_first(x: Tensor) -> Tensor:
    """Numbers of a row side by side; rows may lie anywhere."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op(f"{NAMESPACE}::count_sketch", mutates_args=())
def _sketch(x: Tensor, buckets: Tensor, signs: Tensor, order: Tensor, offsets: Tensor, impl: str) -> Tensor:
    rows, m = len(x), len(offsets) - 1
    if impl == "triton":
        y, x = torch.empty(rows, m, dtype=x.dtype, device=x.device), _rows_first(x)
        grid = (triton.cdiv(m, TILE), triton.cdiv(rows, ROWS))
        _sketch_kernel[grid](x, order.contiguous(), offsets.contiguous(), y, rows, m, x.stride(0), ROWS, TILE)
        return y
    if numba() is None:
        return count_sketch_reference(x, buckets, signs, order, offsets)
    a = x.to(wide(x.dtype)).contiguous()
    y = torch.empty(rows, m, dtype=a.dtype)
    tensors, run = [array(t) for t in (a, buckets.contiguous(), signs.contiguous(), y)], _compiled().scatter
    spread(rows, 65536 // len(buckets) + 4, lambda first, stop: run(*tensors, first, stop))
    return y.to(x.dtype)


@_sketch.register_fake
def _(x: Tensor, buckets: Tensor, signs: Tensor, order: Tensor, offsets: Tensor, impl: str) -> Tensor:
    return torch.empty(x.shape[0], offsets.shape[0] - 1, dtype=x.dtype, device=x.device)


@torch.library.custom_op(f"{NAMESPACE}::count_sketch_backward", mutates_args=())
def _sketch_back(dy: Tensor, buckets: Tensor, signs: Tensor, impl: str) -> Tensor:
    rows, n = len(dy), len(buckets)
    buckets, signs = buckets.contiguous(), signs.contiguous()
    dx = torch.empty(rows, n, dtype=dy.dtype, device=dy.device)
    if impl == "triton":
        dy = _rows_first(dy)
        grid = (triton.cdiv(n, TILE), triton.cdiv(rows, ROWS))
        _gather_kernel[grid](dy, buckets, signs, dx, rows, n, dy.stride(0), ROWS, TILE)
        return dx
    if numba() is None:
        return torch.index_select(dy, 1, buckets) * signs
    g = dy.to(wide(dy.dtype)).contiguous()
    d = torch.empty(rows, n, dtype=g.dtype)
    tensors, run = [array(t) for t in (g, buckets, signs, d)], _compiled().gather
    spread(rows, 65536 // n + 1, lambda first, stop: run(*tensors, first, stop))
    return d.to(dy.dtype)


@_sketch_back.register_fake
def _(dy: Tensor, buckets: Tensor, signs: Tensor, impl: str) -> Tensor:
    return torch.empty(dy.shape[0], buckets.shape[0], dtype=dy.dtype, device=dy.device)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, buckets, signs, _, _, ctx.impl = inputs
    ctx.save_for_backward(buckets, signs)


def _backward(ctx: Any, dy: Tensor) -> tuple:
    """dx[j] = s(j) dy[b(j)]."""
    return _sketch_back(dy, *ctx.saved_tensors, ctx.impl), None, None, None, None, None


_sketch.register_autograd(_backward, setup_context=_save)


def count_sketch(
    x: Tensor, buckets: Tensor, signs: Tensor, order: Tensor, offsets: Tensor, impl: str = "auto"
) -> Tensor:
    """Sketch of the last axis: `count_sketch(x, *CountSketch.draw(n, m))`, tables and x on one device.

    x: [..., n]. Returns [..., m] in x's dtype, under autocast too; sums are kept in float32 at least. The tables must
    be those of one CountSketch, whose `of` has checked them; here only their lengths are.
    Raises ValueError if they do not fit x.
    """
    n, m = x.shape[-1], len(offsets) - 1
    if not len(buckets) == len(signs) == len(order) == n:
        raise ValueError(f"count_sketch: tables for {len(buckets)} numbers do not fit rows of {n}")
    path = pick("count_sketch", x, impl, cpu=True, fits=x.dtype != torch.float64)
    if path == "reference" or not x.numel():
        return count_sketch_reference(x, buckets, signs, order, offsets)
    return _sketch(x.reshape(-1, n), buckets, signs, order, offsets, path).view(*x.shape[:-1], m)


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    """shape: rows, numbers, buckets."""
    rows, n, m = shape
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    return {"x": x.requires_grad_(), **CountSketch.draw(n, m, generator)._asdict()}


def _builds() -> list[Build]:
    numbers = {"rows": "i32", "m": "i32", "x_row": "i32"}
    back = {"buckets": "*i32", "signs": "*i8", "dx": "*bf16", "rows": "i32", "n": "i32", "dy_row": "i32"}
    sizes = {"ROWS": ROWS, "TILE": TILE}
    return [
        *(
            Build(_sketch_kernel, {"x": t, "order": "*i32", "offsets": "*i32", "y": t, **numbers}, sizes)
            for t in ("*bf16", "*fp32")
        ),
        Build(_gather_kernel, {"dy": "*bf16", **back}, sizes),
        Build(_gather_kernel, {"dy": "*fp32", **back, "dx": "*fp32"}, sizes),
    ]


OP = Op(
    "count_sketch",
    count_sketch,
    count_sketch_reference,
    _inputs,
    shapes=((1, 1, 1), (9, 300, 70), (2, 40, 1), (5, 7, 600)),
    empty=(0, 5, 3),
    paths=("triton", "cpu", "reference"),
    builds=_builds,
)
