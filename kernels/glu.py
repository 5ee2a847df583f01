"""Gated linear units between the matrices of an MLP: y = act(gate) * value.   N rows, F hidden channels.

dgate = dy * value * act'(gate),  dvalue = dy * act(gate). Backward computes act again, so only the inputs are kept,
and writes both gradients of a packed [.., 2F] input where they belong, without a concatenation.
Sources: arXiv:1612.08083 (GLU), arXiv:2002.05202 (its family), arXiv:2109.08668 (squared ReLU).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.op import NAMESPACE, Build, Op, pick, tl, triton

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "relu2": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}


def glu_reference(gate: Tensor, value: Tensor | None = None, activation: str = "silu") -> Tensor:
    """act(gate) * value in the dtype that is given.

    A processor's path too. With in-place passes and both gradients written into one packed tensor, an autograd function
    of PyTorch calls took 1.5 ms forward and backward where this takes 1.4 (float32, 2,048 rows of 384 hidden channels,
    one core), and 16.5 against 15.0 at 2,752; in bfloat16 it was behind by as much.
    """
    if value is None:
        gate, value = gate.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * value


if triton is not None:

    @triton.jit
    def _activate(x, KIND: tl.constexpr):
        """(act(x), act'(x)); what is not used is not computed."""
        if KIND == "silu":
            s = tl.sigmoid(x)
            return x * s, s * (1.0 + x * (1.0 - s))
        elif KIND == "gelu":
            below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
            return x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        elif KIND == "gelu_tanh":
            # (1 + tanh u) / 2 = sigmoid(2u), and its derivative in u is 2 s (1 - s).
            s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            return x * s, s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        elif KIND == "relu":
            return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
        elif KIND == "sigmoid":
            s = tl.sigmoid(x)
            return s, s * (1.0 - s)
        elif KIND == "relu2":
            r = tl.where(x <= 0.0, 0.0, x)
            return r * r, 2.0 * r
        else:
            return x, tl.full(x.shape, 1.0, tl.float32)

    @triton.jit
    def _forward(
        gate, value, y, N, D, gate_row, value_row, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One tile per program."""
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        cols = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
        inside = (rows < N) & (cols < D)
        g = tl.load(gate + rows * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(value + rows * value_row + cols, mask=inside, other=0.0).to(tl.float32)
        act, _ = _activate(g, KIND)
        tl.store(y + rows * D + cols, (act * v).to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward(
        dy, gate, value, dgate, dvalue, N, D, dy_row, gate_row, value_row, dgate_row, dvalue_row,
        KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One tile per program: three reads, two writes."""
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        cols = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
        inside = (rows < N) & (cols < D)
        d = tl.load(dy + rows * dy_row + cols, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + rows * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(value + rows * value_row + cols, mask=inside, other=0.0).to(tl.float32)
        act, slope = _activate(g, KIND)
        tl.store(dgate + rows * dgate_row + cols, (d * v * slope).to(dgate.dtype.element_ty), mask=inside)
        tl.store(dvalue + rows * dvalue_row + cols, (d * act).to(dvalue.dtype.element_ty), mask=inside)


def config(D: int) -> tuple[int, int, int]:
    """(rows of a tile, its width, warps) for D hidden channels: 16 numbers of each tensor a thread. Unmeasured yet."""
    return (2, 1024, 4) if D > 256 else (8, 256, 4)


def _halves(gate: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
    """[N, F] each, as views where neighbours lie side by side; other layouts are copied."""
    flat = _rows(gate)
    if value is None:
        left, right = flat.chunk(2, -1)
        return left, right
    return flat, _rows(value)


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _empty(gate: Tensor, value: Tensor | None) -> Tensor:
    if value is None:
        return torch.empty((*gate.shape[:-1], gate.shape[-1] // 2), dtype=gate.dtype, device=gate.device)
    return torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, value.dtype), device=gate.device)


@torch.library.custom_op(f"{NAMESPACE}::glu", mutates_args=())
def _glu(gate: Tensor, value: Tensor | None, activation: str) -> Tensor:
    y = _empty(gate, value)
    if y.numel():
        g, v = _halves(gate, value)
        (N, D), (rows, block, warps) = g.shape, config(g.shape[1])
        _forward[(triton.cdiv(N, rows), triton.cdiv(D, block))](
            g, v, y, N, D, g.stride(0), v.stride(0), KIND=activation, ROWS=rows, BLOCK=block, num_warps=warps
        )
    return y


@_glu.register_fake
def _(gate: Tensor, value: Tensor | None, activation: str) -> Tensor:
    return _empty(gate, value)


@torch.library.custom_op(f"{NAMESPACE}::glu_backward", mutates_args=())
def _glu_backward(dy: Tensor, gate: Tensor, value: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate (packed: of both halves) and of value (packed: empty)."""
    first = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    second = gate.new_empty(0) if value is None else torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if first.numel():
        d, (g, v) = _rows(dy), _halves(gate, value)
        dg, dv = _halves(first, None if value is None else second)
        (N, D), (rows, block, warps) = g.shape, config(g.shape[1])
        strides = [t.stride(0) for t in (d, g, v, dg, dv)]
        _backward[(triton.cdiv(N, rows), triton.cdiv(D, block))](
            d, g, v, dg, dv, N, D, *strides, KIND=activation, ROWS=rows, BLOCK=block, num_warps=warps
        )
    return first, second


@_glu_backward.register_fake
def _(dy: Tensor, gate: Tensor, value: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    first = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return first, gate.new_empty(0) if value is None else torch.empty(
        value.shape, dtype=value.dtype, device=value.device
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None, str], output: Tensor) -> None:
    gate, value, ctx.activation = inputs
    ctx.save_for_backward(gate, value)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gate, value = ctx.saved_tensors
    first, second = _glu_backward(dy, gate, value, ctx.activation)
    return first, None if value is None else second, None


_glu.register_autograd(_gradients, setup_context=_save)


def glu(gate: Tensor, value: Tensor | None = None, activation: str = "silu", impl: str = "auto") -> Tensor:
    """act(gate) * value, on a GPU in float32 and rounded once.

    gate, value: [..., F]; or gate alone, packed [..., 2F] with the gate in its first half.  activation: of ACTIVATIONS.
    Returns [..., F]. Elementwise, so autocast leaves the dtype alone. A second derivative raises on a GPU.
    Raises ValueError for an unknown activation, for shapes that differ, and for a packed width that is odd.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu: activation={activation!r} does not exist; {', '.join(ACTIVATIONS)} do")
    if value is None and gate.shape[-1] % 2:
        raise ValueError(f"glu: a packed width must be even, and {gate.shape[-1]} is not")
    if value is not None and value.shape != gate.shape:
        raise ValueError(f"glu: gate is {list(gate.shape)} and value {list(value.shape)}; they must be alike")
    if pick("glu", gate, impl, fits=gate.dtype != torch.float64) == "triton":
        return _glu(gate, value, activation)
    return glu_reference(gate, value, activation)


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    """shape: rows, hidden channels. Odd widths come packed; every width has its own activation."""
    *rows, D = shape
    packed = D % 2 == 1
    gate = torch.randn(*rows, 2 * D if packed else D, generator=generator, dtype=torch.float64) * 2
    value = None if packed else torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    return {"gate": gate.requires_grad_(), "value": value, "activation": list(ACTIVATIONS)[D % len(ACTIVATIONS)]}


def _builds() -> list[Build]:
    """Every activation once; the narrow tile and float32 for the first."""

    def build(kernel: Any, D: int, dtype: str, kind: str) -> Build:
        rows, block, warps = config(D)
        names = [n for n in kernel.arg_names if n not in ("KIND", "ROWS", "BLOCK")]
        pointers = ("dy", "gate", "value", "dgate", "dvalue", "y")
        types = {n: "*" + dtype if n in pointers else "i32" for n in names}
        aligned = tuple(n for n in names if n == "D" or n.endswith("_row"))
        return Build(kernel, types, {"KIND": kind, "ROWS": rows, "BLOCK": block}, warps, aligned=aligned)

    both = (_forward, _backward)
    made = [build(_backward, 1024, "bf16", kind) for kind in ACTIVATIONS]
    made.append(build(_forward, 1024, "bf16", "silu"))
    made += [build(kernel, D, dtype, "silu") for kernel in both for D, dtype in ((128, "bf16"), (1024, "fp32"))]
    return made


OP = Op(
    "glu",
    glu,
    glu_reference,
    _inputs,
    shapes=((1, 1), (3, 60), (2, 3, 5), (9, 259), (2, 1031), (3, 6), (1, 10), (5, 14)),
    empty=(0, 8),
    builds=_builds,
)
