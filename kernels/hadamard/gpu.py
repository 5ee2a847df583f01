"""Walsh-Hadamard transforms in Triton: H_P = H_A (x) H_B, so that a row of P = A*B numbers, read as a matrix, is
multiplied by two small matrices of +-1 on tensor cores.

Tensor cores take 16-bit operands. +-1 is exact in them; the numbers are split into bfloat16 parts that add up to them
(8 bits each), and the products are summed in float32: three parts are float32 exactly. A program holds rows of up to
WIDEST numbers; a wider row is S segments, transformed one by one and then across, and the rows in between are so few
that they stay in the GPU's cache. None of this has been timed yet: what is known is that it compiles without spills.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.op import INTERPRETED, Build, tl, triton

WIDEST = 4096  # 8192 in float32 spills on sm_80, 16384 everywhere
WIDEST_TWICE = 32 * WIDEST  # 128 segments across spill
SEGMENTS = 16  # at least: tensor cores multiply nothing smaller
PROGRAMS = 132 * 8  # per launch and tile: each makes its +-1 matrices once and walks over rows
SCRATCH = 1 << 22  # numbers between two passes: 16 MiB in float32, which a cache of 40 MiB (A100) or 50 (H100) keeps


@dataclass(frozen=True)
class Config:
    """R rows per step of a program, read as A x B numbers."""

    R: int
    A: int
    B: int
    num_warps: int = 4


def config(P: int) -> Config:
    """For rows of P <= WIDEST numbers. A step holds 2,048 numbers at least, so that memory has enough to do.

    Rows of less than 256 numbers take zeros behind them: the first P rows and columns of H_256 are H_P.
    """
    P = max(256, P)
    A = 1 << ((P.bit_length() - 1) // 2)
    return Config(max(1, 2048 // P), A, P // A, 8 if P == WIDEST else 4)


def segments(P: int) -> int:
    """Into how many a row of P numbers is cut."""
    return 1 if P <= WIDEST else max(SEGMENTS, P // WIDEST)


def parts(dtype: torch.dtype) -> int:
    """bfloat16 parts of a number between the two products."""
    return 3 if dtype == torch.float32 else 2


def norm_config(block: int) -> int:
    """Blocks per program: 2,048 numbers."""
    return max(1, 2048 // block)


if triton is not None:
    # The interpreter multiplies the bits of bfloat16 numbers as integers; there, the same numbers stand in float32.
    OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)

    @triton.jit
    def _matrix(N: tl.constexpr):
        """H_N, N <= 256: -1 where i & j has an odd number of ones."""
        i = tl.arange(0, N)
        ones = i[:, None] & i[None, :]
        ones = ones ^ (ones >> 4)
        ones = ones ^ (ones >> 2)
        ones = ones ^ (ones >> 1)
        return (1 - 2 * (ones & 1)).to(OPERAND)

    @triton.jit
    def _times(x, h, PARTS: tl.constexpr):
        """x [M, K] in float32 times h [K, N] of +-1, in float32."""
        part = x.to(tl.bfloat16)
        y = tl.dot(part.to(OPERAND), h, input_precision="ieee")
        for _ in tl.static_range(PARTS - 1):
            x = x - part.to(tl.float32)
            part = x.to(tl.bfloat16)
            y = tl.dot(part.to(OPERAND), h, y, input_precision="ieee")
        return y

    @triton.jit
    def _fwht_kernel(
        x, signs, source, y, rows, n, width, x_row, P, S, scale,
        R: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
        PARTS_IN: tl.constexpr, PARTS: tl.constexpr, SIGNS: tl.constexpr, SOURCE: tl.constexpr,
    ):  # fmt: skip
        """y[row, tile, :width] = scale * H x for rows of S segments of P numbers, each segment by itself.

        The grid's second axis counts tiles and segments.
        SIGNS 0: none; 1: of x before H, zeros behind its n numbers; 2: of y, behind H: the adjoint of that.
        SOURCE: x is read at source[tile, p] and is 0 where that is negative: the adjoint of a choice of numbers.
        """
        tiles = tl.num_programs(1) // S
        tile = tl.program_id(1) // S
        ha = _matrix(A)
        hb = _matrix(B)
        r = tl.arange(0, R)
        inner = tl.arange(0, A * B)
        column = ((tl.program_id(1) % S) * P + inner)[None, :]
        table = tile.to(tl.int64) * (P * S) + column
        for group in range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
            row = (group * R + r).to(tl.int64)[:, None]
            inside = (row < rows) & (inner[None, :] < P)
            if SOURCE:
                place = tl.load(source + table, mask=inner[None, :] < P, other=-1)
                data = tl.load(x + row * x_row + place, mask=inside & (place >= 0), other=0.0).to(tl.float32)
            else:
                data = tl.load(x + row * x_row + column, mask=inside & (column < n), other=0.0).to(tl.float32)
            if SIGNS == 1:
                data = data * tl.load(signs + table, mask=inner[None, :] < P, other=0).to(tl.float32)
            z = _times(tl.reshape(data, (R * A, B)), hb, PARTS_IN)
            z = tl.reshape(tl.permute(tl.reshape(z, (R, A, B)), (0, 2, 1)), (R * B, A))
            z = tl.permute(tl.reshape(_times(z, ha, PARTS), (R, B, A)), (0, 2, 1))
            z = tl.reshape(z, (R, A * B)) * scale
            if SIGNS == 2:
                z = z * tl.load(signs + table, mask=inner[None, :] < P, other=0).to(tl.float32)
            to = y + (row * tiles + tile) * width + column
            tl.store(to, z.to(y.dtype.element_ty), mask=inside & (column < width))

    @triton.jit
    def _across_kernel(
        x, signs, y, width, P, S: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
        SIGNS: tl.constexpr,
    ):  # fmt: skip
        """H across the segments: x [rows, tiles, S, P] in float32 -> y [rows, tiles, width]; SIGNS: of y."""
        h = _matrix(S)
        tile = tl.program_id(1)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        place = tl.arange(0, S)[:, None] * P + column[None, :]  # below 2^19
        item = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tile
        z = tl.trans(_times(tl.trans(tl.load(x + item * (S * P) + place)), h, PARTS))
        if SIGNS:
            z = z * tl.load(signs + tile.to(tl.int64) * (S * P) + place).to(tl.float32)
        tl.store(y + item * width + place, z.to(y.dtype.element_ty), mask=place < width)

    @triton.jit
    def _choose_kernel(
        z, chosen, y, rstd, z_row, P, target, blocks, eps, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
        NORM: tl.constexpr,
    ):  # fmt: skip
        """y[row, i] = z[row, i // P, chosen[i]]; NORM: each BLOCK of them over its root mean square.

        rstd [rows, blocks]: what a block was multiplied by.
        """
        row = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        i = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = i < target
        place = (i // P) * P + tl.load(chosen + i, mask=inside, other=0)
        v = tl.load(z + row * z_row + place, mask=inside, other=0.0)
        if NORM:
            count = tl.maximum(tl.minimum(BLOCK, target - block * BLOCK), 1).to(tl.float32)
            inverse = 1.0 / tl.sqrt(tl.sum(v * v, 1) / count + eps)
            v = v * inverse[:, None]
            tl.store(rstd + row * blocks + block, inverse, mask=block < blocks)
        tl.store(y + row * target + i, v.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm_backward_kernel(
        dy, y, rstd, dz, target, blocks, scale, dy_row, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
    ):
        """dz = scale * rstd * (dy - y * mean(dy * y)) over each block of a row, in float32."""
        row = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        i = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = i < target
        g = tl.load(dy + row * dy_row + i, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(y + row * target + i, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row * blocks + block, mask=block < blocks, other=0.0) * scale
        count = tl.maximum(tl.minimum(BLOCK, target - block * BLOCK), 1).to(tl.float32)
        g = (g - v * (tl.sum(g * v, 1) / count)[:, None]) * inverse[:, None]
        tl.store(dz + row * target + i, g, mask=inside)


def _rows_first(x: Tensor) -> Tensor:
    """Numbers of a row side by side; rows may lie anywhere."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def transform(
    x: Tensor, P: int, width: int, dtype: torch.dtype, scale: float, signs: Tensor | None = None,
    adjoint: bool = False, source: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [rows, n] -> [rows, tiles, width] in `dtype`: see _fwht_kernel. signs (int8) and source (int32): [tiles, P]."""
    tables = signs if signs is not None else source
    tiles = 1 if tables is None else tables.shape[0]
    rows, n = x.shape
    x, S = _rows_first(x), segments(P)
    y = torch.empty(rows, tiles, width, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    c = config(P // S)

    def segment_by_segment(x: Tensor, y: Tensor, width: int, sign: int) -> None:
        _fwht_kernel[(min(triton.cdiv(len(x), c.R), PROGRAMS), tiles * S)](
            x, x if signs is None else signs, x if source is None else source, y, len(x), n, width, x.stride(0),
            P // S, S, scale, c.R, c.A, c.B, 1 if x.dtype == torch.bfloat16 else parts(x.dtype), parts(dtype), sign,
            source is not None, num_warps=c.num_warps, num_stages=1,
        )  # fmt: skip

    sign = 0 if signs is None else 2 if adjoint else 1
    if S == 1:
        segment_by_segment(x, y, width, sign)
        return y
    step = max(1, SCRATCH // (tiles * P))
    for first in range(0, rows, step):
        some, out = x[first : first + step], y[first : first + step]
        z = torch.empty(len(some), tiles, P, dtype=torch.float32, device=x.device)
        segment_by_segment(some, z, P, sign % 2)
        _across_kernel[(P // S // 128, tiles, len(some))](
            z, x if signs is None else signs, out, width, P // S, S, 128, parts(dtype), sign == 2,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return y


def srht(x: Tensor, signs: Tensor, chosen: Tensor, scale: float, block: int, eps: float) -> tuple[Tensor, Tensor]:
    """x [rows, n] -> y [rows, target] and rstd [rows, blocks] in float32; block 0: no norm, rstd is empty."""
    (rows, _), (tiles, P), target = x.shape, signs.shape, len(chosen)
    size = block or 256
    blocks = -(-target // size)
    y = torch.empty(rows, target, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, blocks if block else 0, dtype=torch.float32, device=x.device)
    step = max(1, SCRATCH // (tiles * P))
    for first in range(0, rows, step):
        z = transform(x[first : first + step], P, P, torch.float32, scale * P**-0.5, signs)
        some = slice(first, first + step)
        _choose_kernel[(len(z), triton.cdiv(blocks, norm_config(size)))](
            z, chosen, y[some], rstd[some], tiles * P, P, target, blocks, eps, size, norm_config(size),
            block > 0, num_warps=4,
        )  # fmt: skip
    return y, rstd


def srht_backward(
    dy: Tensor, y: Tensor, rstd: Tensor, signs: Tensor, source: Tensor, n: int, scale: float, block: int
) -> Tensor:
    """dx [rows, n]. source [tiles, P]: which number of y came from there, -1: none."""
    (rows, target), (tiles, P) = dy.shape, signs.shape
    dy = _rows_first(dy)
    if block and dy.numel():
        blocks = -(-target // block)
        dz = torch.empty(rows, target, dtype=torch.float32, device=dy.device)
        _norm_backward_kernel[(rows, triton.cdiv(blocks, norm_config(block)))](
            dy, y, rstd, dz, target, blocks, scale, dy.stride(0), block, norm_config(block), num_warps=4
        )
        dy, scale = dz, 1.0
    dx = transform(dy, P, n, y.dtype if tiles == 1 else torch.float32, scale * P**-0.5, signs, True, source)
    return dx[:, 0] if tiles == 1 else dx.sum(1).to(y.dtype)


CONFIGS = tuple(config(P) for P in (256, 512, 1024, 2048, WIDEST))
_NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def _build(c: Config, given: torch.dtype, made: torch.dtype, sign: int = 0, source: bool = False) -> Build:
    x = _NAMES[given]
    pointers = {"x": x, "signs": "*i8" if sign else x, "source": "*i32" if source else x, "y": _NAMES[made]}
    numbers = dict.fromkeys(("rows", "n", "width", "x_row", "P", "S"), "i32")
    first = 1 if given == torch.bfloat16 else parts(given)
    sizes = {"R": c.R, "A": c.A, "B": c.B, "PARTS_IN": first, "PARTS": parts(made), "SIGNS": sign, "SOURCE": source}
    aligned = ("n", "width", "x_row", "P")
    reason = "24 bytes on sm_80 and none on sm_90" if sign == 1 and given == torch.float32 else ""
    return Build(_fwht_kernel, {**pointers, **numbers, "scale": "fp32"}, sizes, c.num_warps, 1, aligned, reason)


def _build_across(S: int, made: torch.dtype, sign: bool) -> Build:
    signature = {"x": "*fp32", "signs": "*i8" if sign else "*fp32", "y": _NAMES[made], "width": "i32", "P": "i32"}
    sizes = {"S": S, "COLUMNS": 128, "PARTS": parts(made), "SIGNS": sign}
    return Build(_across_kernel, signature, sizes, 4, 1, ("width", "P"))


def fwht_builds() -> list[Build]:
    """What the transform alone runs; float16 where it differs, in the parts of its first product."""
    half, full = torch.bfloat16, torch.float32
    return [
        *(_build(c, half, half) for c in CONFIGS),
        *(_build(c, full, full) for c in CONFIGS),
        _build(CONFIGS[-1], torch.float16, torch.float16),
        *(_build_across(S, half, False) for S in (16, 32)),
        *(_build_across(S, full, False) for S in (16, 32)),
    ]


def srht_builds() -> list[Build]:
    """Signs before the transform, or a choice of numbers before and signs behind it; the choice and the norm."""
    half, full = torch.bfloat16, torch.float32
    block = {"BLOCK": 256, "BLOCKS": norm_config(256)}
    numbers = dict.fromkeys(("z_row", "P", "target", "blocks"), "i32")
    choose = {"z": "*fp32", "chosen": "*i32", "y": "*bf16", "rstd": "*fp32", **numbers, "eps": "fp32"}
    back = {"dy": "*bf16", "y": "*bf16", "rstd": "*fp32", "dz": "*fp32", "target": "i32", "blocks": "i32"}
    back |= {"scale": "fp32", "dy_row": "i32"}
    return [
        *(_build(c, x, full, 1) for c in CONFIGS[::4] for x in (half, full)),
        *(_build(c, full, x, 2, True) for c in CONFIGS[::4] for x in (half, full)),
        _build_across(32, half, True),
        *(Build(_choose_kernel, choose, {**block, "NORM": n}, 4, 3, ("z_row", "P", "target")) for n in (True, False)),
        Build(_norm_backward_kernel, back, block, 4, 3, ("target", "dy_row")),
    ]
