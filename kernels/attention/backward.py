"""Attention's backward pass on a GPU: dk and dv by tiles of keys, dq by tiles of queries, no atomics.

p_ij = 2^(s_ij - lse_i) is computed again from the stored log-sum-exp.   With delta_i = dy_i . y_i:

    dv_j = sum_i p_ij dy_i,   ds_ij = p_ij (dy_i . v_j - delta_i) (1 - tanh_ij^2),   dk_j = scale sum_i ds_ij q_i,
    dq_i = scale sum_j ds_ij k_j,   dsink = - sum_i 2^(sink log2(e) - lse_i) delta_i.

The last factor of ds is the soft-cap's. A program for keys goes over all query heads of its group, so that the sum over
them is in registers and its order is fixed. Shapes and letters as in forward.py.   Source: arXiv:2307.08691.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.forward import LOG2E, config, edge, is_plain, new_rows, padded, precision, rows_first
from kernels.op import tl, triton

# Tokens per program of _delta.
ROWS = 32

if triton is not None:
    from kernels.attention.forward import _rows, _tanh

    @triton.jit
    def _delta(
        y, dy, delta, y_b, y_h, y_t, d_b, d_h, d_t, H, T,
        hv: tl.constexpr, HD: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """delta_i = dy_i . y_i, one program for ROWS tokens of one head."""
        tiles = tl.cdiv(T, ROWS)
        bh = tl.program_id(0) // tiles
        b, head = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
        start = tl.program_id(0) % tiles * ROWS
        i = start + tl.arange(0, ROWS)
        a = _rows(y + b * y_b + head * y_h, y_t, start, T, hv, HD, ROWS).to(tl.float32)
        c = _rows(dy + b * d_b + head * d_h, d_t, start, T, hv, HD, ROWS).to(tl.float32)
        tl.store(delta + bh.to(tl.int64) * T + i, tl.sum(a * c, 1), mask=i < T)

    @triton.jit
    def _visit_queries(
        dk, dv, kj, vj, q, dy, lse, delta, first, stride_q, stride_d, begin, end, j, T, window, scale2, cap2,
        h: tl.constexpr, hv: tl.constexpr, HD: tl.constexpr, BLOCK_M: tl.constexpr, EDGE: tl.constexpr,
        MASKED: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """The tiles of queries begin .. end - 1, with scores as [keys, queries]."""
        for start in range(begin, end, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            qi = _rows(q, stride_q, start, T, h, HD, BLOCK_M)
            di = _rows(dy, stride_d, start, T, hv, HD, BLOCK_M)
            s = tl.dot(kj, tl.trans(qi), input_precision=PRECISION) * scale2
            if SOFTCAP:
                tanh = _tanh(s, EXACT)
                s = tanh * cap2
            # inf for queries beyond the end: they take no part, whatever their scores are
            p = tl.exp2(s - tl.load(lse + i, mask=i < T, other=float("inf"))[None, :])
            if MASKED:
                ok = j[:, None] <= i[None, :]
                if EDGE == 2:
                    ok = ok & (j[:, None] >= tl.load(first + i, mask=i < T, other=0)[None, :])
                elif EDGE == 1:
                    ok = ok & (j[:, None] > i[None, :] - window)
                p = tl.where(ok, p, 0.0)
            dv = tl.dot(p.to(di.dtype), di, dv, input_precision=PRECISION)
            dp = tl.dot(vj, tl.trans(di), input_precision=PRECISION)
            ds = p * (dp - tl.load(delta + i, mask=i < T, other=0.0)[None, :])
            if SOFTCAP:
                ds = ds * (1.0 - tanh * tanh)
            dk = tl.dot(ds.to(qi.dtype), qi, dk, input_precision=PRECISION)
        return dk, dv

    @triton.jit
    def _attend_dkdv(
        q, k, v, dy, lse, delta, dk, dv, first, last,
        q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
        BK, K, G, T, window, scale, scale2, cap2,
        h: tl.constexpr, hv: tl.constexpr, HD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        EDGE: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        n, bk = tl.program_id(0) // BK, tl.program_id(0) % BK  # early keys are seen by the most queries: they go first
        b64, shared = (bk // K).to(tl.int64), (bk % K).to(tl.int64)
        j = n * BLOCK_N + tl.arange(0, BLOCK_N)
        kj = _rows(k + b64 * k_b + shared * k_h, k_t, n * BLOCK_N, T, h, HD, BLOCK_N)
        vj = _rows(v + b64 * v_b + shared * v_h, v_t, n * BLOCK_N, T, hv, HD, BLOCK_N)
        end_of_tile = tl.minimum((n + 1) * BLOCK_N, T) - 1
        # The end of the queries that see any key of the tile, and where those begin that all come after its keys.
        if EDGE == 2:
            hi = tl.load(last + b64 * T + end_of_tile) + 1
        elif EDGE == 1:
            hi = tl.minimum(end_of_tile + window, T)
        else:
            hi = T
        begin = n * BLOCK_N // BLOCK_M * BLOCK_M
        if EDGE == 0:
            below = tl.minimum(tl.cdiv((n + 1) * BLOCK_N, BLOCK_M) * BLOCK_M, hi)
        else:
            below = hi  # one loop, always masked, as in the forward pass
        dkj = tl.zeros([BLOCK_N, HD], tl.float32)
        dvj = tl.zeros([BLOCK_N, HD], tl.float32)
        for g in range(0, G):
            head = shared * G + g
            qh, dh = q + b64 * q_b + head * q_h, dy + b64 * d_b + head * d_h
            row = (b64 * K * G + head) * T
            dkj, dvj = _visit_queries(
                dkj, dvj, kj, vj, qh, dh, lse + row, delta + row, first + b64 * T, q_t, d_t, begin, below, j, T, window,
                scale2, cap2, h, hv, HD, BLOCK_M, EDGE, True, SOFTCAP, EXACT, PRECISION,
            )  # fmt: skip
            if EDGE == 0:
                dkj, dvj = _visit_queries(
                    dkj, dvj, kj, vj, qh, dh, lse + row, delta + row, first, q_t, d_t, below, hi, j, T, window,
                    scale2, cap2, h, hv, HD, BLOCK_M, EDGE, False, SOFTCAP, EXACT, PRECISION,
                )  # fmt: skip
        d = tl.arange(0, HD)
        t = j.to(tl.int64)[:, None]
        to = dk + b64 * dk_b + shared * dk_h + t * dk_t + d[None, :]
        tl.store(to, (dkj * scale).to(dk.dtype.element_ty), mask=(j < T)[:, None] & (d < h)[None, :])
        to = dv + b64 * dv_b + shared * dv_h + t * dv_t + d[None, :]
        tl.store(to, dvj.to(dv.dtype.element_ty), mask=(j < T)[:, None] & (d < hv)[None, :])

    @triton.jit
    def _visit_keys(
        dq, sums, qi, di, lse, delta, k, v, stride_k, stride_v, begin, end, i, first, T, scale2, cap2,
        h: tl.constexpr, hv: tl.constexpr, HD: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
        MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SINK: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """The tiles of keys begin .. end - 1. sums: of p dp, which is delta, for the sink."""
        for start in range(begin, end, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            kj = _rows(k, stride_k, start, T, h, HD, BLOCK_N)
            vj = _rows(v, stride_v, start, T, hv, HD, BLOCK_N)
            s = tl.dot(qi, tl.trans(kj), input_precision=PRECISION) * scale2
            if SOFTCAP:
                tanh = _tanh(s, EXACT)
                s = tanh * cap2
            p = tl.exp2(s - lse[:, None])
            if MASKED:
                ok = j[None, :] <= i[:, None]
                if EDGE != 0:
                    ok = ok & (j[None, :] >= first[:, None])
                p = tl.where(ok, p, 0.0)
            dp = tl.dot(di, tl.trans(vj), input_precision=PRECISION)
            if SINK:
                sums += tl.sum(p * dp, 1)
            ds = p * (dp - delta[:, None])
            if SOFTCAP:
                ds = ds * (1.0 - tanh * tanh)
            dq = tl.dot(ds.to(kj.dtype), kj, dq, input_precision=PRECISION)
        return dq, sums

    @triton.jit
    def _attend_dq(
        q, k, v, dy, lse, delta, dq, first,
        q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, dq_b, dq_h, dq_t,
        BH, H, G, T, window, scale, scale2, cap2,
        h: tl.constexpr, hv: tl.constexpr, HD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        EDGE: tl.constexpr, SOFTCAP: tl.constexpr, SINK: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        m = tl.cdiv(T, BLOCK_M) - 1 - tl.program_id(0) // BH  # as in the forward pass
        bh = tl.program_id(0) % BH
        b64, head64, shared = (bh // H).to(tl.int64), (bh % H).to(tl.int64), (bh % H // G).to(tl.int64)
        k += b64 * k_b + shared * k_h
        v += b64 * v_b + shared * v_h
        i = m * BLOCK_M + tl.arange(0, BLOCK_M)
        last = tl.minimum((m + 1) * BLOCK_M, T) - 1
        if EDGE == 2:
            row = first + b64 * T
            lo = tl.load(row + i, mask=i < T, other=0)
            lo_tile = tl.load(row + m * BLOCK_M)
        elif EDGE == 1:
            lo = i - window + 1
            lo_tile = tl.maximum(m * BLOCK_M - window + 1, 0)
        else:
            lo = i
        diagonal = m * BLOCK_M // BLOCK_N * BLOCK_N
        qi = _rows(q + b64 * q_b + head64 * q_h, q_t, m * BLOCK_M, T, h, HD, BLOCK_M)
        di = _rows(dy + b64 * d_b + head64 * d_h, d_t, m * BLOCK_M, T, hv, HD, BLOCK_M)
        row_of = bh.to(tl.int64) * T
        lse_i = tl.load(lse + row_of + i, mask=i < T, other=float("inf"))
        delta_i = tl.load(delta + row_of + i, mask=i < T, other=0.0)
        acc = tl.zeros([BLOCK_M, HD], tl.float32)
        sums = tl.zeros([BLOCK_M], tl.float32)
        if EDGE == 0:
            acc, sums = _visit_keys(
                acc, sums, qi, di, lse_i, delta_i, k, v, k_t, v_t, 0, diagonal, i, lo, T, scale2, cap2,
                h, hv, HD, BLOCK_N, EDGE, False, SOFTCAP, SINK, EXACT, PRECISION,
            )  # fmt: skip
            begin = diagonal
        else:
            begin = lo_tile // BLOCK_N * BLOCK_N
        acc, sums = _visit_keys(
            acc, sums, qi, di, lse_i, delta_i, k, v, k_t, v_t, begin, last + 1, i, lo, T, scale2, cap2,
            h, hv, HD, BLOCK_N, EDGE, True, SOFTCAP, SINK, EXACT, PRECISION,
        )  # fmt: skip
        if SINK:  # exact, where dy . y carries the rounding of y; dk and dv are done, nobody else reads it
            tl.store(delta + row_of + i, sums, mask=i < T)
        d = tl.arange(0, HD)
        to = dq + b64 * dq_b + head64 * dq_h + i.to(tl.int64)[:, None] * dq_t + d[None, :]
        tl.store(to, (acc * scale).to(dq.dtype.element_ty), mask=(i < T)[:, None] & (d < h)[None, :])


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    sink: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv like q, k, v, and dsink [H] (empty without a sink). last [B, T]: the last query that sees a key."""
    B, H, T, h = q.shape
    K, hv = k.shape[1], v.shape[-1]
    dq, dk, dv = new_rows(q, H, h), new_rows(k, K, h), new_rows(v, K, hv)
    if not dq.numel() or not y.numel():
        return dq.zero_(), dk.zero_(), dv.zero_(), lse.new_zeros(H if sink is not None else 0)
    q, k, v, dy = rows_first(q), rows_first(k), rows_first(v), rows_first(dy)
    HD, delta, none = padded(h, hv), torch.empty_like(lse), lse
    _delta[(triton.cdiv(T, ROWS) * B * H,)](
        y, dy, delta, *y.stride()[:3], *dy.stride()[:3], H, T, hv=hv, HD=HD, ROWS=ROWS, num_warps=4
    )
    numbers = scale / softcap if softcap else scale * LOG2E, (softcap or 0.0) * LOG2E
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dy.stride()[:3])
    options = {
        "h": h,
        "hv": hv,
        "HD": HD,
        "EDGE": edge(window, first),
        "SOFTCAP": bool(softcap),
        "EXACT": q.dtype == torch.float32,
        "PRECISION": precision(q.dtype),
    }
    plain = is_plain(window, first, softcap)
    tile = config("keys", HD, q.dtype, plain)
    _attend_dkdv[(triton.cdiv(T, tile.n) * B * K,)](
        q, k, v, dy, lse, delta, dk, dv, none if first is None else first, none if last is None else last,
        *strides, *dk.stride()[:3], *dv.stride()[:3], B * K, K, H // K, T, window or 0, scale, *numbers,
        BLOCK_M=tile.m, BLOCK_N=tile.n, **options, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = config("queries", HD, q.dtype, plain)
    _attend_dq[(triton.cdiv(T, tile.m) * B * H,)](
        q, k, v, dy, lse, delta, dq, none if first is None else first,
        *strides, *dq.stride()[:3], B * H, H, H // K, T, window or 0, scale, *numbers,
        BLOCK_M=tile.m, BLOCK_N=tile.n, SINK=sink is not None, **options,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if sink is None:
        return dq, dk, dv, lse.new_zeros(0)
    return dq, dk, dv, -(torch.exp2(sink[:, None] * LOG2E - lse) * delta).sum((0, 2))
