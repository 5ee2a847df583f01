"""Attention on processors: blocks of queries against just the keys they see, by PyTorch's fused CPU kernel.

B batch, H query heads, K key heads, T time, h head size, S keys that a block's queries see. The fused kernel knows a
triangle or a dense mask; asked for a window or for documents with a mask over [T, T] it visits every key. A block of
queries asks for the keys from the first one that any of them sees: the cost is T (window + block), and so is the mask.
A sink needs no further key: with L = log(e^lse + e^sink), y = softmax(s) v e^(lse - L), and that kernel's backward
pass, given this y and L in the place of its own, returns the exact gradients, since p = e^(s - L) and delta = dy . y
are all it makes of them. It gets float32 at least: with 16 bits its backward pass is slower (16.9 ms against 8.1 for
8 x 4 heads, 256 tokens, size 32) and takes delta from a rounded y. A soft-cap is not in it: such blocks are written
out, one block's scores at a time, with products in the dtype that is given.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention.forward import new_rows, rows_first
from kernels.op import wide

# Queries per block: where only some keys are seen, a larger one asks for more that are not.
SOME, ALL = 64, 128
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def blocks(T: int, window: int | None, first: Tensor | None) -> list[tuple[int, int, int]]:
    """(first query, end of queries, first key): the keys end where the queries do."""
    block = ALL if window is None and first is None else SOME
    starts = range(0, T, block)
    if first is not None:
        lows = first[:, ::block].amin(0).tolist()
    else:
        lows = [0 if window is None else max(0, t - window + 1) for t in starts]
    return [(t, min(t + block, T), lo) for t, lo in zip(starts, lows, strict=True)]


def hidden(t: int, end: int, lo: int, window: int | None, first: Tensor | None, device: torch.device) -> Tensor:
    """[B or 1, 1, queries, keys] True where a query does not see a key."""
    i, j = torch.arange(t, end, device=device)[:, None], torch.arange(lo, end, device=device)
    no = j > i
    if first is not None:
        return (no | (j < first[:, t:end, None]))[:, None]
    return (no if window is None else no | (j <= i - window))[None, None]


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
    """q [B, H, T, h], k [B, K, T, h], v [B, K, T, hv], first [B, T] -> y [B, H, T, hv], lse [B, H, T] (natural log)."""
    B, H, T, _ = q.shape
    y = new_rows(q, H, v.shape[-1])
    lse = torch.empty((B, T, H), dtype=wide(q.dtype), device=q.device).transpose(1, 2)
    if not y.numel():
        return y, lse
    fused = softcap is None
    q, k, v = rows_first(q), rows_first(k), rows_first(v)
    for t, end, lo in blocks(T, window, first):
        qt, kt, vt = q[:, :, t:end], k[:, :, lo:end], v[:, :, lo:end]
        unseen = hidden(t, end, lo, window, first, q.device)
        if fused:
            out, total = _flash(*level(qt, kt, vt), 0.0, attn_mask=added(unseen, q), scale=scale)
            out = out[..., : v.shape[-1]]
        else:
            s, _ = scores(qt, kt, scale, softcap, unseen)
            total = torch.logsumexp(s, -1)
            if sink is not None:
                total = torch.logaddexp(total, sink.to(total.dtype)[:, None])
            weights = s.sub_(total[..., None]).exp_().to(v.dtype)
            out = grouped(weights, k.shape[1]).matmul(vt).view(B, H, end - t, -1)
        if fused and sink is not None:
            more = torch.logaddexp(total, sink.to(total.dtype)[:, None])
            out = out * (total - more).exp()[..., None].to(out.dtype)
            total = more
        y[:, :, t:end] = out
        lse[:, :, t:end] = total
    return y, lse


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
    """-> dq, dk, dv like q, k, v, and dsink [H] (empty without a sink)."""
    H, T, K = *q.shape[1:3], k.shape[1]
    dq = new_rows(q, H, q.shape[-1])
    # Every block adds to the gradients of the keys it sees; the sums are kept in float32 at least.
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
    dsink = lse.new_zeros(H if sink is not None else 0)
    if not y.numel():
        return dq.zero_(), dk.to(k.dtype), dv.to(v.dtype), dsink
    fused = softcap is None
    q, k, v, dy = rows_first(q), rows_first(k), rows_first(v), rows_first(dy)
    for t, end, lo in blocks(T, window, first):
        qt, kt, vt, dt, yt, lt = (
            *(x[:, :, a:end] for x, a in ((q, t), (k, lo), (v, lo), (dy, t), (y, t))),
            lse[:, :, t:end],
        )
        unseen = hidden(t, end, lo, window, first, q.device)
        if fused:
            mask = added(unseen, q)
            dt, yt, qt, kt, vt = level(dt, yt, qt, kt, vt)
            one, two, three = _flash_backward(dt, qt, kt, vt, yt, lt, 0.0, False, attn_mask=mask, scale=scale)
            one, two, three = one[..., : q.shape[-1]], two[..., : q.shape[-1]], three[..., : v.shape[-1]]
        else:
            s, tanh = scores(qt, kt, scale, softcap, unseen)
            p = s.sub_(lt[..., None]).exp_()
            dp = grouped(dt, K).matmul(vt.mT).view(p.shape).to(p.dtype)
            delta = (p * dp).sum(-1, keepdim=True)
            dp = dp.sub_(delta).mul_(p)
            if tanh is not None:
                dp.mul_(tanh.square_().neg_().add_(1.0))
            ds = grouped(dp.mul_(scale).to(q.dtype), K)
            one = ds.matmul(kt).view(qt.shape)
            two, three = ds.mT.matmul(grouped(qt, K)), grouped(p.to(q.dtype), K).mT.matmul(grouped(dt, K))
        dq[:, :, t:end] = one
        dk[:, :, lo:end] += two
        dv[:, :, lo:end] += three
        if sink is not None:
            if fused:
                delta = (dt * yt).sum(-1, keepdim=True)
            dsink -= ((sink.to(lse.dtype)[:, None] - lt).exp() * delta[..., 0]).sum((0, 2))
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsink


def level(*tensors: Tensor) -> list[Tensor]:
    """Heads of one size, by zeros behind the smaller ones: the fused kernel wants that of queries, keys and values."""
    size = max(x.shape[-1] for x in tensors)
    return [F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x for x in tensors]


def added(unseen: Tensor, like: Tensor) -> Tensor:
    """The mask as what is added to scores, in the dtype that the fused kernel asks for."""
    return torch.zeros_like(unseen, dtype=like.dtype).masked_fill_(unseen, -torch.inf)


def grouped(x: Tensor, K: int) -> Tensor:
    """[B, H, M, n] -> [B, K, H / K * M, n]: the queries that share a key head in one product."""
    B, H, M, n = x.shape
    return x.reshape(B, K, H // K * M, n)


def scores(q: Tensor, k: Tensor, scale: float, softcap: float | None, unseen: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores [B, H, M, S] in float32 at least, -inf where not seen, and the tanh in capped ones."""
    s = grouped(q, k.shape[1]).matmul(k.mT).view(*q.shape[:3], -1).to(wide(q.dtype))
    if softcap is None:
        return (s * scale).masked_fill_(unseen, -torch.inf), None
    tanh = (s * (scale / softcap)).tanh_()
    return (tanh * softcap).masked_fill_(unseen, -torch.inf), tanh
