"""Linear cross-entropy: from hidden states and the head matrix to the loss.   N tokens, D model, V vocabulary.

    z = x W^T + b,  capped: z = cap tanh((x W^T + b) / cap)      lse = log sum over v of exp(z_v)
    loss = sum over targets of  lse - (1 - e) z_target - e mean over v of z_v + w lse^2
    dloss/dz_v = (1 + 2 w lse) exp(z_v - lse) - (1 - e) [v = target] - e / V,  times 1 - (z_v / cap)^2 where capped

e is label smoothing (arXiv:1512.00567), w the weight of the z-loss, which keeps lse near zero (PaLM, arXiv:2204.02311).
[N, V] is never built: rows go through in chunks, whose logits become their own gradient in place, so that both products
of the backward pass are made while they are there (6 N D V operations in all, no logits twice). What is left for the
backward pass is a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.op import NAMESPACE, Build, Op, pick, tl, triton, wide

IGNORE = -100
# Logits below which a processor takes the reference: calls cost 0.25 ms more, exponentials 0.6 ns less each. One core,
# 128 wide: 512 tokens of 65 words 0.34 ms by the reference, 0.59 in chunks; 2,048 of 4,096 words 400 and 230.
SMALL = 1 << 19


def wide_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, link: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """[N, V] in float32, or float64 for float64 input."""
    logits = F.linear(x, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if link is None else link(logits)


def z_loss(logits: Tensor, targets: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Sum of lse^2 over the targets."""
    return (torch.logsumexp(logits, dim=-1).square() * (targets != ignore_index)).sum()


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    z_weight: float = 0.0,
    softcap: float | None = None,
    smoothing: float = 0.0,
    ignore_index: int = IGNORE,
    reduction: str = "sum",
    link: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` with all logits at once, under autograd.

    link: a function [N, V] -> [N, V] that stands between the (capped) product and the logits.
    """
    logits = wide_logits(x, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if link is not None:
        logits = link(logits)
    nll = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    loss = nll
    if smoothing:
        loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum", label_smoothing=smoothing)
    if z_weight:
        loss = loss + z_weight * z_loss(logits, targets, ignore_index)
    return _reduced(loss, nll.detach(), targets, ignore_index, reduction)


def _reduced(loss: Tensor, nll: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor]:
    if reduction == "sum":
        return loss, nll
    count = (targets != ignore_index).sum().clamp(min=1)
    return loss / count, nll / count


# ---- how many rows at once


def chunk_rows(n: int, v: int, d: int, itemsize: int, path: str) -> int:
    """Rows whose logits are held at once, a multiple of 8 (128 on a GPU) or n; a pure function.

    itemsize: bytes of a logit.
    """
    if path == "triton":
        # As much as the head's gradient in its own dtype takes beside the float32 sum of it, so that the peak is what
        # a float32 accumulator and its rounded copy would take anyway; 32 MiB for small heads. Unmeasured on a GPU:
        # more rows feed the product with the head better, which has few tiles (rows x D).
        fit, step = max(1 << 25, v * d * itemsize) // (v * itemsize), 128
    else:
        # Products want 256 rows at least: 16 to 64 take up to four times as long. 8 MiB stay in a cache.
        fit, step = max(256, (1 << 23) // (v * itemsize)), 8
    chunks = -(-n // max(fit, 1))
    rows = -(-n // max(chunks, 1))
    return max(1, min(n, -(-rows // step) * step))


# ---- one row after the other on a GPU


if triton is not None:

    @triton.jit
    def _tanh(a):
        """Near zero by its series up to a^13, since 1 - exp(-2a) has lost its digits there; both within 1e-7."""
        s = a * a
        series = 1.0 + s * (
            -1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 + s * (-1382 / 155925 + s * 21844 / 6081075))))
        )
        e = tl.exp(-2.0 * tl.abs(a))
        far = (1.0 - e) / (1.0 + e)
        return tl.where(s < 0.16, a * series, tl.where(a < 0, -far, far))

    @triton.jit
    def _row(
        z, targets, losses, nlls, V, stride, ignore, z_weight, cap, smoothing,
        CAPPED: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program per row: z [rows, V] of one row stride, targets, losses, nlls [rows]. z becomes its gradient.

        First pass: maximum and sum of exponentials, kept per lane so that lanes meet once, at the end; one exponential
        an element, since of exp(new - max) and exp(max - new) the one that is not 1 is needed. Second pass: gradient.
        """
        row = tl.program_id(0)
        z += row.to(tl.int64) * stride
        target = tl.load(targets + row)
        cols = tl.arange(0, BLOCK)
        if target == ignore:
            tl.store(losses + row, 0.0)
            tl.store(nlls + row, 0.0)
            if GRAD:
                for at in range(0, V, BLOCK):
                    tl.store(z + at + cols, tl.zeros([BLOCK], tl.float32).to(z.dtype.element_ty), at + cols < V)
        else:
            # A target that is no token has a NaN for a loss, and no memory of others is read for it.
            known = (target >= 0) & (target < V)
            own = tl.load(z + target, known, float("nan")).to(tl.float32)
            if CAPPED:
                own = cap * _tanh(own / cap)
            top = tl.full([BLOCK], -1e30, tl.float32)
            total = tl.zeros([BLOCK], tl.float32)
            plain = tl.zeros([BLOCK], tl.float32)
            for at in range(0, V, BLOCK):
                seen = at + cols < V
                v = tl.load(z + at + cols, seen, 0.0).to(tl.float32)
                if CAPPED:
                    v = cap * _tanh(v / cap)
                plain += v  # 0 where unseen, and tanh(0) = 0
                v = tl.where(seen, v, -float("inf"))
                e = tl.exp(-tl.abs(v - top))
                total = tl.where(v > top, total * e + 1.0, total + e)
                top = tl.maximum(v, top)
            best = tl.max(top, 0)
            lse = best + tl.log(tl.sum(total * tl.exp(top - best), 0))
            mean = tl.sum(plain, 0) / V
            tl.store(nlls + row, lse - own)
            tl.store(losses + row, lse - (1.0 - smoothing) * own - smoothing * mean + z_weight * lse * lse)
            if GRAD:
                extra = 2.0 * z_weight * lse
                for at in range(0, V, BLOCK):
                    seen = at + cols < V
                    v = tl.load(z + at + cols, seen, 0.0).to(tl.float32)
                    slope = 1.0
                    if CAPPED:
                        t = _tanh(v / cap)
                        v = cap * t
                        slope = 1.0 - t * t
                    p = tl.exp(v - lse)
                    g = tl.where(at + cols == target, p - (1.0 - smoothing), p) + extra * p - smoothing / V
                    g *= slope
                    tl.store(z + at + cols, g.to(z.dtype.element_ty), seen)


def config(v: int) -> dict[str, int]:
    """Block and warps of a vocabulary. 8 elements a thread: 16 bytes of bfloat16, and 48 registers (16: 93)."""
    return {"BLOCK": 2048, "num_warps": 8} if v > 1024 else {"BLOCK": 1024, "num_warps": 4}


class Terms(NamedTuple):
    """What the loss consists of. softcap: 0 for none."""

    z_weight: float
    softcap: float
    smoothing: float
    ignore_index: int


def _rows_triton(z: Tensor, targets: Tensor, losses: Tensor, nlls: Tensor, terms: Terms, grad: bool) -> None:
    _row[(z.shape[0],)](
        z, targets, losses, nlls, z.shape[1], z.stride(0), terms.ignore_index, terms.z_weight, terms.softcap,
        terms.smoothing, CAPPED=terms.softcap > 0, GRAD=grad, **config(z.shape[1]),
    )  # fmt: skip


# ---- the same on a processor


def _rows_cpu(z: Tensor, targets: Tensor, losses: Tensor, nlls: Tensor, terms: Terms, grad: bool) -> None:
    """As `_row`, for all rows of a chunk by vectorised operations.

    softmax is PyTorch's one pass over a row in cache that knows both maximum and sum; log-softmax would take a second
    exponential (0.4 against 1.0 ns an element). lse follows from the largest probability, which is 1 / sum.
    """
    z_weight, cap, smoothing, ignore = terms
    dtype, v = wide(z.dtype), z.shape[1]
    logits = z.to(dtype)
    slope = None
    if cap:
        t = logits.div(cap).tanh_()
        slope = torch.mul(t, t) if grad else None
        logits = t.mul_(cap)
    real = targets != ignore
    at = targets.where(real, 0)[:, None]
    best, own = logits.amax(1), logits.gather(1, at)[:, 0]
    mean = logits.mean(1) if smoothing else 0.0
    p = torch.softmax(logits, 1)
    lse = best - p.amax(1).log_()
    nll = lse - own
    nlls.copy_(torch.where(real, nll, 0.0))
    losses.copy_(torch.where(real, lse - (1 - smoothing) * own - smoothing * mean + z_weight * lse.square(), 0.0))
    if not grad:
        return
    # p - 1 at the target from the logarithm: of a p near 1 the difference would have no digits.
    extra = 2 * z_weight * lse
    p_own = torch.expm1(-nll) + extra * torch.exp(-nll) + smoothing
    if z_weight:
        p.mul_((1 + extra)[:, None])
    p.scatter_(1, at, p_own[:, None])
    if smoothing:
        p.sub_(smoothing / v)
    if slope is not None:
        p.addcmul_(p, slope, value=-1)
    if not real.all():
        p.index_fill_(0, (~real).nonzero()[:, 0], 0.0)
    z.copy_(p)


# ---- chunk by chunk


def _add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out = a b where `first`, else out += a b. out may be float32 where a and b are of 16 bits."""
    beta = 0 if first else 1  # 0: what stood in out, even NaN, is not read
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 0):
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:  # a processor rounds a product to the type of its factors; in blocks, so that it stays small
        for block in range(0, out.shape[0], BLOCK_ROWS):
            part, rows = torch.mm(a[block : block + BLOCK_ROWS], b), out[block : block + BLOCK_ROWS]
            rows.copy_(part) if first else rows.add_(part)


BLOCK_ROWS = 4096


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor grad as `dtype`, in the memory of grad; [V, D] in blocks of rows where it is to become narrower.

    What is written of a block lies before all that is still to be read, so nothing else of its size is needed.
    """
    grad = grad.detach()
    if grad.dtype == dtype or grad.dim() < 2:
        return grad.mul_(factor).to(dtype)
    narrow = grad.view(dtype).view(-1)[: grad.numel()].view(grad.shape)
    for block in range(0, grad.shape[0], BLOCK_ROWS):
        narrow[block : block + BLOCK_ROWS] = grad[block : block + BLOCK_ROWS] * factor
    return narrow


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    z_weight: float,
    softcap: float,
    smoothing: float,
    ignore_index: int,
    dtype: torch.dtype,
    wants: Sequence[bool],
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, nll, dx, dW, db): sums, and the loss's gradients, dx like x and the others in float32; empty: not wanted.

    dtype: of the products.
    """
    with torch.autocast(x.device.type, enabled=False):
        terms = Terms(z_weight, softcap, smoothing, ignore_index)
        return _all_chunks(x, weight, targets, bias, terms, dtype, wants, path)


def _all_chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    terms: Terms,
    dtype: torch.dtype,
    wants: Sequence[bool],
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (n, d), v, sums = x.shape, weight.shape[0], wide(dtype)
    x16, w16 = x.to(dtype).contiguous(), weight.to(dtype).contiguous()
    b16 = None if bias is None else bias.to(dtype)
    targets = targets.contiguous()
    step = chunk_rows(n, v, d, dtype.itemsize, path)
    # A row begins at a multiple of 128 bytes on a GPU, or a vocabulary of 50,257 would be read number by number.
    stride = -(-v // 64) * 64 if path == "triton" else v
    buffer = x16.new_empty(step, stride)[:, :v]
    losses, nlls = x16.new_empty(n, dtype=sums), x16.new_empty(n, dtype=sums)
    rows = _rows_triton if path == "triton" else _rows_cpu
    # A processor needs up to three numbers more for each logit at hand, which shall stay in its cache.
    fine = step if path == "triton" else max(1, (1 << 20) // (v * sums.itemsize))
    dx = x.new_empty(x.shape if wants[0] else 0)
    dw = x16.new_empty(weight.shape if wants[1] else 0, dtype=sums)
    db = x16.new_empty(v if wants[2] else 0, dtype=sums)
    if not n:
        dw.zero_(), db.zero_()
    for first in range(0, n, step):
        here = slice(first, min(first + step, n))
        part = x16[here]
        z = buffer[: part.shape[0]]
        if b16 is None:
            torch.mm(part, w16.T, out=z)
        else:
            torch.addmm(b16, part, w16.T, out=z)
        for at in range(0, len(z), fine):
            end = at + fine
            rows(z[at:end], targets[here][at:end], losses[here][at:end], nlls[here][at:end], terms, any(wants))
        if wants[0]:
            if dx.dtype == dtype:
                torch.mm(z, w16, out=dx[here])
            else:
                dx[here] = torch.mm(z, w16)
        if wants[1]:
            _add_product(dw, z.T, part, first == 0)
        if wants[2]:
            part_db = z.sum(0, dtype=sums)
            db.copy_(part_db) if first == 0 else db.add_(part_db)
    return losses.sum(), nlls.sum(), dx, dw, db


@_op.register_fake
def _(x, weight, targets, bias, z_weight, softcap, smoothing, ignore_index, dtype, wants, path):
    loss = x.new_empty((), dtype=wide(dtype))
    dx, dw = x.new_empty(x.shape if wants[0] else 0), loss.new_empty(weight.shape if wants[1] else 0)
    return loss, torch.empty_like(loss), dx, dw, loss.new_empty(weight.shape[0] if wants[2] else 0)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, _, bias = inputs[:4]
    ctx.set_materialize_grads(False)  # or the gradients of dx and dW, which nobody asks for, would be made of zeros
    ctx.dtypes = [t.dtype if wanted else None for t, wanted in zip((x, weight, bias), inputs[9], strict=True)]
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, dloss: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients are there; what comes from above scales them, in place if this is the last time they are used."""
    if any(other is not None for other in others):
        raise RuntimeError("linear_cross_entropy has no second derivative; impl='reference' has one")
    grads: list[Tensor | None] = [None, None, None]
    again = torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()
    for i, (grad, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
        if dtype is not None and dloss is not None:
            # A traced graph (whose tensors are of a class of their own) is made without writing in place.
            apart = again or type(grad) is not Tensor
            grads[i] = (grad * dloss).to(dtype) if apart else _scaled(grad, dloss, dtype)
    dx, dw, db = grads
    return dx, dw, None, db, None, None, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    z_weight: float = 0.0,
    softcap: float | None = None,
    smoothing: float = 0.0,
    ignore_index: int = IGNORE,
    reduction: str = "sum",
    link: Callable[[Tensor], Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Loss and plain cross-entropy, in nats and float32 (float64 for float64 input); the formula heads this file.

    x: [N, D].  weight: [V, D].  targets: [N] int64, ignore_index = no target.  bias: [V] or None.
    z_weight, smoothing, softcap: w, e and cap of the formula; softcap None: none.
    reduction: "sum" over the targets, or their "mean" (0 where there are none).
    link: what else stands between the product and the logits, [N, V] -> [N, V]; with it all logits are built.
    Returns (loss, nll); nll has no gradient. Under autocast products are in its dtype, sums in float32 all the same.
    Without gradients only losses are made. Memory beside gradients: the logits of `chunk_rows` rows.
    A target that is neither a word nor ignore_index gives NaN on a GPU, and an error on a processor.
    Raises ValueError for settings that do not exist and shapes that do not fit; RuntimeError where it is differentiated
    twice, unless it took the reference.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"linear_cross_entropy: reduction={reduction!r} does not exist; sum and mean do")
    if not 0 <= smoothing < 1:
        raise ValueError(f"linear_cross_entropy: smoothing={smoothing} must lie in [0, 1)")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear_cross_entropy: softcap={softcap} must be above 0, or None")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"linear_cross_entropy: x {list(x.shape)}, weight {list(weight.shape)} must be [N, D], [V, D]")
    # Targets or a bias of another length would be read beyond their end, or as those of other rows.
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        words = f"targets {list(targets.shape)} in {targets.dtype} must be [{x.shape[0]}] in torch.int64"
        raise ValueError(f"linear_cross_entropy: {words}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_cross_entropy: bias {list(bias.shape)} must be [{weight.shape[0]}]")
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if link is not None and impl == "auto":
        impl = "reference"
    big = x.shape[0] * weight.shape[0] >= SMALL
    path = pick("linear_cross_entropy", x, impl, cpu=big, fits=dtype != torch.float64)
    if path == "reference":
        return linear_cross_entropy_reference(
            x, weight, targets, bias=bias, z_weight=z_weight, softcap=softcap, smoothing=smoothing,
            ignore_index=ignore_index, reduction=reduction, link=link,
        )  # fmt: skip
    if link is not None:
        raise ValueError(f"linear_cross_entropy: impl={impl!r} takes no link; auto and reference do")
    wants = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    loss, nll, *_ = _op(
        x, weight, targets, bias, float(z_weight), float(softcap or 0.0), float(smoothing), ignore_index, dtype, wants,
        path,
    )  # fmt: skip
    return _reduced(loss, nll.detach(), targets, ignore_index, reduction)


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    """shape: tokens, width, vocabulary; every third token has no target, but for a single one."""
    n, d, v = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    targets = torch.randint(v, (n,), generator=generator)
    if n > 1:
        targets[::3] = IGNORE
    return {"x": draw(n, d), "weight": draw(v, d), "targets": targets, "bias": draw(v), "z_weight": 1e-2}


def _builds() -> list[Build]:
    """Both blocks in both dtypes, with and without gradient; with a soft-cap and in float16 once each."""

    def build(dtype: str, v: int, capped: bool, grad: bool) -> Build:
        signature = {"z": f"*{dtype}", "targets": "*i64", "losses": "*fp32", "nlls": "*fp32", "V": "i32"}
        signature |= {"stride": "i32", "ignore": "i32", "z_weight": "fp32", "cap": "fp32", "smoothing": "fp32"}
        settings = config(v)
        warps = settings.pop("num_warps")
        return Build(_row, signature, {"CAPPED": capped, "GRAD": grad, **settings}, warps, aligned=("stride",))

    plain = [build(dtype, v, False, grad) for dtype in ("bf16", "fp32") for v in (64, 4096) for grad in (True, False)]
    return [*plain, *(build("bf16", v, True, True) for v in (64, 4096)), build("fp16", 4096, True, True)]


OP = Op(
    "linear_cross_entropy",
    linear_cross_entropy,
    linear_cross_entropy_reference,
    _inputs,
    shapes=((33, 16, 65), (65, 48, 37), (20, 24, 2100)),
    empty=(0, 3, 4),
    paths=("triton", "cpu", "reference"),
    builds=_builds,
)
