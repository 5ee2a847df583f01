"""Norm, gain and rotation of queries and keys in one pass.   B batch, T time, H query heads, K key heads, h head size.

    u = x a:  a = 1 / sqrt(mean(x^2) + eps) ("rms"), 1 / (|x| + eps) ("l2"), or 1
    z = u * gain (of queries, of keys)
    y1 = z1 cos - z2 sin,  y2 = z2 cos + z1 sin  for the halves z1, z2 of the first r channels; the others stay

With dz, the rotation of dy back:  dgain = sum over rows of dz u,  and with e = dz gain:  dx = a e - b u (e . u), where
b = a / h ("rms"), 1 / |x| ("l2"), or 0. Queries and keys come out apart, so their gradients are read where attention
wrote them.   Sources: arXiv:2104.09864 (RoPE), arXiv:2010.04245 (l2), arXiv:2505.09388 (rms with gains, Qwen3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.op import NAMESPACE, Build, Op, pick, power_of_2, tl, triton, wide

HALVES, RESTS = (32, 64, 128), (0, 128)  # block widths of a turned half, and of what is not turned
# Backward programs walk over heads, so that each leaves one partial sum of the gains' gradients. An H100 or H200 has
# 132 multiprocessors, and by its registers each holds about five programs.
PROGRAMS = 132 * 5


def qk_norm_rope_reference(
    qk: Tensor,
    H: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm: str | None = None,
    gain_q: Tensor | None = None,
    gain_k: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The formula, in float32 at least.

    A processor's path too: an autograd function of in-place PyTorch calls was slower. Forward and backward of 2,048
    tokens with 4 + 4 heads of 64 on one core, rms norm and rotation: 6.0 ms, and 8.0 for that one (float32; 6.2 and 8.2
    in bfloat16); a rotation alone 3.1 and 4.1.
    """
    x = qk.to(wide(qk.dtype))
    heads, h = qk.shape[-2:]
    if norm == "rms":
        x = F.rms_norm(x, (h,), None, eps)
    elif norm == "l2":
        x = x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + eps)
    if gain_q is not None or gain_k is not None:
        x = x * torch.cat([_spread(gain_q, x, H), _spread(gain_k, x, heads - H)])
    if cos is not None and sin is not None:
        r = cos.shape[-1]
        turned = torch.addcmul(x[..., :r] * cos, x[..., :r].roll(r // 2, -1), sin)
        x = turned if r == h else torch.cat([turned, x[..., r:]], -1)
    q, k = x.to(qk.dtype).split((H, heads - H), -2)
    return q, k


def _spread(gain: Tensor | None, x: Tensor, heads: int) -> Tensor:
    return (x.new_ones(x.shape[-1]) if gain is None else gain.to(x.dtype)).expand(heads, x.shape[-1])


if triton is not None:

    @triton.jit
    def _place(row, T, heads, first, b_step, t_step, head_step):
        """Where the head of a row begins: row = (batch * T + time) * heads + first + head."""
        token, head = row // heads, (row % heads - first).to(tl.int64)
        return (token // T).to(tl.int64) * b_step + (token % T).to(tl.int64) * t_step + head * head_step

    @triton.jit
    def _scales(square, h, eps, NORM: tl.constexpr):
        """a and b of the formula for each row."""
        if NORM == "rms":
            a = tl.rsqrt(square / h + eps)
            return a, a / h
        else:
            size = tl.sqrt(square)
            return 1.0 / (size + eps), tl.where(size > 0.0, 1.0 / tl.where(size > 0.0, size, 1.0), 0.0)

    @triton.jit
    def _forward(
        qk, cos, sin, gain_q, gain_k, q, k, R, T, H, heads, h, half, b_step, t_step, head_step, table_b, table_t, eps,
        NORM: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    ):  # fmt: skip
        """A tile of heads per program, loaded as two halves and what is not turned: whole runs, no permutation."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        here, head, token = row < R, row % heads, (row // heads).to(tl.int64)
        j, jr = tl.arange(0, HALF), 2 * half + tl.arange(0, REST if REST else 1)
        m1, m3 = here[:, None] & (j < half)[None, :], here[:, None] & (jr < h)[None, :]
        start = qk + _place(row, T, heads, 0, b_step, t_step, head_step)[:, None]
        x1 = tl.load(start + j[None, :], mask=m1, other=0.0).to(tl.float32)
        x2 = tl.load(start + half + j[None, :], mask=m1, other=0.0).to(tl.float32)
        if REST:
            x3 = tl.load(start + jr[None, :], mask=m3, other=0.0).to(tl.float32)
        if NORM != "":
            square = tl.sum(x1 * x1 + x2 * x2, 1)
            if REST:
                square += tl.sum(x3 * x3, 1)
            a, _ = _scales(square, h, eps, NORM)
            x1, x2 = x1 * a[:, None], x2 * a[:, None]
            if REST:
                x3 = x3 * a[:, None]
        of_q = (head < H)[:, None]
        if gain_q is not None:
            x1 *= tl.where(of_q, tl.load(gain_q + j, mask=j < half, other=0.0).to(tl.float32)[None, :], 1.0)
            x2 *= tl.where(of_q, tl.load(gain_q + half + j, mask=j < half, other=0.0).to(tl.float32)[None, :], 1.0)
            if REST:
                x3 *= tl.where(of_q, tl.load(gain_q + jr, mask=jr < h, other=0.0).to(tl.float32)[None, :], 1.0)
        if gain_k is not None:
            x1 *= tl.where(of_q, 1.0, tl.load(gain_k + j, mask=j < half, other=0.0).to(tl.float32)[None, :])
            x2 *= tl.where(of_q, 1.0, tl.load(gain_k + half + j, mask=j < half, other=0.0).to(tl.float32)[None, :])
            if REST:
                x3 *= tl.where(of_q, 1.0, tl.load(gain_k + jr, mask=jr < h, other=0.0).to(tl.float32)[None, :])
        if cos is not None:
            table = _place(row, T, heads, row % heads, table_b, table_t, 0)[:, None] + j[None, :]
            c = tl.load(cos + table, mask=m1, other=0.0).to(tl.float32)
            s = tl.load(sin + table + half, mask=m1, other=0.0).to(tl.float32)
            x1, x2 = x1 * c - x2 * s, x2 * c + x1 * s
        kind = q.dtype.element_ty
        to_q = q + ((token * H + head) * h)[:, None]
        to_k = k + ((token * (heads - H) + head - H) * h)[:, None]
        tl.store(to_q + j[None, :], x1.to(kind), mask=m1 & of_q)
        tl.store(to_q + half + j[None, :], x2.to(kind), mask=m1 & of_q)
        tl.store(to_k + j[None, :], x1.to(kind), mask=m1 & (head >= H)[:, None])
        tl.store(to_k + half + j[None, :], x2.to(kind), mask=m1 & (head >= H)[:, None])
        if REST:
            tl.store(to_q + jr[None, :], x3.to(kind), mask=m3 & of_q)
            tl.store(to_k + jr[None, :], x3.to(kind), mask=m3 & (head >= H)[:, None])

    @triton.jit
    def _either(from_q, from_k, cols, mask_q, mask_k):
        """Rows of queries from one tensor, rows of keys from the other; what is masked is not read."""
        d = tl.load(from_q + cols[None, :], mask=mask_q, other=0.0).to(tl.float32)
        return d + tl.load(from_k + cols[None, :], mask=mask_k, other=0.0).to(tl.float32)

    @triton.jit
    def _gain(gain_q, gain_k, of_q, cols, inside):
        weight = tl.full((of_q.shape[0], cols.shape[0]), 1.0, tl.float32)
        if gain_q is not None:
            weight *= tl.where(of_q, tl.load(gain_q + cols, mask=inside, other=0.0).to(tl.float32)[None, :], 1.0)
        if gain_k is not None:
            weight *= tl.where(of_q, 1.0, tl.load(gain_k + cols, mask=inside, other=0.0).to(tl.float32)[None, :])
        return weight

    @triton.jit
    def _keep(partial, total, of_q, cols, inside, h):
        """Writes a program's sums for the gain of queries, then of keys: partial is [programs, 2, h]."""
        to = partial + tl.program_id(0) * 2 * h + cols
        tl.store(to, tl.sum(tl.where(of_q, total, 0.0), 0), mask=inside)
        tl.store(to + h, tl.sum(tl.where(of_q, 0.0, total), 0), mask=inside)

    @triton.jit
    def _backward(
        dq, dk, qk, cos, sin, gain_q, gain_k, dqk, partial, R, T, H, heads, h, half,
        q_b, q_t, q_head, k_b, k_t, k_head, b_step, t_step, head_step, table_b, table_t, eps,
        NORM: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    ):  # fmt: skip
        """Every program walks over tiles of heads, a multiple of all heads apart: a slot of its tile keeps its head.

        qk: None for a rotation alone, whose gradient does not need it.
        """
        j, jr = tl.arange(0, HALF), 2 * half + tl.arange(0, REST if REST else 1)
        first = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        of_q = (first % heads < H)[:, None]
        g1, g2 = _gain(gain_q, gain_k, of_q, j, j < half), _gain(gain_q, gain_k, of_q, half + j, j < half)
        total1, total2 = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
        if REST:
            g3 = _gain(gain_q, gain_k, of_q, jr, jr < h)
            total3 = tl.zeros((ROWS, REST), tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
            row = tile * ROWS + tl.arange(0, ROWS)
            here = (row < R)[:, None]
            m1, m3 = here & (j < half)[None, :], here & (jr < h)[None, :]
            from_q = dq + _place(row, T, heads, 0, q_b, q_t, q_head)[:, None]
            from_k = dk + _place(row, T, heads, H, k_b, k_t, k_head)[:, None]
            d1 = _either(from_q, from_k, j, m1 & of_q, m1 & (of_q == 0))
            d2 = _either(from_q, from_k, half + j, m1 & of_q, m1 & (of_q == 0))
            if REST:
                d3 = _either(from_q, from_k, jr, m3 & of_q, m3 & (of_q == 0))
            if cos is not None:
                table = _place(row, T, heads, row % heads, table_b, table_t, 0)[:, None] + j[None, :]
                c = tl.load(cos + table, mask=m1, other=0.0).to(tl.float32)
                s = tl.load(sin + table + half, mask=m1, other=0.0).to(tl.float32)
                d1, d2 = d1 * c + d2 * s, d2 * c - d1 * s
            if qk is not None:
                start = qk + _place(row, T, heads, 0, b_step, t_step, head_step)[:, None]
                x1 = tl.load(start + j[None, :], mask=m1, other=0.0).to(tl.float32)
                x2 = tl.load(start + half + j[None, :], mask=m1, other=0.0).to(tl.float32)
                if REST:
                    x3 = tl.load(start + jr[None, :], mask=m3, other=0.0).to(tl.float32)
                if NORM != "":
                    square = tl.sum(x1 * x1 + x2 * x2, 1)
                    if REST:
                        square += tl.sum(x3 * x3, 1)
                    a, b = _scales(square, h, eps, NORM)
                    x1, x2 = x1 * a[:, None], x2 * a[:, None]
                    if REST:
                        x3 = x3 * a[:, None]
                total1 += d1 * x1
                total2 += d2 * x2
                d1, d2 = d1 * g1, d2 * g2
                if REST:
                    total3 += d3 * x3
                    d3 = d3 * g3
                if NORM != "":
                    dot = tl.sum(d1 * x1 + d2 * x2, 1)
                    if REST:
                        dot += tl.sum(d3 * x3, 1)
                    dot = dot * b
                    d1, d2 = d1 * a[:, None] - x1 * dot[:, None], d2 * a[:, None] - x2 * dot[:, None]
                    if REST:
                        d3 = d3 * a[:, None] - x3 * dot[:, None]
            to = dqk + (row.to(tl.int64) * h)[:, None]
            tl.store(to + j[None, :], d1.to(dqk.dtype.element_ty), mask=m1)
            tl.store(to + half + j[None, :], d2.to(dqk.dtype.element_ty), mask=m1)
            if REST:
                tl.store(to + jr[None, :], d3.to(dqk.dtype.element_ty), mask=m3)
        if partial is not None:
            _keep(partial, total1, of_q, j, j < half, h)
            _keep(partial, total2, of_q, half + j, j < half, h)
            if REST:
                _keep(partial, total3, of_q, jr, jr < h, h)


def config(h: int, r: int) -> tuple[int, int, int] | None:
    """(rows of a tile, width of a half, of the rest) for r turned channels of h: 16 numbers a thread of four warps.

    None where the head is too wide. r: 0 for a norm alone, whose halves are h / 2. Unmeasured yet.
    """
    half, rest = _widths(h, r)
    if half > HALVES[-1] or rest > RESTS[-1]:
        return None
    HALF, REST = next(w for w in HALVES if w >= half), next(w for w in RESTS if w >= rest)
    return 2048 // power_of_2(2 * HALF + REST), HALF, REST


def _widths(h: int, r: int) -> tuple[int, int]:
    """Channels of a half, and those that are in none."""
    half = (r or h) // 2
    return half, h - 2 * half


def _steps(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor whose channels are neighbours, and the strides of its other axes; others are copied."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride()[:3]


def _tables(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    if cos is None or sin is None:
        return None, None, 0, 0
    cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)


@torch.library.custom_op(f"{NAMESPACE}::qk_norm_rope", mutates_args=())
def _fused(
    qk: Tensor, H: int, cos: Tensor | None, sin: Tensor | None, norm: str,
    gain_q: Tensor | None, gain_k: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, T, heads, h = qk.shape
    q = torch.empty(B, T, H, h, dtype=qk.dtype, device=qk.device)
    k = torch.empty(B, T, heads - H, h, dtype=qk.dtype, device=qk.device)
    if qk.numel():
        r = 0 if cos is None else cos.shape[-1]
        chosen = config(h, r)
        assert chosen is not None
        rows, half, rest = chosen
        x, steps = _steps(qk)
        c, s, table_b, table_t = _tables(cos, sin)
        _forward[(triton.cdiv(B * T * heads, rows),)](
            x, c, s, gain_q, gain_k, q, k, B * T * heads, T, H, heads, h, _widths(h, r)[0], *steps, table_b, table_t,
            eps, NORM=norm, ROWS=rows, HALF=half, REST=rest, num_warps=4,
        )  # fmt: skip
    return q, k


@_fused.register_fake
def _(
    qk: Tensor, H: int, cos: Tensor | None, sin: Tensor | None, norm: str,
    gain_q: Tensor | None, gain_k: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, T, heads, h = qk.shape
    return tuple(torch.empty(B, T, n, h, dtype=qk.dtype, device=qk.device) for n in (H, heads - H))  # type: ignore[return-value]


@torch.library.custom_op(f"{NAMESPACE}::qk_norm_rope_backward", mutates_args=())
def _fused_backward(
    dq: Tensor, dk: Tensor, qk: Tensor | None, cos: Tensor | None, sin: Tensor | None, norm: str,
    gain_q: Tensor | None, gain_k: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of qk, and [2, h], those of the gains (empty without any)."""
    (B, T, H, h), heads = dq.shape, dq.shape[2] + dk.shape[2]
    dqk = torch.empty(B, T, heads, h, dtype=dq.dtype, device=dq.device)
    gains = gain_q is not None or gain_k is not None
    if not dqk.numel():
        return dqk, torch.zeros(2 if gains else 0, h, device=dq.device)
    r = 0 if cos is None else cos.shape[-1]
    chosen = config(h, r)
    assert chosen is not None
    rows, half, rest = chosen
    programs = heads * max(1, min(PROGRAMS, triton.cdiv(B * T * heads, rows)) // heads)
    partial = torch.empty(programs, 2, h, dtype=torch.float32, device=dq.device) if gains else None
    (dq, q_steps), (dk, k_steps) = _steps(dq), _steps(dk)
    x, steps = (None, (0, 0, 0)) if qk is None else _steps(qk)
    c, s, table_b, table_t = _tables(cos, sin)
    _backward[(programs,)](
        dq, dk, x, c, s, gain_q, gain_k, dqk, partial, B * T * heads, T, H, heads, h, _widths(h, r)[0],
        *q_steps, *k_steps, *steps, table_b, table_t, eps, NORM=norm, ROWS=rows, HALF=half, REST=rest, num_warps=4,
    )  # fmt: skip
    return dqk, dq.new_zeros(0, dtype=torch.float32) if partial is None else partial.sum(0)


@_fused_backward.register_fake
def _(
    dq: Tensor, dk: Tensor, qk: Tensor | None, cos: Tensor | None, sin: Tensor | None, norm: str,
    gain_q: Tensor | None, gain_k: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, T, H, h = dq.shape
    none = gain_q is None and gain_k is None
    sums = torch.empty((0,) if none else (2, h), dtype=torch.float32, device=dq.device)
    return torch.empty(B, T, H + dk.shape[2], h, dtype=dq.dtype, device=dq.device), sums


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qk, _, cos, sin, ctx.norm, gain_q, gain_k, ctx.eps = inputs
    needed = ctx.norm or gain_q is not None or gain_k is not None
    ctx.save_for_backward(qk if needed else None, cos, sin, gain_q, gain_k)


def _gradients(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    qk, cos, sin, gain_q, gain_k = ctx.saved_tensors
    dqk, sums = _fused_backward(dq, dk, qk, cos, sin, ctx.norm, gain_q, gain_k, ctx.eps)
    dgain_q = None if gain_q is None else sums[0].to(gain_q.dtype)
    dgain_k = None if gain_k is None else sums[1].to(gain_k.dtype)
    return dqk, None, None, None, None, dgain_q, dgain_k, None


_fused.register_autograd(_gradients, setup_context=_save)


def _check(
    qk: Tensor, H: int, cos: Tensor | None, sin: Tensor | None, gain_q: Tensor | None, gain_k: Tensor | None
) -> None:
    """A kernel would read what lies behind tables and gains that are too short."""
    if qk.dim() != 4 or not 0 <= H <= qk.shape[2]:
        raise ValueError(f"qk_norm_rope: qk {list(qk.shape)} must be [B, T, H + K, h], with H={H}")
    B, T, _, h = qk.shape
    for gain in (gain_q, gain_k):
        if gain is not None and gain.shape != (h,):
            raise ValueError(f"qk_norm_rope: a gain is {list(gain.shape)}; heads of {h} need [{h}]")
    if cos is None or sin is None:
        return
    r = cos.shape[-1]
    if sin.shape != cos.shape or cos.shape not in ((1, T, 1, r), (B, T, 1, r)) or r % 2 or r > h:
        words = f"cos {list(cos.shape)} and sin {list(sin.shape)} must be [1 or {B}, {T}, 1, r], r even and at most {h}"
        raise ValueError(f"qk_norm_rope: {words}")


def qk_norm_rope(
    qk: Tensor,
    H: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm: str | None = None,
    gain_q: Tensor | None = None,
    gain_k: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Queries [B, T, H, h] and keys [B, T, K, h], normed, multiplied and turned, in float32 at least and rounded once.

    qk: [B, T, H + K, h], queries first; any strides.  cos, sin: [B or 1, T, 1, r], the tables (c, c) and (-s, s) of
    angles that pairs (m, m + r/2) of the first r channels turn by; None: no rotation.
    norm: "rms", "l2" or None.  gain_q, gain_k: [h]; None: 1.  eps: added to the mean square, or to the length.
    Elementwise but for one sum, so autocast leaves the dtype alone. qk is kept for the backward pass, or nothing for a
    rotation alone. A second derivative raises on a GPU.
    Raises ValueError for an unknown norm, one table without the other, and shapes that do not fit.
    """
    if norm not in (None, "rms", "l2"):
        raise ValueError(f"qk_norm_rope: norm={norm!r} does not exist; None, 'rms' and 'l2' do")
    if (cos is None) != (sin is None):
        raise ValueError("qk_norm_rope: cos and sin come together; one of them is missing")
    _check(qk, H, cos, sin, gain_q, gain_k)
    chosen = config(qk.shape[-1], 0 if cos is None else cos.shape[-1])
    fits = chosen is not None and qk.dtype != torch.float64 and qk.numel() < 2**31 * qk.shape[-1]
    path = pick("qk_norm_rope", qk, impl, fits=fits)
    if path == "triton":
        if not fits:
            raise ValueError("qk_norm_rope: impl='triton' takes heads of at most 256 channels, in float32 at most")
        gain_q, gain_k = (g if g is None else g.contiguous() for g in (gain_q, gain_k))
        return _fused(qk, H, cos, sin, norm or "", gain_q, gain_k, eps)
    return qk_norm_rope_reference(qk, H, cos, sin, norm=norm, gain_q=gain_q, gain_k=gain_k, eps=eps)


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    """shape: rows, time, query heads, key heads, head size, turned channels (0: none).

    A norm by the number of query heads; odd time: tables for each row; no gain where there is no norm.
    """
    B, T, H, K, h, r = shape
    qk = torch.randn(B, T, H + K, h, generator=generator, dtype=torch.float64) * 2
    norm = (None, "rms", "l2")[H % 3]
    made: dict[str, Any] = {"qk": qk.requires_grad_(), "H": H, "norm": norm}
    if r:
        angle = torch.rand(B if T % 2 else 1, T, 1, r // 2, generator=generator, dtype=torch.float64) * 6.28
        made["cos"] = torch.cat([angle.cos(), angle.cos()], -1)
        made["sin"] = torch.cat([-angle.sin(), angle.sin()], -1)
    if norm:
        made["gain_q"] = (1 + 0.3 * torch.randn(h, generator=generator, dtype=torch.float64)).requires_grad_()
        if norm == "rms":
            made["gain_k"] = (1 + 0.3 * torch.randn(h, generator=generator, dtype=torch.float64)).requires_grad_()
    return made


def _builds() -> list[Build]:
    """Every tile with an rms norm and gains in bfloat16; other norms, a rotation alone and float32 at head size 64."""
    pointers = ("qk", "cos", "sin", "q", "k", "dq", "dk", "dqk", "gain_q", "gain_k", "partial")
    lasting = ("cos", "sin", "gain_q", "gain_k", "partial")
    tables, gains = ("cos", "sin"), ("gain_q", "gain_k")

    def build(kernel: Any, h: int, r: int, dtype: str, norm: str, without: tuple[str, ...] = ()) -> Build:
        chosen = config(h, r)
        assert chosen is not None
        constants: dict[str, Any] = {"NORM": norm, **dict(zip(("ROWS", "HALF", "REST"), chosen, strict=True))}
        names = [n for n in kernel.arg_names if n not in constants]
        constants |= {n: None for n in without if n in names}
        types = {
            n: ("*fp32" if n in lasting else f"*{dtype}") if n in pointers else "fp32" if n == "eps" else "i32"
            for n in names
            if n not in constants
        }
        aligned = ("h", "half", *(n for n in types if n.endswith(("_step", "_b", "_t", "_head"))))
        return Build(kernel, types, constants, aligned=aligned)

    heads = [(2 * half, 2 * half) for half in HALVES] + [(2 * half + RESTS[-1], 2 * half) for half in HALVES]
    made = []
    for kernel in (_forward, _backward):
        made += [build(kernel, h, r, "bf16", "rms") for h, r in heads]
        made.append(build(kernel, 64, 64, "fp32", "rms"))
        made.append(build(kernel, 64, 0, "bf16", "l2", (*tables, "gain_k")))
    made.append(build(_forward, 64, 64, "bf16", "", gains))
    made.append(build(_backward, 64, 64, "bf16", "", (*gains, "qk", "partial")))
    return made


OP = Op(
    "qk_norm_rope",
    qk_norm_rope,
    qk_norm_rope_reference,
    _inputs,
    shapes=((1, 1, 1, 1, 2, 2), (2, 5, 4, 2, 20, 12), (2, 4, 2, 1, 64, 64), (1, 3, 3, 3, 6, 6), (3, 3, 5, 2, 7, 0)),
    empty=(0, 3, 1, 1, 8, 8),
    builds=_builds,
)
