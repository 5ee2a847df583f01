"""Exact top-k search on a processor: a product in bfloat16 says which keys can be among the k best, and only those are
scored exactly.

A processor with bfloat16 instructions multiplies 4 to 6 times as fast in it. With q~, k~ rounded and s~ their product,

    |s - s~| <= E + u |s~|,   E = |q - q~| max|k| + |q~| max|k - k~| + (error of the sum),   u = 2^-8, rounding of s~

so every one of the k best has s~ (1 + u) >= T - 2E - u T for T the k-th largest s~ so far. Scores exist tile by tile
only. The few keys that are left (about 1.5 k) are scored with sums in float64, so what is returned depends neither on
the tiles nor on threads. Without such instructions the first product is in float32, and E is the error of its sum.

4,096 queries, 16,384 keys, r = 256, k = 32 on one core, in turns: 197 ms, faiss's exact index 326, a float32 product
alone 315, a bfloat16 one 71; 65,536 keys 531, 1,153, 1,217 and 286. What is left beside the product are the lists and
the scoring.
"""

from __future__ import annotations

from functools import cache, partial
from types import SimpleNamespace

import torch
from torch import Tensor

from kernels.cpu import array, numba, spread

QUERIES, KEYS = 512, 2048  # of a tile: its scores (2 MB in bfloat16) stay in the second and third cache
LEAST = 64  # rows for which a thread pays
STEP = 32  # scores of which one glance says that none is good enough


@cache
def has_bfloat16() -> bool:
    """Whether products in bfloat16 are faster than in float32 here."""
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in known)


@cache
def _compiled() -> SimpleNamespace:
    """Numba's functions over rows [first, stop)."""
    import numpy as np

    njit = numba().njit(nogil=True, error_model="numpy")
    quick = numba().njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})

    @njit
    def down(heap, value):
        """Puts value in the place of the smallest."""
        k, i = len(heap), 0
        while 2 * i + 1 < k:
            child = 2 * i + 1
            if child + 1 < k and heap[child + 1] < heap[child]:
                child += 1
            if heap[child] >= value:
                break
            heap[i] = heap[child]
            i = child
        heap[i] = value

    @njit
    def lowest(kth, error, u):
        """The smallest approximate score that one of the k best can have."""
        if kth == -np.inf:
            return kth
        bound = kth - 2 * error - u * abs(kth)
        return bound / (1 + u) if bound > 0 else bound / (1 - u)

    @njit
    def keep(values, ids, count, bound):
        """Drops what cannot be among the best any more; how many are left."""
        kept = 0
        for i in range(count):
            if values[i] >= bound:
                values[kept], ids[kept] = values[i], ids[i]
                kept += 1
        return kept

    @njit
    def scan(scores, base, shift, heaps, values, ids, counts, errors, u, first, stop):
        """A tile of scores [rows, keys], as the integers of their bits: what can be among the best joins the lists.

        The heaps hold the k largest approximate scores. counts: length of a row's list; -1: it was too long.
        """
        bits = np.empty(1, np.int32)
        number = bits.view(np.float32)
        width, room = scores.shape[1], values.shape[1]
        for row in range(first, stop):
            count = counts[row]
            if count < 0:
                continue
            line, heap, kept, names = scores[row], heaps[row], values[row], ids[row]
            bound = lowest(heap[0], errors[row], u)
            number[0] = bound
            limit = scores.dtype.type(
                (bits[0] >> shift) - 1
            )  # the shift cuts off towards zero, so that no number of these is missed
            for begin in range(0, width, STEP):
                some = line[begin : min(begin + STEP, width)]
                if bound > 0:  # then negative numbers, whose bits are negative integers, are below it too
                    found = False
                    for i in range(len(some)):
                        found |= some[i] > limit
                    if not found:
                        continue
                for i in range(len(some)):
                    if bound > 0 and some[i] <= limit:
                        continue
                    bits[0] = np.int32(some[i]) << shift
                    value = number[0]
                    if not value >= bound:
                        continue
                    if count == room:
                        count = keep(kept, names, count, bound)
                        if count == room:
                            count = -1
                            break
                    kept[count], names[count] = value, base + begin + i
                    count += 1
                    if value > heap[0]:
                        down(heap, value)
                        bound = lowest(heap[0], errors[row], u)
                        number[0] = bound
                        limit = scores.dtype.type((bits[0] >> shift) - 1)
                if count < 0:
                    break
            counts[row] = count

    @quick
    def dot(a, b):
        total = 0.0
        for i in range(len(a)):
            total += np.float64(a[i]) * np.float64(b[i])
        return total

    @njit
    def finish(q, keys, heaps, values, ids, counts, errors, u, scores, best, first, stop):
        """Exact scores of what is left; the k best, larger scores first, then lower ids."""
        k = scores.shape[1]
        exact = np.empty(values.shape[1], scores.dtype)
        for row in range(first, stop):
            if counts[row] < 0:
                continue
            mine = ids[row]
            count = keep(values[row], mine, counts[row], lowest(heaps[row, 0], errors[row], u))
            for i in range(count):
                name = mine[i]
                score = scores.dtype.type(dot(q[row], keys[name]))
                place = i
                while place > 0 and (
                    exact[place - 1] < score or (exact[place - 1] == score and mine[place - 1] > name)
                ):
                    exact[place], mine[place] = exact[place - 1], mine[place - 1]
                    place -= 1
                exact[place], mine[place] = score, name
            for i in range(k):
                scores[row, i], best[row, i] = exact[i], mine[i]

    @njit
    def blend(ds, ids, keys, dq, first, stop):
        for row in range(first, stop):
            d = dq[row]
            d[:] = 0
            for i in range(ids.shape[1]):
                g, key = ds[row, i], keys[ids[row, i]]
                for j in range(len(d)):
                    d[j] += g * key[j]

    @njit
    def collect(ds, order, offsets, q, dkeys, k, first, stop):
        for name in range(first, stop):
            d = dkeys[name]
            d[:] = 0
            for i in range(offsets[name], offsets[name + 1]):
                row = order[i] // k
                g, x = ds[row, order[i] % k], q[row]
                for j in range(len(d)):
                    d[j] += g * x[j]

    return SimpleNamespace(scan=scan, finish=finish, blend=blend, collect=collect)


