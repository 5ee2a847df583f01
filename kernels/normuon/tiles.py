"""NorMuon's update in Triton: every matrix of one shape in each launch, found by a table of addresses.

R rows and C columns of a parameter (m and n); U and O lie in one buffer [batch, short side, long side] that holds tall
matrices transposed, beside wide ones of the same sides. Per element: G and M are read twice, M is written once, U and O
in the products' dtype, W is read and written once; what lies between O and W is numbers per row or column.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels.newton_schulz import HALF, iterate
from kernels.normuon.reference import SMALLEST, Rule
from kernels.op import Build, tl, triton

if triton is not None:

    @triton.jit
    def _matrix(table, index, DTYPE: tl.constexpr):
        """A matrix from its address, which is a multiple of 16."""
        return tl.multiple_of(tl.load(table + index).to(tl.pointer_type(DTYPE)), 16)

    @triton.jit
    def _momentum(
        grads, momenta, u, partial, inverse, R, C, momentum,
        NESTEROV: tl.constexpr, WRITE: tl.constexpr, TALL: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """One tile of one matrix: first its part of |U|_F^2; then (WRITE) M, and U times the inverse norm, wide.

        G and M are read a second time so that U is rounded once, and so that a small gradient survives float16.
        """
        tile, b = tl.program_id(0), tl.program_id(1)
        across = tl.cdiv(C, BLOCK_C)
        rows = (tile // across) * BLOCK_R + tl.arange(0, BLOCK_R)
        cols = (tile % across) * BLOCK_C + tl.arange(0, BLOCK_C)
        within = (rows[:, None] < R) & (cols[None, :] < C)
        here = rows.to(tl.int64)[:, None] * C + cols[None, :]
        mean = _matrix(momenta, b, M)
        g = tl.load(_matrix(grads, b, G) + here, mask=within, other=0.0).to(tl.float32)
        m = tl.load(mean + here, mask=within, other=0.0).to(tl.float32)
        m += (1.0 - momentum) * (g - m)
        v = m
        if NESTEROV:
            v = g + momentum * (m - g)
        if WRITE:
            tl.store(mean + here, m, mask=within)
            to = u + b.to(tl.int64) * R * C
            if TALL:
                to += cols.to(tl.int64)[None, :] * R + rows[:, None]
            else:
                to += here
            tl.store(to, v * tl.load(inverse + b), mask=within)
        else:
            tl.store(partial + b * tl.num_programs(0) + tile, tl.sum(v * v))

    @triton.jit
    def _mean_squares(o, r, R, C, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
        """Means of o^2, o [batch, R, C]: r [batch, R] over the columns (ROWS), or r [batch, C] over the rows."""
        b = tl.program_id(1).to(tl.int64)
        o += b * R * C
        acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        if ROWS:
            rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
            for first in range(0, C, BLOCK_C):
                cols = first + tl.arange(0, BLOCK_C)
                within = (rows[:, None] < R) & (cols[None, :] < C)
                x = tl.load(o + rows.to(tl.int64)[:, None] * C + cols[None, :], mask=within, other=0.0).to(tl.float32)
                acc += x * x
            tl.store(r + b * R + rows, tl.sum(acc, 1) / C, mask=rows < R)
        else:
            cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
            for first in range(0, R, BLOCK_R):
                rows = first + tl.arange(0, BLOCK_R)
                within = (rows[:, None] < R) & (cols[None, :] < C)
                x = tl.load(o + rows.to(tl.int64)[:, None] * C + cols[None, :], mask=within, other=0.0).to(tl.float32)
                acc += x * x
            tl.store(r + b * C + cols, tl.sum(acc, 0) / R, mask=cols < C)

    @triton.jit
    def _statistic(statistics, r, factor, L, count, beta2, smallest, S: tl.constexpr, BLOCK: tl.constexpr):
        """S of one matrix, L numbers, each a mean of `count`, and what its rows or columns are multiplied by.

        |N|_F^2 = count * sum of r / S, so O need not be read for it.
        """
        b = tl.program_id(0)
        state = _matrix(statistics, b, S)
        r += b.to(tl.int64) * L
        factor += b.to(tl.int64) * L
        before = tl.zeros([BLOCK], tl.float32)
        after = tl.zeros([BLOCK], tl.float32)
        for first in range(0, L, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(r + at, mask=at < L, other=0.0)
            s = tl.load(state + at, mask=at < L, other=0.0).to(tl.float32)
            before += x
            after += x / tl.maximum(s + (1.0 - beta2) * (x - s), smallest)
        norm = tl.maximum(tl.sqrt(tl.sum(after) * count), smallest)
        ratio = tl.sqrt(tl.sum(before) * count) / norm
        for first in range(0, L, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(r + at, mask=at < L, other=0.0)
            s = tl.load(state + at, mask=at < L, other=0.0).to(tl.float32)
            s += (1.0 - beta2) * (x - s)
            tl.store(state + at, s, mask=at < L)
            tl.store(factor + at, ratio / tl.sqrt(tl.maximum(s, smallest)), mask=at < L)

    @triton.jit
    def _write(
        params, o, factor, R, C, step, decay,
        CAUTIOUS: tl.constexpr, TALL: tl.constexpr, AXIS: tl.constexpr, W: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """One tile of one W, from O (TALL: its transpose). AXIS: -1 a factor per row, -2 per column, 0 none."""
        tile, b = tl.program_id(0), tl.program_id(1)
        across = tl.cdiv(C, BLOCK_C)
        rows = (tile // across) * BLOCK_R + tl.arange(0, BLOCK_R)
        cols = (tile % across) * BLOCK_C + tl.arange(0, BLOCK_C)
        within = (rows[:, None] < R) & (cols[None, :] < C)
        here = rows.to(tl.int64)[:, None] * C + cols[None, :]
        batch = b.to(tl.int64)
        source = o + batch * R * C
        if TALL:
            source += cols.to(tl.int64)[None, :] * R + rows[:, None]
        else:
            source += here
        x = tl.load(source, mask=within, other=0.0).to(tl.float32)
        if AXIS == -1:
            x *= tl.load(factor + batch * R + rows, mask=rows < R, other=0.0)[:, None]
        elif AXIS == -2:
            x *= tl.load(factor + batch * C + cols, mask=cols < C, other=0.0)[None, :]
        param = _matrix(params, b, W)
        w = tl.load(param + here, mask=within, other=0.0).to(tl.float32)
        shrunk = w
        if CAUTIOUS:
            shrunk = tl.where((x < 0) == (w < 0), w, 0.0)
        tl.store(param + here, w - decay * shrunk - step * x, mask=within)

    KINDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
else:
    KINDS = {}

# Rows, columns and warps of a tile: square where one side of a copy may be transposed. Unmeasured on a GPU.
TILE = (64, 64, 4)
# The same for sums over columns (True) and over rows; numbers and warps of a statistic's step.
SUMS = {True: (16, 256, 8), False: (64, 64, 8)}
STEP = (1024, 4)


def fits(tensors: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether the kernels know the dtypes, and the products' (`dtype`) is one that a GPU multiplies fast."""
    return dtype in HALF and all(t.dtype in KINDS for t in tensors)


