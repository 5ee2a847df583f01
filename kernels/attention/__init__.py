"""Causal attention with its options in one call: y_i = sum_j softmax_j(cap(scale q_i . k_j)) v_j over the keys i sees.

B batch, H query heads, K key heads (each for H / K queries), T time, h head size, hv value size, r turned channels.
A token sees itself and what came before it; with `window`, the last so many only; with `segments`, its document only.
Queries and keys may come as they are: `qk_norm`, `gain_*`, `cos` and `sin` norm and turn them first.

Norm and rotation are a pass of their own (kernels/qk_norm_rope.py) and not part of the attention kernel's loads: a tile
of keys is loaded by every tile of queries after it, T / 256 times on average at 128 queries a tile, and would each time
be normed and turned again (about 10 operations a number outside the tensor cores, against 256 on them), from registers
and not by the asynchronous copies that feed the products; the backward pass would do it once more for queries and for
keys. Written once, the normed q and k are also what the backward pass reads. The pass costs a read and a write of q and
k.

Paths: `triton` (forward.py, backward.py), `cpu` (cpu.py), `sdpa` (PyTorch's own fused function), `reference`. Which one
`auto` takes is what table.py measured. Sources: arXiv:1706.03762, arXiv:2305.13245 (GQA), arXiv:2104.09864 (rotation),
arXiv:2010.04245 (l2), arXiv:2505.09388 (rms per head), arXiv:2408.00118 (soft-cap), arXiv:2508.10925 (sinks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention import backward as gpu_backward
from kernels.attention import choice, cpu
from kernels.attention import forward as gpu
from kernels.op import NAMESPACE, Build, Op, note, pick, triton, wide
from kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference


def turn(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str | None,
    gain: Tensor | None,
    eps: float,
    form: Callable = qk_norm_rope_reference,
) -> Tensor:
    """Norm, gain, rotation of x [B, heads, T, h], in float32 at least and rounded once."""
    if norm is None and gain is None and cos is None:
        return x
    if cos is not None and sin is not None:  # that operation's tables: [B or 1, T, 1, r]
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        cos, sin = (t[None, :, None] if t.dim() == 2 else t[:, :, None] for t in (cos, sin))
    gain = gain if gain is None else gain.expand(x.shape[-1])
    turned, _ = form(x.transpose(1, 2), x.shape[1], cos, sin, norm=norm, gain_q=gain, eps=eps)
    return turned.transpose(1, 2)


def repeat_heads(x: Tensor, H: int) -> Tensor:
    """[B, K, T, h] -> [B, H, T, h]: each key head once for every query head that shares it.

    Where K does not divide H, the first H mod K key heads serve one query head more than the others.
    """
    K = x.shape[1]
    if K == 1:
        return x.expand(-1, H, -1, -1)
    n, more = divmod(H, K)
    if not more:
        return x.repeat_interleave(n, 1) if n > 1 else x
    first, rest = x.split((more, K - more), 1)
    return torch.cat([first.repeat_interleave(n + 1, 1), rest.repeat_interleave(n, 1)], 1)


def spans(T: int, window: int | None, segments: Tensor) -> tuple[Tensor, Tensor]:
    """The first key that each token sees, and the last query that sees it, [B, T] in int32; neither falls in time.

    A document is a run of equal ids: an id that comes back after another one is a new document.
    """
    at = torch.arange(T, device=segments.device)
    edge, differs = torch.ones_like(segments[:, :1], dtype=torch.bool), segments[:, 1:] != segments[:, :-1]
    new, ends = torch.cat([edge, differs], 1), torch.cat([differs, edge], 1)
    first = torch.where(new, at, 0).cummax(1).values
    last = torch.where(ends, at, T).flip(1).cummin(1).values.flip(1)
    if window is not None:
        first, last = first.maximum(at - window + 1), last.minimum(at + window - 1)
    return first.int(), last.int()


def triangle(T: int, window: int | None, segments: Tensor | None, device: torch.device) -> Tensor:
    """[B or 1, 1, T, T] True where a query sees a key."""
    i, j = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)
    ok = (j <= i)[None] if window is None else ((j <= i) & (j > i - window))[None]
    if segments is not None:
        ok = ok & (j >= spans(T, window, segments)[0][..., None])
    return ok[:, None]


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    qk_norm: str | None = None,
    gain_q: Tensor | None = None,
    gain_k: Tensor | None = None,
    eps: float = 1e-6,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | float | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """The formula with all scores [B, H, T, T], in the dtype that is given: float64 is the judge."""
    B, H, T, h = q.shape
    scale = scale if scale is not None else 1.0 if qk_norm == "l2" else h**-0.5
    q, k = turn(q, cos, sin, qk_norm, gain_q, eps), turn(k, cos, sin, qk_norm, gain_k, eps)
    s = (q @ repeat_heads(k, H).mT).to(wide(q.dtype)) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~triangle(T, window, segments, q.device), -torch.inf)
    if sink is not None:
        column = torch.as_tensor(sink, dtype=s.dtype, device=s.device).reshape(1, -1, 1, 1)
        s = torch.cat([s, column.expand(B, H, T, 1)], -1)
    return s.softmax(-1)[..., :T].to(v.dtype) @ repeat_heads(v, H)


def fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """PyTorch's fused attention of S keys, [B, H, T, h], [B, K, S, h], [B, K, S, hv] -> [B, H, T, hv].

    mask: True or what is added where a query sees a key, [B or 1, H or 1, T, S].  causal: the triangle, without a mask.
    """
    H, T = q.shape[1:3]
    if k.shape[1] != H and (H % k.shape[1] or (q.is_cuda and mask is not None)):
        # CUDA's fused forms take a mask or shared key heads, not both; repeating keys costs less than the unfused form.
        k, v = repeat_heads(k, H), repeat_heads(v, H)
    options: dict[str, Any] = {"dropout_p": dropout, "is_causal": causal, "scale": scale, "enable_gqa": k.shape[1] != H}
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and T <= 256 and torch.is_grad_enabled():
        # The fused backward for bfloat16 on CPU took 5.9 ms where float32 took 1.2 (B=12, H=4, T=64, h=32); at T=512
        # they are even. Autocast would cast back, so it is off for this call.
        with torch.autocast("cpu", enabled=False):
            mask = mask.float() if mask is not None and mask.is_floating_point() else mask
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


def library(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    sink: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """PyTorch's fused attention: its triangle where that is all, else a dense mask; a sink is one more key."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:  # PyTorch would quietly take its unfused form
        raise ValueError(f"attention takes [B, heads, T, size], not {q.dim()}, {k.dim()} and {v.dim()} dimensions")
    H, T = q.shape[1:3]
    if window is None and segments is None and sink is None:
        return fused(q, k, v, None, causal=True, scale=scale)
    mask = triangle(T, window, segments, q.device)
    if sink is not None:
        added = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        column = sink.to(q.dtype)[None, :, None, None].expand(mask.shape[0], H, T, 1)
        mask = torch.cat([added.expand(-1, H, -1, -1), column], -1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))  # its key is 0: its score is what the mask adds
    return fused(q, k, v, mask, causal=False, scale=scale)