def plain(q: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Every score, summed in float64 and rounded, then sorted: equal ones keep the order of their ids. Some queries at
    a time, so that memory is bounded.
    """
    rows, bank = max(1, (1 << 23) // max(1, len(keys))), keys.double().T
    scores = ((some.double() @ bank).to(q.dtype) for some in q.split(rows))
    parts = [torch.sort(s, dim=1, descending=True, stable=True) for s in scores]
    return torch.cat([p.values[:, :k] for p in parts]), torch.cat([p.indices[:, :k] for p in parts])


def _round(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, r] in dtype, and of each row the length and that of what rounding took, in float64.

    Some rows at a time, so that the second cache gives them to every step after the first.
    """
    out = torch.empty(x.shape, dtype=dtype)
    sizes, errors = torch.empty(2, len(x), dtype=x.dtype)
    for first in range(0, len(x), QUERIES):
        part = slice(first, first + QUERIES)
        out[part] = x[part]
        sizes[part] = torch.linalg.vector_norm(x[part], dim=1)
        if dtype != x.dtype:
            errors[part] = torch.linalg.vector_norm(x[part] - out[part], dim=1)
    return out, sizes.double(), errors.double() if dtype != x.dtype else torch.zeros(len(x), dtype=torch.float64)


def search(q: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """q [B, r], keys [N, r] in float32 or float64 -> scores [B, k], ids [B, k]."""
    (B, r), N = q.shape, len(keys)
    if numba() is None:
        return plain(q, keys, k)
    q, keys = q.contiguous(), keys.contiguous()
    rough = torch.bfloat16 if has_bfloat16() else torch.float32
    q_rough, q_size, q_error = _round(q, rough)
    keys_rough, k_size, k_error = _round(keys, rough)
    k_size, k_error = k_size.max(), k_error.max()
    # The sum's own error is that of r products in float32; 1.01 leaves room for the rounding of the norms and of q~.
    errors = 1.01 * (q_error * k_size + q_size * (k_error + r * 2.0**-22 * k_size)) + 1e-30
    if not bool(errors.isfinite().all()):
        return plain(q, keys, k)
    u, shift, kind = (2.0**-8, 16, torch.int16) if rough == torch.bfloat16 else (0.0, 0, torch.int32)
    room = 4 * k + 128
    scores = torch.empty(B, k, dtype=q.dtype)
    ids = torch.empty(B, k, dtype=torch.int64)
    tile = torch.empty(min(B, QUERIES) * min(N, KEYS), dtype=rough)
    run, late = _compiled(), []
    for first in range(0, B, QUERIES):
        stop = min(B, first + QUERIES)
        rows = stop - first
        heaps = torch.full((rows, k), float("-inf"))
        values = torch.empty(rows, room)
        named = torch.empty(rows, room, dtype=torch.int64)
        counts = torch.zeros(rows, dtype=torch.int64)
        state = [array(t) for t in (heaps, values, named, counts, errors[first:stop])]
        for base in range(0, N, KEYS):
            width = min(KEYS, N - base)
            out = tile[: rows * width].view(rows, width)
            torch.mm(q_rough[first:stop], keys_rough[base : base + width].T, out=out)
            spread(rows, LEAST, partial(run.scan, array(out.view(kind)), base, shift, *state, u))
        given, made = (
            [array(t) for t in two] for two in ((q[first:stop], keys), (scores[first:stop], ids[first:stop]))
        )
        spread(rows, LEAST, partial(run.finish, *given, *state, u, *made))
        late += (counts < 0).nonzero().flatten().add(first).tolist()
    if late:  # too many keys are too close to tell apart: many equal ones, or lengths that differ much
        scores[late], ids[late] = plain(q[late], keys, k)
    return scores, ids


def gradients(ds: Tensor, ids: Tensor, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """dq = sum_i ds_i key_i; dkeys: the same by key, its queries in their order. All in float32 or float64."""
    (B, k), N = ids.shape, len(keys)
    dq, dkeys = torch.empty_like(q), torch.empty_like(keys)
    if numba() is None:
        dq.zero_(), dkeys.zero_()
        for i in range(k):
            dq.addcmul_(ds[:, i, None], keys[ids[:, i]])
        rows = torch.arange(B).repeat_interleave(k)
        for some in range(0, B * k, 1 << 16):
            part = slice(some, some + (1 << 16))
            dkeys.index_add_(0, ids.flatten()[part], ds.flatten()[part, None] * q[rows[part]])
        return dq, dkeys
    named, order = ids.flatten().sort(stable=True)
    offsets = torch.searchsorted(named, torch.arange(N + 1))
    run = _compiled()
    g, i, x, y, o, s = (array(t.contiguous()) for t in (ds, ids, q, keys, order, offsets))
    a, b = array(dq), array(dkeys)
    spread(B, LEAST, lambda first, stop: run.blend(g, i, y, a, first, stop))
    spread(N, LEAST, lambda first, stop: run.collect(g, o, s, x, b, k, first, stop))
    return dq, dkeys