@lru_cache(maxsize=64)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses on the device. Where they stay (parameters and states do) they travel once."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def _matrices(t: Tensor) -> list[Tensor]:
    """[..., m, n] -> views [m, n]."""
    return [t] if t.dim() == 2 else [matrix for part in t.unbind(0) for matrix in _matrices(part)]


def _placed(t: Tensor) -> Tensor:
    """t, or a copy of it where it is not contiguous or its address is no multiple of 16."""
    return t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def update(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], statistics: list[Tensor], rule: Rule
) -> None:
    """In place. Newton-Schulz runs once for all matrices that have the same two sides, whichever is the longer."""
    lists = [
        [m for t in tensors if t.numel() for m in _matrices(t)] for tensors in (params, grads, momenta, statistics)
    ]
    placed = [[_placed(m) for m in matrices] for matrices in lists]
    shapes: dict[tuple[Any, ...], list[int]] = {}
    for i, w in enumerate(placed[0]):
        kinds = tuple(tensors[i].dtype for tensors in placed if tensors)
        shapes.setdefault((min(w.shape), max(w.shape), w.shape[0], *kinds), []).append(i)
    for sides in dict.fromkeys(key[:2] for key in shapes):
        _update_sides(
            [[[t[i] for i in at if t] for t in placed] for key, at in shapes.items() if key[:2] == sides], rule
        )
    for ours, theirs in zip(placed, lists, strict=True):
        if theirs is not lists[1]:
            for copy, original in zip(ours, theirs, strict=True):
                if copy is not original:
                    original.copy_(copy)