def _registered(name: str, forward: Callable, backward: Callable) -> Callable:
    """forward and backward of one path as operators that torch.compile takes for one node each."""

    @torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        first: Tensor | None,
        last: Tensor | None,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        return forward(q, k, v, sink, first, scale, window, softcap)

    @run.register_fake
    def _(q, k, v, sink, first, last, scale, window, softcap):
        B, H, T, _ = q.shape
        lse = torch.empty((B, T, H), dtype=wide(q.dtype), device=q.device).transpose(1, 2)
        return gpu.new_rows(q, H, v.shape[-1]), lse if name == "attention_cpu" else lse.contiguous()

    @torch.library.custom_op(f"{NAMESPACE}::{name}_backward", mutates_args=())
    def back(
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
        return backward(dy, q, k, v, y, lse, sink, first, last, scale, window, softcap)

    @back.register_fake
    def _(dy, q, k, v, y, lse, sink, first, last, scale, window, softcap):
        new = gpu.new_rows
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        if name != "attention_cpu":
            dk, dv = new(k, k.shape[1], k.shape[-1]), new(v, v.shape[1], v.shape[-1])
        return new(q, q.shape[1], q.shape[-1]), dk, dv, lse.new_empty(q.shape[1] if sink is not None else 0)

    def save(ctx, inputs, output) -> None:
        q, k, v, sink, first, last, *ctx.numbers = inputs
        ctx.save_for_backward(q, k, v, *output, sink, first, last)

    def gradient(ctx, dy, _):
        *tensors, sink, first, last = ctx.saved_tensors
        dq, dk, dv, dsink = back(dy, *tensors, sink, first, last, *ctx.numbers)
        return dq, dk, dv, dsink if sink is not None else None, None, None, None, None, None

    run.register_autograd(gradient, setup_context=save)
    return run


_triton = _registered("attention", gpu.forward, gpu_backward.backward)
_cpu = _registered("attention_cpu", cpu.forward, cpu.backward)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    qk_norm: str | None = None,
    gain_q: Tensor | None = None,
    gain_k: Tensor | None = None,
    eps: float = 1e-6,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | float | None = None,
    segments: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal attention of a whole row: as many keys as queries, training and prefill.

    q [B, H, T, h], k [B, K, T, h], v [B, K, T, hv] -> y [B, H, T, hv], in v's dtype.
    scale: of the products; None: 1 / sqrt(h), and 1 with qk_norm="l2", where gain_q takes its place.
    cos, sin: [T, r/2] or [B, T, r/2], r <= h: channels m and m + r/2 turn together; a magnitude may be in them.
    qk_norm: "rms" is x / sqrt(mean(x^2) + eps), "l2" is x / (|x| + eps), before the rotation.
    gain_q, gain_k: [h] or [], multiply after the norm.
    window: a token sees itself and the window - 1 before it.  softcap: c of c tanh(score / c).
    sink: score [H] or [] of one more key of value 0, for all queries; 0 is softmax off by one.
    segments: [B, T] integers; a run of equal ones is a document.
    impl: auto (by measurement, see choice.py), triton, cpu, sdpa or reference.
    Under autocast q, k and v are cast as PyTorch's own attention does. Strides are free; what is not dense in its last
    axis is copied on the triton path. Where K does not divide H, keys and values are repeated.
    Raises ValueError for shapes or options that do not fit, and for a path that cannot run them.
    """
    T, h = _checked(q, k, v, cos, sin, qk_norm, gain_q, gain_k, window, softcap, segments)
    H, device = q.shape[1], q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    scale = scale if scale is not None else 1.0 if qk_norm == "l2" else h**-0.5
    window = None if window is None or window >= T else window
    with torch.autocast(device, enabled=False):
        wanted = (
            impl if impl != "auto" else choice.choice(q, v, window, softcap, sink is not None, segments is not None)
        )
        if wanted == "sdpa" and softcap is not None:
            raise ValueError("attention: impl='sdpa' has no soft-cap; auto, triton, cpu and reference do")
        path = wanted if wanted == "sdpa" else pick("attention", q, wanted)
        if path == "sdpa":
            note("attention", "sdpa")
        if path == "reference":
            return attention_reference(
                q, k, v, scale=scale, cos=cos, sin=sin, qk_norm=qk_norm, gain_q=gain_q, gain_k=gain_k, eps=eps,
                window=window, softcap=softcap, sink=sink, segments=segments,
            )  # fmt: skip
        if path == "triton" and not choice.fits(q, v):
            raise ValueError(
                f"attention: impl='triton' takes heads of up to {gpu.WIDEST} in float32, float16 or bfloat16, "
                f"not {max(h, v.shape[-1])} in {q.dtype}"
            )
        form = partial(qk_norm_rope, impl="triton" if path == "triton" else "auto")
        q, k = turn(q, cos, sin, qk_norm, gain_q, eps, form), turn(k, cos, sin, qk_norm, gain_k, eps, form)
        if sink is not None:
            sink = torch.as_tensor(sink, device=q.device).to(wide(q.dtype)).expand(H).contiguous()
        if path == "sdpa":
            return library(q, k, v, scale, window, sink, segments)
        if H % k.shape[1]:
            k, v = repeat_heads(k, H), repeat_heads(v, H)
        first, last = spans(T, window, segments) if segments is not None else (None, None)
        run, dtype = _triton, v.dtype
        if path == "cpu":
            run = _cpu
            if softcap is None:
                q, k, v = (x.to(wide(x.dtype)) for x in (q, k, v))
        window = None if segments is not None else window
        return run(q, k, v, sink, first, last, scale, window, softcap)[0].to(dtype)


def _checked(q, k, v, cos, sin, qk_norm, gain_q, gain_k, window, softcap, segments) -> tuple[int, int]:
    """T and h of arguments that fit together."""
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"attention takes [B, heads, T, size], not {q.dim()}, {k.dim()} and {v.dim()} dimensions")
    B, H, T, h = q.shape
    if k.shape != (B, k.shape[1], T, h) or v.shape[:3] != k.shape[:3] or not 1 <= k.shape[1] <= H:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} differ in more than heads")
    if qk_norm not in (None, "rms", "l2"):
        raise ValueError(f"qk_norm={qk_norm!r} does not exist; None, 'rms' and 'l2' do")
    if (cos is None) != (sin is None) or (cos is not None and (cos.shape != sin.shape or 2 * cos.shape[-1] > h)):
        raise ValueError(f"cos and sin come together, of one shape and for at most {h} channels")
    for gain in (gain_q, gain_k):
        if gain is not None and gain.shape not in ((), (h,)):
            raise ValueError(f"a gain has shape () or ({h},), not {tuple(gain.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1; 1 is a token that sees itself only")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be above 0; None is no cap")
    if segments is not None and segments.shape != (B, T):
        raise ValueError(f"segments have shape {tuple(segments.shape)}, expected {(B, T)}")
    return T, h


# What an argument tuple asks for, by bits of its last number: options of every kind, alone and together.
ROPE, RMS, L2, WINDOWED, CAPPED, SUNK, PACKED, VALUES = (1 << n for n in range(8))


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    """shape: B, H, K, T, h and the sum of the options."""
    B, H, K, T, h, options = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    hv = h + 3 if options & VALUES else h
    args: dict[str, Any] = {
        "q": draw(B, H, T, h).requires_grad_(),
        "k": draw(B, K, T, h).requires_grad_(),
        "v": draw(B, K, T, hv).requires_grad_(),
    }
    if options & ROPE:
        angle = torch.arange(T)[:, None] * 20.0 ** (-torch.arange(max(1, h // 4)) / 4)
        args |= {"cos": angle.cos().double(), "sin": angle.sin().double()}
    if options & RMS:
        gains = [(1 + 0.3 * draw(h)).requires_grad_() for _ in range(2)]
        args |= {"qk_norm": "rms", "gain_q": gains[0], "gain_k": gains[1]}
    if options & L2:
        args |= {"qk_norm": "l2", "gain_q": torch.tensor(3.0, dtype=torch.float64).requires_grad_()}
    if options & WINDOWED:
        args["window"] = max(1, T // 3)
    if options & CAPPED:
        args["softcap"] = 1.5
    if options & SUNK:
        args["sink"] = draw(H).requires_grad_()
    if options & PACKED:
        args["segments"] = (torch.rand(B, T, generator=generator) < 0.15).cumsum(1)
    return args


def _builds() -> Sequence[Build]:
    """Every tile of `config`, plain and with all that can be asked for at once; float32, which is rare, with all."""
    pointers = ("q", "k", "v", "y", "lse", "sink", "first", "last", "dy", "delta", "dq", "dk", "dv")
    half = ("bf16", torch.bfloat16)  # float16 is the same code
    builds = []
    for HD, (word, dtype), edge, softcap, with_sink in (
        (64, half, gpu.ALL, False, False),
        (128, half, gpu.ALL, False, False),
        (64, half, gpu.FIRST, True, True),
        (128, half, gpu.WINDOW, True, True),
        (128, ("fp32", torch.float32), gpu.FIRST, True, True),
    ):
        kernels = {"forward": gpu._attend, "keys": gpu_backward._attend_dkdv, "queries": gpu_backward._attend_dq}
        for name, kernel in kernels.items():
            tile = gpu.config(name, HD, dtype, edge == gpu.ALL and not softcap)
            constants: dict[str, Any] = {"h": HD, "hv": HD, "HD": HD, "BLOCK_M": tile.m, "BLOCK_N": tile.n}
            constants |= {"EDGE": edge, "SOFTCAP": softcap, "EXACT": word == "fp32"}
            constants["PRECISION"] = gpu.precision(dtype)
            if name != "keys":
                constants["SINK"] = with_sink
            builds.append(_build(kernel, word, pointers, constants, tile))
    constants = {"hv": 128, "HD": 128, "ROWS": gpu_backward.ROWS}
    return [*builds, _build(gpu_backward._delta, "bf16", pointers, constants, gpu.Tile(0, 0))]


def _build(kernel: Any, word: str, pointers: Sequence[str], constants: dict[str, Any], tile: gpu.Tile) -> Build:
    kept = {"lse": "fp32", "sink": "fp32", "delta": "fp32", "first": "i32", "last": "i32"}
    signature = {}
    for name in kernel.arg_names:
        if name in pointers:
            signature[name] = "*" + kept.get(name, word)
        elif name not in constants:
            signature[name] = "fp32" if name.startswith(("scale", "cap")) else "i32"
    strides = tuple(n for n in signature if n.endswith(("_b", "_h", "_t")))
    return Build(kernel, signature, constants, tile.warps, tile.stages, aligned=strides)


OP = Op(
    "attention",
    attention,
    attention_reference,
    _inputs,
    shapes=(
        (2, 4, 2, 1, 8, SUNK),
        (2, 4, 2, 37, 12, ROPE | RMS | WINDOWED | SUNK | PACKED | VALUES),
        (1, 2, 2, 63, 16, ROPE | L2),
        (2, 5, 2, 40, 8, CAPPED | SUNK),
        (1, 1, 1, 129, 20, PACKED | CAPPED),
        (1, 1, 1, 97, 16, WINDOWED),
        (1, 1, 1, 65, 64, 0),
    ),
    empty=(0, 4, 2, 5, 8, WINDOWED | SUNK | PACKED),
    paths=("triton", "cpu", "reference"),
    builds=_builds if triton is not None else tuple,
)
