"""Exact top-k search in Triton: tiles of queries by keys on tensor cores, the k best of each query kept beside them.

A score and its id are one int64: the score's bits as an integer that orders as it does, above the id's complement, so
that one comparison finds the larger score and among equals the lower id. A tile gives up its largest as long as they
beat the smallest that is kept: after the first k keys that is about k / t of them in the t-th tile, so most of the work
is the product. Several programs share a query's keys; their lists are joined by one sort. Nothing here has been timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.op import Build, power_of_2, tl, triton

MOST = 128  # k that a program keeps
TARGET = 132 * 2  # programs worth starting


@dataclass(frozen=True)
class Config:
    """A tile of QUERIES by KEYS, DEPTH of r at a time; K of each query are kept."""

    QUERIES: int
    KEYS: int
    DEPTH: int
    K: int
    num_warps: int


def config(k: int, dtype: torch.dtype) -> Config:
    """K is a power of two from 32 up. float32 products, which no tensor core makes, need registers: a smaller tile."""
    K = max(32, power_of_2(k))
    if dtype == torch.float32:
        return Config(16, 64, 16, K, 4)
    return Config(32, 128 if K <= 64 else 64, 64, K, 4)


def splits(B: int, N: int, c: Config) -> int:
    """Programs that share the keys of a query: enough to fill the GPU, each with 16 tiles at least."""
    return max(1, min(TARGET // max(1, -(-B // c.QUERIES)), N // (16 * c.KEYS)))


if triton is not None:

    @triton.jit
    def _search_kernel(
        q, keys, found, B, N, r, span, q_row, key_row,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        """found [B, splits, K] int64, unsorted: the best of keys [split * span, (split + 1) * span)."""
        row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
        inner = tl.arange(0, DEPTH)
        first = tl.program_id(1) * span
        # Different among themselves and below every score, so that one at a time is replaced.
        empty = -9223372036854775807 + tl.arange(0, K).to(tl.int64)
        best = tl.broadcast_to(empty[None, :], (QUERIES, K))
        q_at = q + row.to(tl.int64)[:, None] * q_row + inner[None, :]
        for base in range(first, tl.minimum(first + span, N), KEYS):
            name = base + tl.arange(0, KEYS)
            key_at = keys + name.to(tl.int64)[None, :] * key_row + inner[:, None]
            score = tl.zeros((QUERIES, KEYS), tl.float32)
            for d in range(0, r, DEPTH):
                a = tl.load(q_at + d, mask=(row < B)[:, None] & (d + inner < r)[None, :], other=0.0)
                b = tl.load(key_at + d, mask=(name < N)[None, :] & (d + inner < r)[:, None], other=0.0)
                score = tl.dot(a, b, score, input_precision="ieee")
            bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is 0
            bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            packed = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - name).to(tl.int64)[None, :]
            valid = (name < tl.minimum(first + span, N))[None, :] & (row < B)[:, None]
            packed = tl.where(valid, packed, -9223372036854775807 - 1)
            top, low = tl.max(packed, 1), tl.min(best, 1)
            more = tl.max((top > low).to(tl.int32), 0)
            while more > 0:
                better = (top > low)[:, None]
                best = tl.where(better & (best == low[:, None]), top[:, None], best)
                packed = tl.where(better & (packed == top[:, None]), -9223372036854775807 - 1, packed)
                top, low = tl.max(packed, 1), tl.min(best, 1)
                more = tl.max((top > low).to(tl.int32), 0)
        slot = tl.program_id(1) * K + tl.arange(0, K)
        to = found + row.to(tl.int64)[:, None] * (tl.num_programs(1) * K) + slot[None, :]
        tl.store(to, best, mask=(row < B)[:, None])

    @triton.jit
    def _query_gradient_kernel(ds, ids, keys, dq, r, k, key_row, WIDTH: tl.constexpr):
        """dq of one query and WIDTH numbers: its k keys, one after the other."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        total = tl.zeros((WIDTH,), tl.float32)
        for i in range(0, k):
            name = tl.load(ids + row * k + i)
            g = tl.load(ds + row * k + i)
            total += g * tl.load(keys + name * key_row + column, mask=column < r, other=0.0).to(tl.float32)
        tl.store(dq + row * r + column, total.to(dq.dtype.element_ty), mask=column < r)

    @triton.jit
    def _key_gradient_kernel(ds, order, offsets, q, dkeys, r, k, q_row, WIDTH: tl.constexpr):
        """dkeys of one key and WIDTH numbers: the queries that chose it, in their order; zeros where none did."""
        name = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        total = tl.zeros((WIDTH,), tl.float32)
        for i in range(tl.load(offsets + name), tl.load(offsets + name + 1)):
            place = tl.load(order + i)
            g = tl.load(ds + place)
            total += g * tl.load(q + (place // k) * q_row + column, mask=column < r, other=0.0).to(tl.float32)
        tl.store(dkeys + name * r + column, total.to(dkeys.dtype.element_ty), mask=column < r)


def _rows_first(x: Tensor) -> Tensor:
    """Numbers of a row side by side; rows may lie anywhere."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def search(q: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """q [B, r], keys [N, r] of one dtype -> scores [B, k] in float32, ids [B, k]."""
    (B, r), N = q.shape, len(keys)
    q, keys, c = _rows_first(q), _rows_first(keys), config(k, q.dtype)
    parts = splits(B, N, c)
    span = -(-N // (parts * c.KEYS)) * c.KEYS
    found = torch.empty(B, parts * c.K, dtype=torch.int64, device=q.device)
    _search_kernel[(triton.cdiv(B, c.QUERIES), parts)](
        q, keys, found, B, N, r, span, q.stride(0), keys.stride(0), c.QUERIES, c.KEYS, c.DEPTH, c.K,
        num_warps=c.num_warps, num_stages=2,
    )  # fmt: skip
    best = found.topk(k, dim=1).values  # no two are equal
    ids = 0x7FFFFFFF - (best & 0xFFFFFFFF)
    bits = (best >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32), ids


def gradients(ds: Tensor, ids: Tensor, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """dq [B, r], dkeys [N, r] in the dtypes of q and keys; ds in float32. Sorted by key, no atomics."""
    (B, k), (N, r) = ids.shape, keys.shape
    q, keys, ds, ids = _rows_first(q), _rows_first(keys), ds.contiguous(), ids.contiguous()
    dq, dkeys = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, keys))
    named, order = ids.flatten().sort(stable=True)
    offsets = torch.searchsorted(named, torch.arange(N + 1, device=ids.device))
    width = gradient_width(r)
    blocks = triton.cdiv(r, width)
    _query_gradient_kernel[(B, blocks)](ds, ids, keys, dq, r, k, keys.stride(0), width, num_warps=1)
    _key_gradient_kernel[(N, blocks)](ds, order, offsets, q, dkeys, r, k, q.stride(0), width, num_warps=1)
    return dq, dkeys


def gradient_width(r: int) -> int:
    """Numbers of a row per program: 8 per lane of its warp, fewer for short rows."""
    return 256 if r > 64 else 64


def builds() -> list[Build]:
    """k from 1 to MOST; float32 has a tile of its own, and gradients two widths."""
    pointers = {"q": "*bf16", "keys": "*bf16", "found": "*i64"}
    numbers = dict.fromkeys(("B", "N", "r", "span", "q_row", "key_row"), "i32")
    made = []
    for dtype, kind, ks in ((torch.bfloat16, "*bf16", (32, 64, 128)), (torch.float32, "*fp32", (32, 64, 128))):
        for k in ks:
            c = config(k, dtype)
            sizes = {"QUERIES": c.QUERIES, "KEYS": c.KEYS, "DEPTH": c.DEPTH, "K": c.K}
            signature = {**pointers, "q": kind, "keys": kind, **numbers}
            spills = (
                "24 bytes on sm_90, none on sm_80: for k above 64 in float32" if (k, kind) == (128, "*fp32") else ""
            )
            aligned = ("r", "q_row", "key_row", "span")
            made.append(Build(_search_kernel, signature, sizes, c.num_warps, 2, aligned, spills))
    for width in (64, 256):
        by_query = {"ds": "*fp32", "ids": "*i64", "keys": "*bf16", "dq": "*bf16", "r": "i32", "k": "i32"}
        by_key = {"ds": "*fp32", "order": "*i64", "offsets": "*i64", "q": "*bf16", "dkeys": "*bf16"}
        by_key |= {"r": "i32", "k": "i32", "q_row": "i32"}
        size = {"WIDTH": width}
        made.append(Build(_query_gradient_kernel, {**by_query, "key_row": "i32"}, size, 1, 3, ("r", "key_row")))
        made.append(Build(_key_gradient_kernel, by_key, size, 1, 3, ("r", "q_row")))
    return made
