"""RMSNorm over the last axis, of some or all channels, of one tensor or of a sum.   N rows, D channels, k counted ones.

    s = x + residual (s = x without one),   y = scale * gain * s / sqrt(mean of the k channels' s^2 + eps)

With e = scale * gain * dy, r = 1 / sqrt(.. + eps) and u = s r:  dgain = scale * sum over rows of dy u,  and
ds = r (e - u c / k (e . u)), where c is 1 for counted channels and 0 for others: only those move the root.
Sources: arXiv:1910.07467 (RMSNorm, and pRMSNorm for k < D); arXiv:2502.05795 (scale = 1 / sqrt(layer)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.op import NAMESPACE, Build, Op, pick, tl, triton, wide

# Rows wider than this do not fit the registers of one program; they take the reference.
WIDEST = 8192
BLOCKS = (64, 256, 1024, 2048, 4096, WIDEST)
# Backward programs walk over rows, so that each leaves one partial sum of dgain. An H100 or H200 has 132
# multiprocessors, and the registers that the backward kernels compile to leave room for 20 warps on each: all at once.
PROCESSORS, RESIDENT = 132, 20


def rms_norm_reference(
    x: Tensor,
    gain: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: float = 1.0,
    channels: tuple[int, int] | Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The formula, in float32 at least."""
    s = x if residual is None else x + residual
    h = s.to(wide(s.dtype))
    weight = None if gain is None else gain.to(h.dtype)
    if channels is None:  # one call, which a processor decoding token by token feels: 7 us, and 11 for its parts
        y = F.rms_norm(h, (h.shape[-1],), weight, eps)
    else:
        y = h * torch.rsqrt(_counted(h, channels).square().mean(-1, keepdim=True) + eps)
        y = y if weight is None else y * weight
    y = (y if scale == 1.0 else y * scale).to(s.dtype)
    return y if residual is None else (y, s)


def _counted(h: Tensor, channels: tuple[int, int] | Tensor | None) -> Tensor:
    """The channels whose squares are counted."""
    if channels is None:
        return h
    return h.index_select(-1, channels) if isinstance(channels, Tensor) else h[..., channels[0] : channels[1]]