def _update_sides(groups: list[list[list[Tensor]]], rule: Rule) -> None:
    """groups: parameters, gradients, momenta, statistics (or none) of one shape and dtypes; transposed ones are two."""
    like = groups[0][0][0]
    short, long = sorted(like.shape)
    counts = [len(params) for params, *_ in groups]
    x = torch.empty(sum(counts), short, long, dtype=rule.dtype, device=like.device)
    tables = [[_table(tuple(t.data_ptr() for t in tensors), like.device) for tensors in group] for group in groups]
    kinds = [[KINDS[tensors[0].dtype] for tensors in group if tensors] for group in groups]
    block_r, block_c, warps = TILE
    for group, table, kind, u in zip(groups, tables, kinds, x.split(counts), strict=True):
        m, n = group[0][0].shape
        tiles = triton.cdiv(m, block_r) * triton.cdiv(n, block_c)
        partial = torch.empty(len(u), tiles, dtype=torch.float32, device=like.device)
        inverse = partial
        for write in (False, True):
            _momentum[(tiles, len(u))](
                table[1], table[2], u, partial, inverse, m, n, float(rule.momentum),
                rule.nesterov, write, m > n, kind[1], kind[2], block_r, block_c, num_warps=warps,
            )  # fmt: skip
            inverse = 1.0 / (partial.sum(1).sqrt() + rule.eps)
    x = iterate(x, rule.triples, "triton")
    for group, table, kind, o in zip(groups, tables, kinds, x.split(counts), strict=True):
        m, n = group[0][0].shape
        axis = rule.axis(m, n)
        factor = x
        if axis is not None:
            rows = (axis == -1) != (m > n)  # of O as it lies
            length, count = (short, long) if rows else (long, short)
            sums_r, sums_c, sums_warps = SUMS[rows]
            r = torch.empty(len(o), length, dtype=torch.float32, device=like.device)
            factor = torch.empty_like(r)
            grid = (triton.cdiv(length, sums_r if rows else sums_c), len(o))
            _mean_squares[grid](o, r, short, long, rows, sums_r, sums_c, num_warps=sums_warps)
            _statistic[(len(o),)](
                table[3], r, factor, length, count, float(rule.beta2), SMALLEST, kind[3], STEP[0], num_warps=STEP[1]
            )
        _write[(triton.cdiv(m, block_r) * triton.cdiv(n, block_c), len(o))](
            table[0], o, factor, m, n, float(rule.step(m, n)), float(rule.lr * rule.weight_decay),
            rule.cautious, m > n, axis or 0, kind[0], block_r, block_c, num_warps=warps,
        )  # fmt: skip


def builds() -> list[Build]:
    """Float32 parameters with bfloat16 products: what a GPU runs. Every dtype has the same tiles."""
    if triton is None:
        return []
    block_r, block_c, warps = TILE
    tile = {"BLOCK_R": block_r, "BLOCK_C": block_c}
    sides = {"R": "i32", "C": "i32"}
    found = []
    for write, tall in ((False, False), (True, False), (True, True)):
        types = {"grads": "*i64", "momenta": "*i64", "u": "*bf16", "partial": "*fp32", "inverse": "*fp32", **sides}
        constants = {"NESTEROV": True, "WRITE": write, "TALL": tall, "G": tl.float32, "M": tl.float32, **tile}
        found.append(Build(_momentum, {**types, "momentum": "fp32"}, constants, warps, aligned=("R", "C")))
    for rows, (sums_r, sums_c, sums_warps) in SUMS.items():
        constants = {"ROWS": rows, "BLOCK_R": sums_r, "BLOCK_C": sums_c}
        types = {"o": "*bf16", "r": "*fp32", **sides}
        found.append(Build(_mean_squares, types, constants, sums_warps, aligned=("R", "C")))
    types = {"statistics": "*i64", "r": "*fp32", "factor": "*fp32", "L": "i32", "count": "i32"}
    types |= {"beta2": "fp32", "smallest": "fp32"}
    found.append(Build(_statistic, types, {"S": tl.float32, "BLOCK": STEP[0]}, STEP[1], aligned=("L", "count")))
    for tall, axis, cautious in ((False, -1, True), (False, -2, True), (True, -1, True), (False, 0, False)):
        types = {"params": "*i64", "o": "*bf16", "factor": "*fp32", **sides, "step": "fp32", "decay": "fp32"}
        constants = {"CAUTIOUS": cautious, "TALL": tall, "AXIS": axis, "W": tl.float32, **tile}
        found.append(Build(_write, types, constants, warps, aligned=("R", "C")))
    found.append(Build(_write, types, constants, warps))  # odd sizes
    return found
