"""Linear recurrence along time: h_t = a_t h_{t-1} + b_t.   B rows, T time, M numbers per step (any trailing shape).

State-space mixers and linear attention remember this way. a_t = 0 forgets everything (a new document), a_t = 1 with
b_t = 0 stands still (a pad). Only products of a's are formed, never their inverses, so |a_t| <= 1 cannot overflow.
Sources: Blelloch, Prefix Sums and Their Applications, 1990; arXiv:1709.04057.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.op import NAMESPACE, Op

# Steps per chunk. In one chunk time is a loop, over all chunks at once; chunks are then joined by the same function.
CHUNK = 16
# Numbers per step from which a CPU is faster without chunks, which read and write everything twice. Forward and
# backward on one core: 512 steps of 64 numbers 2.2 ms with chunks, 10.6 without, 64 for the reference under autograd;
# 256 steps of 16,384 numbers 29, 19 and 2,204 (autograd fills a gradient of the whole length at each of its steps).
WIDE = 8192


def linear_scan_reference(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """The recurrence in plain steps, in the dtype that is given: float64 is the judge."""
    h = torch.zeros_like(b[:, 0]) if h0 is None else h0
    steps = []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        steps.append(h)
    return torch.stack(steps, 1)


def _steps(a: Tensor, b: Tensor, h: Tensor, out: Tensor) -> None:
    """out_t = a_t h_{t-1} + b_t along dimension -2, step by step, in place."""
    for t in range(b.shape[-2]):
        torch.addcmul(b.select(-2, t), a.select(-2, t), h, out=out.select(-2, t))
        h = out.select(-2, t)


def _chunked(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """a, b [B, T, M], h0 [B, M] -> h [B, T, M].

    Inside chunk k from zero: H, and P, the product of a's so far. The states between chunks follow the same recurrence
    with coefficients P_last and inputs H_last; then h = H + P * (the state before the chunk).
    """
    B, T, M = b.shape
    h = torch.empty_like(b)
    whole = T // CHUNK * CHUNK
    if whole < 2 * CHUNK or (B * M >= WIDE and b.device.type == "cpu"):
        _steps(a, b, h0, h)
        return h
    chunks = (B, whole // CHUNK, CHUNK, M)
    A, H = a[:, :whole].view(chunks), h[:, :whole].view(chunks)
    P = torch.empty_like(A)
    _steps(A, b[:, :whole].view(chunks), torch.zeros_like(H[:, :, 0]), H)
    P[:, :, 0] = A[:, :, 0]
    for t in range(1, CHUNK):
        torch.mul(P[:, :, t - 1], A[:, :, t], out=P[:, :, t])
    last = _chunked(P[:, :, -1].contiguous(), H[:, :, -1].contiguous(), h0)  # the state after each chunk
    before = torch.cat([h0[:, None], last[:, :-1]], 1)
    H.addcmul_(P, before[:, :, None])
    _steps(a[:, whole:], b[:, whole:], h[:, whole - 1], h[:, whole:])
    return h


@torch.library.custom_op(f"{NAMESPACE}::linear_scan", mutates_args=())
def _scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """One node for torch.compile, which would otherwise unroll the loop over time."""
    return _chunked(a.contiguous(), b.contiguous(), h0.contiguous())


@_scan.register_fake
def _(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    return torch.empty(b.shape, dtype=b.dtype, device=b.device)


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    a, _, h0 = inputs
    ctx.save_for_backward(a, h0, output)


def _backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What reaches h_t, from its own output and from h_{t+1}, is the same recurrence from the end:

    g_t = dh_t + a_{t+1} g_{t+1},   db_t = g_t,   da_t = g_t h_{t-1},   dh0 = a_1 g_1.
    """
    a, h0, h = ctx.saved_tensors
    later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
    g = _scan(later.flip(1), dh.flip(1), torch.zeros_like(h0)).flip(1)
    before = torch.cat([h0[:, None], h[:, :-1]], 1)
    return g * before, g, a[:, 0] * g[:, 0]


_scan.register_autograd(_backward, setup_context=_save)


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """h_t = a_t h_{t-1} + b_t for t = 1..T, in float32 at least.

    a, b: [B, T, ...], of one shape.  h0: [B, ...], the state before; None: zeros.
    Returns h [B, T, ...] in float32, or float64 where that is given. The state to go on from is h[:, -1].
    Memory: a, b, h and, while it runs, one more of their size.
    """
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    start = torch.zeros_like(b[:, 0]) if h0 is None else h0.to(wide)
    if b.shape[1] == 1:  # decoding
        return torch.addcmul(b, a, start[:, None])
    if not b.numel():
        return b + start[:, None]
    B, T = b.shape[:2]
    return _scan(a.reshape(B, T, -1), b.reshape(B, T, -1), start.reshape(B, -1)).view(b.shape)


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """shape: rows, steps, numbers per step. Some steps forget everything, some stand still."""
    a = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    a[:, :: max(2, shape[1] // 3)] = 0.0
    a[:, 1::7] = 1.0
    b = torch.randn(shape, generator=generator, dtype=torch.float64)
    h0 = torch.randn(shape[0], *shape[2:], generator=generator, dtype=torch.float64)
    return {"a": a.requires_grad_(), "b": b.requires_grad_(), "h0": h0.requires_grad_()}


OP = Op(
    "linear_scan",
    linear_scan,
    linear_scan_reference,
    _inputs,
    shapes=((1, 1, 1), (2, 45, 3), (3, 130, 5)),
    empty=(0, 5, 3),
    paths=("auto",),
    dtypes=(torch.float32, torch.bfloat16),
)
