"""Walsh-Hadamard transforms on a processor: butterflies of four in place, compiled by Numba; without it, H_A (x) H_B as
two products of matrices.

A row is cut from the long strides down to pieces that lie in the first cache, and the last 16 numbers of each 256 are
turned so that every step works on whole vectors. The public function, 2,097,152 float32 numbers on a core: 2.1 ms in
rows of 4,096 and of 65,536; a radix-2 loop in PyTorch between two buffers 6.7 and 7.4.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from kernels.cpu import array, numba, spread

PIECE = 8192  # float32 numbers that a first cache of 48 KiB holds beside what is read


@cache
def _compiled() -> SimpleNamespace:
    """Numba's functions, all over rows [first, stop); compiled when first called, for each dtype of `work`."""
    import numpy as np

    njit = numba().njit(nogil=True, error_model="numpy")

    @njit
    def fours(y, size):
        """Two steps of the transform, of strides size / 2 and size / 4, in every `size` numbers of y."""
        q = size // 4
        for base in range(0, len(y), size):
            A, B = y[base : base + q], y[base + q : base + 2 * q]
            C, D = y[base + 2 * q : base + 3 * q], y[base + 3 * q : base + 4 * q]
            for i in range(q):
                a, b, c, d = A[i], B[i], C[i], D[i]
                e, f, g, h = a + b, a - b, c + d, c - d
                A[i], B[i], C[i], D[i] = e + g, f + h, e - g, f - h

    @njit
    def twos(y, size):
        q = size // 2
        for base in range(0, len(y), size):
            A, B = y[base : base + q], y[base + q : base + size]
            for i in range(q):
                a, b = A[i], B[i]
                A[i], B[i] = a + b, a - b

    @njit
    def piece(y, turned, scale):
        size = len(y)
        while size >= 64:
            fours(y, size)
            size //= 4
        if size == 32:
            twos(y, size)
        if len(y) < 256:
            size = min(size, 16)
            while size > 1:
                twos(y, size)
                size //= 2
            for i in range(len(y)):
                y[i] *= scale
            return
        for base in range(0, len(y), 256):
            for i in range(16):
                for j in range(16):
                    turned[j * 16 + i] = y[base + i * 16 + j]
            fours(turned, 256)
            fours(turned, 64)
            for i in range(16):
                for j in range(16):
                    y[base + i * 16 + j] = turned[j * 16 + i] * scale

    @njit
    def transform(y, turned, scale):
        size = len(y)
        while size > PIECE:
            fours(y, size)
            size //= 4
        for base in range(0, len(y), size):
            piece(y[base : base + size], turned, scale)

    @njit
    def fwht(x, y, scale, first, stop):
        turned = np.empty(256, y.dtype)
        for row in range(first, stop):
            y[row, :] = x[row, :]
            transform(y[row], turned, scale)

    @njit
    def srht(x, signs, chosen, y, rstd, scale, block, eps, first, stop):
        tiles, P = signs.shape
        n, target = x.shape[1], len(chosen)
        work, turned = np.empty(P, y.dtype), np.empty(256, y.dtype)
        for row in range(first, stop):
            for tile in range(tiles):
                for j in range(n):
                    work[j] = x[row, j] * signs[tile, j]
                work[n:] = 0
                transform(work, turned, scale)
                for i in range(tile * P, min(target, (tile + 1) * P)):
                    y[row, i] = work[chosen[i]]
            for b in range(rstd.shape[1]):
                part = y[row, b * block : min(target, (b + 1) * block)]
                total = 0.0
                for i in range(len(part)):
                    total += np.float64(part[i]) * part[i]
                rstd[row, b] = 1 / np.sqrt(total / len(part) + eps)
                for i in range(len(part)):
                    part[i] *= rstd[row, b]

    @njit
    def srht_backward(dy, y, rstd, signs, chosen, dx, scale, block, first, stop):
        tiles, P = signs.shape
        n, target = dx.shape[1], len(chosen)
        work, turned = np.empty(P, dx.dtype), np.empty(256, dx.dtype)
        along = np.zeros(rstd.shape[1], dx.dtype)
        for row in range(first, stop):
            dx[row, :] = 0
            for b in range(rstd.shape[1]):
                total = 0.0
                stop_block = min(target, (b + 1) * block)
                for i in range(b * block, stop_block):
                    total += np.float64(dy[row, i]) * y[row, i]
                along[b] = total / (stop_block - b * block)
            for tile in range(tiles):
                work[:] = 0
                for i in range(tile * P, min(target, (tile + 1) * P)):
                    g = dy[row, i]
                    if block > 0:
                        g = (g - y[row, i] * along[i // block]) * rstd[row, i // block]
                    work[chosen[i]] = g
                transform(work, turned, scale)
                for j in range(n):
                    dx[row, j] += work[j] * signs[tile, j]

    return SimpleNamespace(fwht=fwht, srht=srht, srht_backward=srht_backward)


@cache
def _matrix(n: int, dtype: torch.dtype) -> Tensor:
    h = torch.ones(1, 1, dtype=dtype)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def _places(chosen: Tensor, P: int) -> Tensor:
    """Where the chosen numbers stand in the tiles of a row, one behind the other."""
    return torch.arange(len(chosen)) // P * P + chosen


def fwht(x: Tensor) -> Tensor:
    """x [rows, P] in float32 or float64 -> its orthonormal transform."""
    (rows, P), scale = x.shape, x.shape[1] ** -0.5
    if numba() is None:
        A = 1 << ((P.bit_length() - 1) // 2)
        h = x.reshape(rows, A, P // A) @ _matrix(P // A, x.dtype)
        return (_matrix(A, x.dtype) @ h).reshape(rows, P) * scale
    y = torch.empty(rows, P, dtype=x.dtype)
    a, b, run = array(x.contiguous()), array(y), _compiled().fwht
    scale = b.dtype.type(scale)
    spread(rows, 65536 // P + 1, lambda first, stop: run(a, b, scale, first, stop))
    return y


def srht(x: Tensor, signs: Tensor, chosen: Tensor, scale: float, block: int, eps: float) -> tuple[Tensor, Tensor]:
    """x [rows, n] in float32 or float64 -> y [rows, target], rstd [rows, blocks]; block 0: no norm, rstd is empty."""
    rows, P, target = len(x), signs.shape[1], len(chosen)
    if numba() is None:
        z = torch.nn.functional.pad(x, (0, P - x.shape[1]))[:, None] * signs
        y = fwht(z.view(-1, P)).view(rows, -1)[:, _places(chosen, P)] * scale
        if not block:
            return y, y.new_empty(rows, 0)
        parts = y.split(block, 1)
        r = torch.cat([(p.square().mean(1, True) + eps).rsqrt() for p in parts], 1)
        return y * r.repeat_interleave(block, 1)[:, :target], r
    y = torch.empty(rows, target, dtype=x.dtype)
    rstd = torch.empty(rows, -(-target // block) if block else 0, dtype=x.dtype)
    a, s, c, b, r = map(array, (x.contiguous(), signs, chosen, y, rstd))
    run, factor = _compiled().srht, b.dtype.type(scale * P**-0.5)
    spread(rows, 65536 // P + 1, lambda first, stop: run(a, s, c, b, r, factor, block, eps, first, stop))
    return y, rstd


def srht_backward(
    dy: Tensor, y: Tensor, rstd: Tensor, signs: Tensor, chosen: Tensor, n: int, scale: float, block: int
) -> Tensor:
    """dx [rows, n], the arguments in one of float32 and float64."""
    rows, P = len(dy), signs.shape[1]
    if numba() is None:
        if block:
            along = torch.cat([p.mean(1, True) for p in (dy * y).split(block, 1)], 1)
            dy = dy - y * along.repeat_interleave(block, 1)[:, : dy.shape[1]]
            dy = dy * rstd.repeat_interleave(block, 1)[:, : dy.shape[1]]
        z = dy.new_zeros(rows, signs.numel())
        z[:, _places(chosen, P)] = dy * scale
        return (fwht(z.view(-1, P)).view(rows, *signs.shape) * signs).sum(1)[:, :n].contiguous()
    dx = torch.empty(rows, n, dtype=dy.dtype)
    g, b, r, s, c, d = map(array, (dy.contiguous(), y, rstd, signs, chosen, dx))
    run, factor = _compiled().srht_backward, d.dtype.type(scale * P**-0.5)
    spread(rows, 65536 // P + 1, lambda first, stop: run(g, b, r, s, c, d, factor, block, first, stop))
    return dx
