"""Walsh-Hadamard transform y = H_P x / sqrt(P), and the sketch that is made of it, SRHT.

    H_1 = 1,  H_2P = [[H_P, H_P], [H_P, -H_P]]: H is symmetric and orthonormal, so it is its own inverse and adjoint.
    SRHT: y[t P + j] = scale * (H_P / sqrt(P) * (signs_t * pad(x)))[chosen_t[j]],  tiles t < T = ceil(target / P)
    block norm: y_b / sqrt(mean(y_b^2) + eps / target) over each `block` numbers of y

n numbers in, P the power of two from n up, `target` numbers out; scale = sqrt(P / target) makes E|y|^2 = |x|^2.
eps is relative to 1 / target, the mean square of a row of norm 1, so that its length stays; zeros stay zeros.
Sums are kept in float32 at least; outputs have the dtype of x, under autocast too.
Sources: Ailon and Chazelle, The Fast Johnson-Lindenstrauss Transform, 2009; Tropp, arXiv:1011.1595.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.hadamard import gpu, processor
from kernels.op import NAMESPACE, Op, pick, power_of_2, wide


class SRHT(NamedTuple):
    """What an SRHT is made of: signs [T, P] int8, chosen [target] int32, in each tile a prefix of a permutation."""

    signs: Tensor
    chosen: Tensor

    @classmethod
    def draw(cls, n: int, target: int, generator: torch.Generator | None = None) -> SRHT:
        """For rows of n numbers, target numbers out. Raises ValueError unless both are positive."""
        if n < 1 or target < 1:
            raise ValueError(f"an SRHT of {n} numbers to {target} is nothing; both must be positive")
        P = power_of_2(n)
        tiles = -(-target // P)
        signs = torch.randint(2, (tiles, P), generator=generator, dtype=torch.int8) * 2 - 1
        chosen = torch.cat([torch.randperm(P, generator=generator) for _ in range(tiles)])[:target]
        return cls(signs, chosen.int())


def fwht_reference(x: Tensor) -> Tensor:
    """log2(P) steps in plain PyTorch, float32 at least inside."""
    P = x.shape[-1]
    y, h = x.to(wide(x.dtype)), 1
    while h < P:
        y = y.unflatten(-1, (P // (2 * h), 2, h))
        y = torch.stack((y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]), -2).flatten(-3)
        h *= 2
    return (y * P**-0.5).to(x.dtype)


def srht_reference(
    x: Tensor, signs: Tensor, chosen: Tensor, scale: float | None = None, block: int | None = None, eps: float = 1e-6
) -> Tensor:
    """The formula in plain PyTorch, float32 at least inside."""
    P, target = signs.shape[1], len(chosen)
    scale = (P / target) ** 0.5 if scale is None else scale
    z = torch.nn.functional.pad(x.to(wide(x.dtype)), (0, P - x.shape[-1]))[..., None, :] * signs
    place = torch.arange(target, device=x.device) // P * P + chosen
    y = fwht_reference(z).flatten(-2)[..., place] * scale
    if block:
        y = torch.cat([p * (p.square().mean(-1, True) + eps / target).rsqrt() for p in y.split(block, -1)], -1)
    return y.to(x.dtype)


@torch.library.custom_op(f"{NAMESPACE}::fwht", mutates_args=())
def _fwht(x: Tensor, impl: str) -> Tensor:
    if impl == "triton":
        P = x.shape[1]
        return gpu.transform(x, P, P, x.dtype, P**-0.5)[:, 0]
    return processor.fwht(x.to(wide(x.dtype))).to(x.dtype)


@_fwht.register_fake
def _(x: Tensor, impl: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fwht_save(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.impl = inputs[1]


def _fwht_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    """The transform is symmetric: dx = H dy / sqrt(P)."""
    return _fwht(dy, ctx.impl), None


_fwht.register_autograd(_fwht_backward, setup_context=_fwht_save)


def fwht(x: Tensor, impl: str = "auto") -> Tensor:
    """Orthonormal Walsh-Hadamard transform along the last axis, in natural order: fwht(fwht(x)) = x.

    x: [..., P], P a power of two. Returns [..., P] in x's dtype. On a GPU up to P = 131,072, above that and in float64
    the plain form; a processor takes any P. Raises ValueError if P is not a power of two.
    """
    P = x.shape[-1]
    if power_of_2(P) != P:
        raise ValueError(f"fwht: {P} is not a power of two; pad the last axis to {power_of_2(P)}")
    path = pick("fwht", x, impl, cpu=True, fits=P <= gpu.WIDEST_TWICE and x.dtype != torch.float64)
    if path == "reference" or not x.numel():
        return fwht_reference(x)
    return _fwht(x.reshape(-1, P), path).view(x.shape)


@torch.library.custom_op(f"{NAMESPACE}::srht", mutates_args=())
def _srht(
    x: Tensor, signs: Tensor, chosen: Tensor, scale: float, block: int, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    signs, chosen = signs.contiguous(), chosen.contiguous()
    if impl == "triton":
        return gpu.srht(x, signs, chosen, scale, block, eps)
    y, rstd = processor.srht(x.to(wide(x.dtype)), signs, chosen, scale, block, eps)
    return y.to(x.dtype), rstd


@_srht.register_fake
def _(
    x: Tensor, signs: Tensor, chosen: Tensor, scale: float, block: int, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    blocks = -(-len(chosen) // block) if block else 0
    rstd = torch.empty(x.shape[0], blocks, dtype=wide(x.dtype), device=x.device)
    return torch.empty(x.shape[0], len(chosen), dtype=x.dtype, device=x.device), rstd


@torch.library.custom_op(f"{NAMESPACE}::srht_backward", mutates_args=())
def _srht_back(
    dy: Tensor, y: Tensor, rstd: Tensor, signs: Tensor, chosen: Tensor, n: int, scale: float, block: int, impl: str
) -> Tensor:
    signs, chosen = signs.contiguous(), chosen.contiguous()
    if impl == "triton":
        i = torch.arange(len(chosen), dtype=torch.int32, device=dy.device)
        source = torch.full((signs.numel(),), -1, dtype=torch.int32, device=dy.device)
        P = signs.shape[1]
        source[i // P * P + chosen] = i
        return gpu.srht_backward(dy, y, rstd, signs, source.view(signs.shape), n, scale, block)
    dtype = wide(dy.dtype)
    return processor.srht_backward(dy.to(dtype), y.to(dtype), rstd, signs, chosen, n, scale, block).to(y.dtype)


@_srht_back.register_fake
def _(
    dy: Tensor, y: Tensor, rstd: Tensor, signs: Tensor, chosen: Tensor, n: int, scale: float, block: int, impl: str
) -> Tensor:
    return torch.empty(dy.shape[0], n, dtype=y.dtype, device=dy.device)


def _srht_save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, signs, chosen, ctx.scale, ctx.block, _, ctx.impl = inputs
    ctx.n = x.shape[1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, signs, chosen)


def _srht_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple:
    """z before the norm, y behind it: dz = rstd * (dy - y mean(dy y)) by block; then the adjoint of the choice, which
    writes what was read and zeros elsewhere, of the transform, which is itself, and of the signs, summed over tiles.
    """
    y, rstd, signs, chosen = ctx.saved_tensors
    dx = _srht_back(dy, y, rstd, signs, chosen, ctx.n, ctx.scale, ctx.block, ctx.impl)
    return dx, None, None, None, None, None, None


_srht.register_autograd(_srht_backward, setup_context=_srht_save)


def srht(
    x: Tensor, signs: Tensor, chosen: Tensor, scale: float | None = None, block: int | None = None, eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Sketch of the last axis by a subsampled randomised Hadamard transform: `srht(x, *SRHT.draw(n, target))`.

    x: [..., n], P / 2 < n <= P.  signs: [T, P] of +-1, int8.  chosen: [target], int32: the numbers of tile t stand from
    t P on and are different among themselves.  scale: None is sqrt(P / target), which keeps norms in expectation.
    block: None, or a power of two: RMSNorm over each so many outputs (the last block may be shorter).
    Returns [..., target] in x's dtype. Raises ValueError for tables that do not fit x or each other; what is chosen is
    looked at on a processor alone, since a GPU would have to be waited for.
    """
    (tiles, P), n, target = signs.shape, x.shape[-1], len(chosen)
    if power_of_2(n) != P or tiles != -(-target // P):
        raise ValueError(
            f"srht: signs [{tiles}, {P}] do not fit {n} numbers in, {target} out; SRHT.draw({n}, {target}) makes those"
        )
    if chosen.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(end) for end in chosen.aminmax())
        if low < 0 or high >= P:  # compiled code would read and write beyond the tile
            raise ValueError(f"srht: chosen holds {low} to {high}; numbers of a tile are 0 to {P - 1}")
    if block is not None and (block < 1 or power_of_2(block) != block):
        raise ValueError(f"srht: block={block} is not a power of two; 256 is usual, None is no norm")
    # The largest block is one that a program of the kernel holds.
    fits = P <= gpu.WIDEST_TWICE and x.dtype != torch.float64 and (block or 1) <= 2048
    path = pick("srht", x, impl, cpu=True, fits=fits)
    scale = (P / target) ** 0.5 if scale is None else scale
    if path == "reference" or not x.numel():
        return srht_reference(x, signs, chosen, scale, block, eps)
    y, _ = _srht(x.reshape(-1, n), signs, chosen, scale, block or 0, eps / target, path)
    return y.view(*x.shape[:-1], target)


def _fwht_inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    return {"x": torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()}


def _srht_inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    """shape: rows, numbers in, numbers out, block (0: none). The second row is zeros."""
    rows, n, target, block = shape
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    x[1:2] = 0
    signs, chosen = SRHT.draw(n, target, generator)
    return {"x": x.requires_grad_(), "signs": signs, "chosen": chosen, "block": block or None, "eps": 1e-2}


FWHT = Op(
    "fwht",
    fwht,
    fwht_reference,
    _fwht_inputs,
    shapes=((1, 1), (3, 8), (33, 128), (3, 1024), (2, 8192)),
    empty=(0, 16),
    paths=("triton", "cpu", "reference"),
    builds=gpu.fwht_builds,
)
SKETCH = Op(
    "srht",
    srht,
    srht_reference,
    _srht_inputs,
    shapes=((1, 1, 1, 0), (3, 60, 40, 16), (3, 300, 1100, 256), (2, 5000, 700, 256)),
    empty=(0, 5, 3, 2),
    paths=("triton", "cpu", "reference"),
    builds=gpu.srht_builds,
)
