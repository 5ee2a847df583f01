"""Attention's forward pass on a GPU: online softmax in base 2 over tiles of keys, statistics in float32.

B batch, H query heads, K key heads, G = H / K, T time, h head size, HD = h padded to a power of two. One program is one
tile of BLOCK_M queries of one head. A query i sees the keys first_i .. i, and `first` never falls along a row, so every
tile of keys is one of three: out of sight (never visited), seen by all queries of the tile, or at an edge (masked).
Source: FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.op import power_of_2, tl, triton

LOG2E = math.log2(math.e)
# Where the keys that a query sees begin: at 0, at i - window + 1, or where `first` says (a document, a window in it).
ALL, WINDOW, FIRST = 0, 1, 2
# The largest head the kernels take; above it (MLA's joint keys) the library's form is used.
WIDEST = 128


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one tile, and how the compiler lays it out."""

    m: int
    n: int
    warps: int = 4
    stages: int = 2


def padded(h: int, v: int) -> int:
    """HD: one size for queries, keys and values; at least 64, which keeps the number of compiled kernels small."""
    return power_of_2(max(h, v, 64))


def config(kernel: str, HD: int, dtype: torch.dtype, plain: bool) -> Tile:
    """The tile of `forward`, `keys` (dk and dv) or `queries` (dq). Pure: nothing is tried at run time.

    plain: the triangle alone, without a cap, a window or documents, which need registers of their own.

    Not yet measured on a GPU; chosen so that the tiles and their stages fit into the 163 KiB of shared memory of sm_80
    and the accumulators into registers (`python -m kernels.compiled attention`). float32 multiplies exactly (no TF32),
    outside tensor cores, and its tiles are small because their operands stay in registers.
    """
    if dtype == torch.float32:
        return Tile(16, 16, 4, 1)
    if kernel == "forward":
        return Tile(128, 64 if HD == 64 or plain else 32, 8, 3)
    if kernel == "keys":
        return Tile(32, 128 if HD == 64 else 64, 8, 2)
    return Tile(128 if HD == 64 else 64, 64, 8, 2)


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"  # the latter is not read for 16-bit operands