class _OnCPU(torch.autograd.Function):
    """Each pass over memory is one PyTorch call; autograd of the plain formula takes about three times as many.

    Forward and backward of 2,048 rows on one core in ms, F.rms_norm against this: float32 at D = 128, 256, 1024:
    1.6 / 0.4, 2.4 / 0.5 to 0.9, 6.7 / 3.3 to 3.8; bfloat16: 0.6 / 0.4, 1.5 / 0.7 to 1.0, 10.3 / 4.6 to 9. Numba's
    loops took 0.3, 0.6 and 2.0 in float32, which is not enough for one more package at run time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor | None,
        eps: float,
        scale: float,
        channels: tuple[int, int] | Tensor | None,
    ) -> Tensor:
        h = x.to(wide(x.dtype))
        part = _counted(h, channels)
        r = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
        r = r.square_().div_(part.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, r)
        ctx.scale, ctx.channels = scale, channels
        y = h * r
        if gain is not None:
            y.mul_(gain.to(y.dtype) * scale)
        elif scale != 1.0:
            y.mul_(scale)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, r = ctx.saved_tensors
        with torch.no_grad():
            dx, dgain = _OnCPU.gradients(ctx, x, gain, r, dy)
        if torch.is_grad_enabled():
            dx, dgain = _Once.apply(dx, dgain, x, gain, dy)
        return dx, dgain, None, None, None

    @staticmethod
    def gradients(ctx: Any, x: Tensor, gain: Tensor | None, r: Tensor, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, channels = ctx.scale, ctx.channels
        h, dy = x.to(r.dtype), dy.to(r.dtype)
        u, D = h * r, x.shape[-1]
        t = u * dy
        dgain = None
        if gain is None:
            dot = t.sum(-1, keepdim=True).mul_(scale)
            ds = torch.mul(dy, scale, out=t)
        else:
            weight = gain.to(r.dtype) * scale
            dot = (t @ weight)[..., None]
            if ctx.needs_input_grad[1]:
                dgain = t.reshape(-1, D).sum(0).mul_(scale).to(gain.dtype)
            ds = torch.mul(dy, weight, out=t)
        part = _counted(u, channels)
        dot = dot.div_(-part.shape[-1])
        if isinstance(channels, Tensor):
            ds.index_add_(-1, channels, part.mul_(dot))
        else:
            _counted(ds, channels).addcmul_(part, dot)
        return ds.mul_(r).to(x.dtype), dgain


class _Once(torch.autograd.Function):
    """Gradients that hang on what they were made of, so that differentiating them raises.

    PyTorch's once_differentiable gives constants where dy needs no gradient: a second derivative of zero, unnoticed.
    """

    @staticmethod
    def forward(ctx: Any, dx: Tensor, dgain: Tensor | None, *sources: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return dx, dgain

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError("rms_norm has no second derivative; impl='reference' has one")


if triton is not None:

    @triton.jit
    def _root(h, cols, counted, low, high, inverse, eps):
        """r of each row. counted: a pointer to 0s and 1s, or None: the channels from low to high."""
        if counted is not None:
            share = tl.load(counted + cols, mask=cols < high, other=0.0)
        else:
            share = tl.where((cols >= low) & (cols < high), 1.0, 0.0)
        return tl.rsqrt(tl.sum(h * h * share[None, :], 1) * inverse + eps), share

    @triton.jit
    def _forward(
        x, residual, gain, counted, y, s, N, D, x_row, r_row, low, high, inverse, eps, scale,
        ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A tile of whole rows per program: each number is read once and written once."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        cols = tl.arange(0, BLOCK)
        inside = (rows < N)[:, None] & (cols < D)[None, :]
        wide_rows = rows.to(tl.int64)[:, None]
        h = tl.load(x + wide_rows * x_row + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            h += tl.load(residual + wide_rows * r_row + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            rounded = h.to(s.dtype.element_ty)  # the norm is of the sum that later layers see
            tl.store(s + wide_rows * D + cols[None, :], rounded, mask=inside)
            h = rounded.to(tl.float32)
        r, _ = _root(h, cols, counted, low, high, inverse, eps)
        h = h * (r * scale)[:, None]
        if gain is not None:
            h *= tl.load(gain + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
        tl.store(y + wide_rows * D + cols[None, :], h.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward(
        dy, ds, s, gain, counted, dx, partial, N, D, dy_row, ds_row, s_row, low, high, inverse, eps, scale,
        ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Every program walks over tiles of rows. r is taken again: the row is read anyway, so nothing is kept for it.

        partial: [programs, D], the program's own sum of dy u; None where there is no gain.
        """
        cols = tl.arange(0, BLOCK)
        weight = tl.full((BLOCK,), 1.0, tl.float32)
        if gain is not None:
            weight = tl.load(gain + cols, mask=cols < D, other=0.0).to(tl.float32)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
            rows = tile * ROWS + tl.arange(0, ROWS)
            inside = (rows < N)[:, None] & (cols < D)[None, :]
            wide_rows = rows.to(tl.int64)[:, None]
            h = tl.load(s + wide_rows * s_row + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            d = tl.load(dy + wide_rows * dy_row + cols[None, :], mask=inside, other=0.0).to(tl.float32) * scale
            r, share = _root(h, cols, counted, low, high, inverse, eps)
            u = h * r[:, None]
            if gain is not None:
                total += d * u
            e = d * weight[None, :]
            dot = tl.sum(e * u, 1) * inverse
            out = r[:, None] * (e - u * share[None, :] * dot[:, None])
            if ds is not None:
                out += tl.load(ds + wide_rows * ds_row + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + wide_rows * D + cols[None, :], out.to(dx.dtype.element_ty), mask=inside)
        if gain is not None:
            tl.store(partial + tl.program_id(0) * D + cols, tl.sum(total, 0), mask=cols < D)


def config(D: int) -> tuple[int, int, int]:
    """(rows of a tile, its width, warps) for rows of D: 16 numbers a thread, at least four warps. Unmeasured yet."""
    block = next(b for b in BLOCKS if b >= D)
    rows = max(1, 2048 // block)
    return rows, block, max(4, rows * block // 512)


def _rows(x: Tensor) -> Tensor:
    """[N, D] with neighbours in a row side by side; only other strides, and rows at uneven distances, are copied."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _span(D: int, counted: Tensor | None, low: int, high: int, k: int) -> tuple[int, int, float]:
    return (low, high, 1.0 / (high - low)) if counted is None else (0, D, 1.0 / k)


def _launch(
    x: Tensor, residual: Tensor | None, gain: Tensor | None, counted: Tensor | None,
    low: int, high: int, k: int, eps: float, scale: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    D = x.shape[-1]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    s = None if residual is None else torch.empty_like(y)
    if x.numel():
        rows, block, warps = config(D)
        flat, other = _rows(x), None if residual is None else _rows(residual)
        N = flat.shape[0]
        _forward[(triton.cdiv(N, rows),)](
            flat, other, gain, counted, y, s, N, D, flat.stride(0), 0 if other is None else other.stride(0),
            *_span(D, counted, low, high, k), eps, scale, ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y, s


@torch.library.custom_op(f"{NAMESPACE}::rms_norm", mutates_args=())
def _norm(
    x: Tensor, gain: Tensor | None, counted: Tensor | None, low: int, high: int, k: int, eps: float, scale: float
) -> Tensor:
    return _launch(x, None, gain, counted, low, high, k, eps, scale)[0]


@_norm.register_fake
def _(
    x: Tensor, gain: Tensor | None, counted: Tensor | None, low: int, high: int, k: int, eps: float, scale: float
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op(f"{NAMESPACE}::add_rms_norm", mutates_args=())
def _add_norm(
    x: Tensor,
    residual: Tensor,
    gain: Tensor | None,
    counted: Tensor | None,
    low: int,
    high: int,
    k: int,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    y, s = _launch(x, residual, gain, counted, low, high, k, eps, scale)
    assert s is not None
    return y, s


@_add_norm.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    gain: Tensor | None,
    counted: Tensor | None,
    low: int,
    high: int,
    k: int,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    return y, torch.empty_like(y)


@torch.library.custom_op(f"{NAMESPACE}::rms_norm_backward", mutates_args=())
def _norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    gain: Tensor | None,
    counted: Tensor | None,
    low: int,
    high: int,
    k: int,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of s and of gain; the second is empty where there is no gain."""
    D = s.shape[-1]
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    if not s.numel():
        return dx, s.new_zeros(0) if gain is None else torch.zeros_like(gain)
    rows, block, warps = config(D)
    dy, s, ds = _rows(dy), _rows(s), None if ds is None else _rows(ds)
    N = s.shape[0]
    programs = min(triton.cdiv(N, rows), PROCESSORS * (RESIDENT // warps))
    partial = None if gain is None else torch.empty(programs, D, dtype=torch.float32, device=s.device)
    _backward[(programs,)](
        dy, ds, s, gain, counted, dx, partial, N, D, dy.stride(0), 0 if ds is None else ds.stride(0), s.stride(0),
        *_span(D, counted, low, high, k), eps, scale, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if gain is None or partial is None:
        return dx, s.new_zeros(0)
    return dx, partial.sum(0).to(gain.dtype)


@_norm_backward.register_fake
def _(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    gain: Tensor | None,
    counted: Tensor | None,
    low: int,
    high: int,
    k: int,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    dgain = s.new_empty(0) if gain is None else torch.empty_like(gain)
    return torch.empty(s.shape, dtype=s.dtype, device=s.device), dgain


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, gain, counted, *ctx.numbers = inputs
    ctx.save_for_backward(x, gain, counted)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, gain, counted = ctx.saved_tensors
    dx, dgain = _norm_backward(dy, None, x, gain, counted, *ctx.numbers)
    return dx, None if gain is None else dgain, None, None, None, None, None, None


_norm.register_autograd(_gradients, setup_context=_save)


def _save_sum(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, residual, gain, counted, *ctx.numbers = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], gain, counted)


def _sum_gradients(ctx: Any, dy: Tensor, ds: Tensor | None) -> tuple[Tensor | None, ...]:
    """The sum's own gradient is added on the way, and what is left reaches both terms."""
    s, gain, counted = ctx.saved_tensors
    dx, dgain = _norm_backward(dy, ds, s, gain, counted, *ctx.numbers)
    one, other = (dx.to(dtype) for dtype in ctx.dtypes)
    return one, other, None if gain is None else dgain, None, None, None, None, None, None


_add_norm.register_autograd(_sum_gradients, setup_context=_save_sum)


def _check(x: Tensor, gain: Tensor | None, channels: Any, residual: Tensor | None) -> None:
    """A kernel would read what lies behind a gain or a residual that is too short."""
    if not x.dim() or not x.is_floating_point():
        raise ValueError(f"rms_norm: x is {list(x.shape)} in {x.dtype}; it must have an axis, and floating numbers")
    D = x.shape[-1]
    if gain is not None and gain.shape != (D,):
        raise ValueError(f"rms_norm: gain is {list(gain.shape)}; rows of {D} need [{D}]")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm: x is {list(x.shape)} and residual {list(residual.shape)}; they must be alike")
    if isinstance(channels, tuple) and not 0 <= channels[0] < channels[1] <= D:
        raise ValueError(f"rms_norm: channels={channels} must be (first, behind the last) of {D}")


def rms_norm(
    x: Tensor,
    gain: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: float = 1.0,
    channels: tuple[int, int] | Tensor | None = None,
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Any:
    """scale * gain * x / sqrt(mean square of some channels + eps), in float32 at least, rounded once.

    x: [..., D].  gain: [D] in any floating dtype.  eps: added to the mean square.
    channels: whose squares are counted: (first, behind the last), or distinct indices [k]; None: all D.
    residual: [..., D]; what is normed is s = x + residual then.
    Returns y [..., D] in x's dtype (the sum's dtype); with a residual (y, s). Autocast on CUDA makes x float32 first,
    as it does for F.rms_norm. x (or s) is kept for the backward pass, nothing else. A second derivative raises.
    A processor under torch.compile takes the reference, which the compiler fuses with what stands around it.
    Raises ValueError for shapes and channels that do not fit.
    """
    _check(x, gain, channels, residual)
    if x.is_cuda and torch.is_autocast_enabled("cuda") and (residual is None or residual.dtype != torch.float32):
        x = x.float()  # the sum is float32 then, whatever the residual
    D = x.shape[-1]
    differs = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gain, residual))
    narrow = D <= WIDEST and x.dtype != torch.float64
    path = pick("rms_norm", x, impl, cpu=differs and not torch.compiler.is_compiling(), fits=narrow)
    if path == "triton":
        if not narrow:
            raise ValueError(f"rms_norm: impl='triton' takes rows of at most {WIDEST} in float32 at most, not {D}")
        counted, (low, high), k = None, (0, D), D
        if isinstance(channels, Tensor):
            counted = torch.zeros(D, device=x.device).index_fill_(0, channels, 1.0)
            k = channels.shape[0]
        elif channels is not None:
            low, high = channels
        gain = gain if gain is None else gain.contiguous()
        if residual is None:
            return _norm(x, gain, counted, low, high, k, eps, scale)
        return _add_norm(x, residual, gain, counted, low, high, k, eps, scale)
    if path == "cpu":
        s = x if residual is None else x + residual
        y = _OnCPU.apply(s, gain, eps, scale, channels)
        return y if residual is None else (y, s)
    return rms_norm_reference(x, gain, eps=eps, scale=scale, channels=channels, residual=residual)


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    """shape: rows, channels. Wide ones count the first half; even numbers of rows add a residual, odd ones a gain."""
    *rows, D = shape
    n = rows[-1]
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    made: dict[str, Any] = {"x": x.requires_grad_(), "eps": 1e-5}
    if n % 2:
        made["gain"] = (1 + torch.randn(D, generator=generator, dtype=torch.float64)).requires_grad_()
    else:
        made["residual"] = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        made["scale"] = 0.7
    if D > 100:
        made["channels"] = (0, D // 2)
    return made


def _builds() -> list[Build]:
    """Every tile with a gain and a residual in bfloat16, which hold most; some of the others."""
    numbers = dict.fromkeys(("N", "D", "x_row", "r_row", "dy_row", "ds_row", "s_row", "low", "high"), "i32")
    numbers |= dict.fromkeys(("inverse", "eps", "scale"), "fp32")
    forward = ("x", "residual", "gain", "counted", "y", "s")
    backward = ("dy", "ds", "s", "gain", "counted", "dx", "partial")

    def build(kernel: Any, pointers: tuple[str, ...], D: int, dtype: str, without: tuple[str, ...]) -> Build:
        rows, block, warps = config(D)
        types = {p: "*" + ("fp32" if p in ("gain", "counted", "partial") else dtype) for p in pointers}
        types |= {n: numbers[n] for n in kernel.arg_names if n in numbers}
        constants: dict[str, Any] = {p: types.pop(p) and None for p in without}
        aligned = tuple(n for n in ("D", "x_row", "r_row", "dy_row", "ds_row", "s_row") if n in types)
        return Build(kernel, types, {**constants, "ROWS": rows, "BLOCK": block}, warps, aligned=aligned)

    made = [build(_forward, forward, D, "bf16", ("counted",)) for D in BLOCKS]
    made += [build(_backward, backward, D, "bf16", ("counted",)) for D in BLOCKS]
    made += [build(_forward, forward, D, "fp32", ("residual", "s", "counted")) for D in (1024, WIDEST)]
    made += [build(_backward, backward, D, "fp32", ("ds", "counted")) for D in (1024, WIDEST)]
    made.append(build(_forward, forward, 1024, "bf16", ("residual", "s", "gain")))
    made.append(build(_backward, backward, 1024, "bf16", ("ds", "gain", "partial")))
    return made


OP = Op(
    "rms_norm",
    rms_norm,
    rms_norm_reference,
    _inputs,
    shapes=((1, 1), (5, 60), (6, 129), (2, 3, 300), (41, 64)),
    empty=(0, 8),
    paths=("triton", "cpu", "reference"),
    builds=_builds,
)