if triton is not None:

    @triton.jit
    def _tanh(x, EXACT: tl.constexpr):
        t = 2.0 / (1.0 + tl.exp2(x * -2.8853900817779268)) - 1.0  # 2 sigmoid(2x) - 1
        if EXACT:  # near 0 that subtraction keeps the absolute error only, which the cap then multiplies
            z = x * x
            series = x * (1.0 + z * (-1.0 / 3 + z * (2.0 / 15 + z * (-17.0 / 315 + z * 62.0 / 2835))))
            t = tl.where(z < 0.0625, series, t)
        return t

    @triton.jit
    def _rows(x, stride, start, T, SIZE: tl.constexpr, HD: tl.constexpr, BLOCK: tl.constexpr):
        """Rows start .. start + BLOCK - 1 of [T, SIZE] as a tile [BLOCK, HD]; zeros beyond either end.

        The tile's offsets are the same for every start and fit into 32 bits (`rows_first` sees to it).
        """
        t, d = tl.arange(0, BLOCK), tl.arange(0, HD)
        at = x + tl.cast(start, tl.int64) * stride + (t[:, None] * stride + d[None, :])
        if SIZE == HD:
            return tl.load(at, mask=(start + t < T)[:, None], other=0.0)
        return tl.load(at, mask=(start + t < T)[:, None] & (d < SIZE)[None, :], other=0.0)

    @triton.jit
    def _visit(
        acc, total, top, q, k, v, stride_k, stride_v, begin, end, i, first, T, scale2, cap2,
        h: tl.constexpr, hv: tl.constexpr, HD: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
        MASKED: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """The tiles of keys begin .. end - 1. scale2: of products into base 2 (soft-cap: into its argument)."""
        for start in range(begin, end, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            kj = _rows(k, stride_k, start, T, h, HD, BLOCK_N)
            s = tl.dot(q, tl.trans(kj), input_precision=PRECISION) * scale2
            if SOFTCAP:
                s = _tanh(s, EXACT) * cap2
            if MASKED:
                ok = j[None, :] <= i[:, None]
                if EDGE != 0:
                    ok = ok & (j[None, :] >= first[:, None])
                s = tl.where(ok, s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            if MASKED:  # a row that has seen nothing yet stands at -inf, and inf - inf is NaN
                base = tl.where(higher == float("-inf"), 0.0, higher)
            else:
                base = higher
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(p, 1)
            vj = _rows(v, stride_v, start, T, hv, HD, BLOCK_N)
            acc = acc * shrink[:, None]
            acc = tl.dot(p.to(vj.dtype), vj, acc, input_precision=PRECISION)
            top = higher
        return acc, total, top

    @triton.jit
    def _attend(
        q, k, v, y, lse, sink, first,
        q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, y_b, y_h, y_t,
        BH, H, G, T, window, scale2, cap2,
        h: tl.constexpr, hv: tl.constexpr, HD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        EDGE: tl.constexpr, SOFTCAP: tl.constexpr, SINK: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        # Late tiles see the most keys: they start first, in all heads, so that none is left over at the end.
        tiles = tl.cdiv(T, BLOCK_M)
        m = tiles - 1 - tl.program_id(0) // BH
        bh = tl.program_id(0) % BH
        b, head = bh // H, bh % H
        wide = bh.to(tl.int64)
        b64, head64, shared = b.to(tl.int64), head.to(tl.int64), (head // G).to(tl.int64)
        k += b64 * k_b + shared * k_h
        v += b64 * v_b + shared * v_h
        i = m * BLOCK_M + tl.arange(0, BLOCK_M)
        last = tl.minimum((m + 1) * BLOCK_M, T) - 1
        if EDGE == 2:
            row = first + b64 * T
            lo = tl.load(row + i, mask=i < T, other=0)
            lo_tile = tl.load(row + m * BLOCK_M)
        elif EDGE == 1:
            lo = tl.minimum(i, T - 1) - window + 1
            lo_tile = tl.maximum(m * BLOCK_M - window + 1, 0)
        else:
            lo = i
        diagonal = m * BLOCK_M // BLOCK_N * BLOCK_N  # tiles before it end before the first query
        qi = _rows(q + b64 * q_b + head64 * q_h, q_t, m * BLOCK_M, T, h, HD, BLOCK_M)
        acc = tl.zeros([BLOCK_M, HD], tl.float32)
        if SINK:  # a key of that score, already seen
            top = tl.zeros([BLOCK_M], tl.float32) + tl.load(sink + head) * 1.4426950408889634
            total = tl.zeros([BLOCK_M], tl.float32) + 1.0
        else:
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
        # A window or a document is a few tiles wide and most of them are at an edge: one loop, always masked. Two loops
        # more for the tiles between cost registers (they spilled) and three times the compilation.
        if EDGE == 0:
            acc, total, top = _visit(
                acc, total, top, qi, k, v, k_t, v_t, 0, diagonal, i, lo, T, scale2, cap2,
                h, hv, HD, BLOCK_N, EDGE, False, SOFTCAP, EXACT, PRECISION,
            )  # fmt: skip
            begin = diagonal
        else:
            begin = lo_tile // BLOCK_N * BLOCK_N
        acc, total, top = _visit(
            acc, total, top, qi, k, v, k_t, v_t, begin, last + 1, i, lo, T, scale2, cap2,
            h, hv, HD, BLOCK_N, EDGE, True, SOFTCAP, EXACT, PRECISION,
        )  # fmt: skip
        d = tl.arange(0, HD)
        to = y + b64 * y_b + head64 * y_h + i.to(tl.int64)[:, None] * y_t + d[None, :]
        tl.store(to, (acc / total[:, None]).to(y.dtype.element_ty), mask=(i < T)[:, None] & (d < hv)[None, :])
        tl.store(lse + wide * T + i, top + tl.log2(total), mask=i < T)


def edge(window: int | None, first: Tensor | None) -> int:
    return FIRST if first is not None else ALL if window is None else WINDOW


def is_plain(window: int | None, first: Tensor | None, softcap: float | None) -> bool:
    return edge(window, first) == ALL and not softcap


def rows_first(x: Tensor) -> Tensor:
    """x [B, heads, T, size] itself where its last axis is dense and a tile spans under 2^31 numbers; else a copy."""
    return x if x.stride(-1) == 1 and x.stride(2) < 2**23 else x.contiguous()


def new_rows(x: Tensor, heads: int, size: int) -> Tensor:
    """Empty [B, heads, T, size] whose heads lie side by side in memory: merging them afterwards costs nothing."""
    B, T = x.shape[0], x.shape[2]
    return torch.empty((B, T, heads, size), dtype=x.dtype, device=x.device).transpose(1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    first: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, h], k [B, K, T, h], v [B, K, T, hv], first [B, T] -> y [B, H, T, hv], lse [B, H, T].

    lse is log2 of the sum (the sink's part included), in float32.
    """
    B, H, T, h = q.shape
    K, hv = k.shape[1], v.shape[-1]
    y, lse = new_rows(q, H, hv), torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if not y.numel():
        return y, lse
    q, k, v = rows_first(q), rows_first(k), rows_first(v)
    HD = padded(h, hv)
    tile, none = config("forward", HD, q.dtype, is_plain(window, first, softcap)), lse
    _attend[(triton.cdiv(T, tile.m) * B * H,)](
        q, k, v, y, lse, none if sink is None else sink, none if first is None else first,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *y.stride()[:3],
        B * H, H, H // K, T, window or 0, scale / softcap if softcap else scale * LOG2E, (softcap or 0.0) * LOG2E,
        h=h, hv=hv, HD=HD, BLOCK_M=tile.m, BLOCK_N=tile.n, EDGE=edge(window, first), SOFTCAP=bool(softcap),
        SINK=sink is not None, EXACT=q.dtype == torch.float32, PRECISION=precision(q.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y, lse
