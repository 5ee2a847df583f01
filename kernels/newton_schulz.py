"""Nearest orthogonal matrices by odd polynomials, from products alone: what Muon makes of a momentum.

    X = U / (|U|_F + eps),    then per step    A = X X^T,    B = b A + c A A^T,    X <- a X + B X

m rows, n columns, m <= n (a tall U is transposed for the time being); the leading axes are a batch. A step maps each
singular value s of X to a s + b s^3 + c s^5 and leaves the singular vectors alone, so that after some steps all values
are near one. A and B are symmetric: only tiles on and above the diagonal are computed, and mirrored when stored.
Sources: Polar Express, arXiv:2505.16932 (seven steps, each with its own polynomial); Muon, arXiv:2502.16982 (one
polynomial, five times).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.op import NAMESPACE, Build, Op, pick, tl, triton, wide

Triple = tuple[float, float, float]

# (a, b, c) per step. In float64 the first maps singular values of [1e-4, 1] into [0.910, 1.084], the second those of
# [1e-3, 1] into [0.47, 1.20].
METHODS: dict[str, tuple[Triple, ...]] = {
    "polar_express": (
        (7.2086, -15.5131, 9.0178),
        (3.9623, -2.5813, 0.4542),
        (3.9466, -2.5765, 0.4544),
        (3.8991, -2.5671, 0.4566),
        (3.7186, -2.5308, 0.4653),
        (3.1390, -2.3073, 0.4733),
        (2.1715, -1.5246, 0.3885),
    ),
    "classic": ((3.4445, -4.7750, 2.0315),) * 5,
}

HALF = (torch.bfloat16, torch.float16)
# Multiprocessors of an H100 or H200: with fewer tiles of 128 than this, tiles of 64 leave fewer of them idle.
PROCESSORS = 132
# Rows of a strip, below which a CPU computes the whole square. 768 x 3072 on one core: 1.5 times as fast as the whole
# in bfloat16, 768 x 768 1.3 times; 256 x 256 is slower in strips in bfloat16 (0.6) and faster in float32 (1.2).
STRIP = 128


def symmetric_product_reference(x: Tensor) -> Tensor:
    """x x^T, whole, in the dtype that is given."""
    return x @ x.mT


def symmetric_polynomial_reference(a: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha A A^T + beta A, whole, in the dtype that is given."""
    return alpha * (a @ a.mT) + beta * a


def orthogonalise_reference(
    u: Tensor,
    method: str | Sequence[Triple] = "polar_express",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
) -> Tensor:
    """The steps as they are written above, in `dtype` (None: u's)."""
    x, tall = _scaled(u, dtype or u.dtype, eps)
    for a, b, c in schedule(method, steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram.mT)) @ x
    return x.mT if tall else x


def schedule(method: str | Sequence[Triple], steps: int | None = None) -> tuple[Triple, ...]:
    """(a, b, c) of each step: a name's or those that are given; `steps` cuts the list, or repeats its last.

    torch.optim.Muon's `ns_coefficients` and `ns_steps` are schedule((ns_coefficients,), ns_steps).
    Raises ValueError for an unknown name, an empty list or fewer than no steps.
    """
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"method={method!r} does not exist; {', '.join(METHODS)} do, or a list of (a, b, c)")
    triples = METHODS[method] if isinstance(method, str) else tuple(method)
    if not triples or any(len(t) != 3 for t in triples):
        raise ValueError(f"method={triples} is no list of (a, b, c), one for each step")
    steps = len(triples) if steps is None else steps
    if steps < 0:
        raise ValueError(f"steps={steps} is negative; None takes all {len(triples)} of the method")
    return (*triples[:steps], *[triples[-1]] * (steps - len(triples)))


def working_dtype(device: torch.device) -> torch.dtype:
    """What the products are fastest in: bfloat16 on a GPU and on processors that multiply it, else float32.

    768 x 3072 on one core of a processor with AVX-512 BF16: 490 GFLOP/s against 110 (30 where float32 falls out of the
    cache); without such instructions bfloat16 is emulated.
    """
    if device.type != "cpu":
        return torch.bfloat16
    known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return torch.bfloat16 if any(getattr(torch.cpu, name, bool)() for name in known) else torch.float32


def _scaled(u: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, bool]:
    """U / (|U|_F + eps), wide, in `dtype`, rounded once; and whether it was transposed for that."""
    tall = u.shape[-2] > u.shape[-1]
    exact = u.to(torch.promote_types(u.dtype, wide(dtype)))
    norm = torch.linalg.vector_norm(exact, dim=(-2, -1), keepdim=True)
    x = (exact / (norm + eps)).to(dtype)
    return x.mT if tall else x, tall


if triton is not None:

    @triton.jit
    def _upper(x, out, M, K, alpha, beta, ADD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
        """One tile (i, j), i <= j, of alpha x x^T (+ beta x, where x is symmetric), and its mirror image."""
        tile = tl.program_id(0)
        j = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)  # the square root may round across a column's border
        j = tl.where(j * (j + 1) // 2 > tile, j - 1, j)
        j = tl.where((j + 1) * (j + 2) // 2 <= tile, j + 1, j)
        i = tile - j * (j + 1) // 2
        batch = tl.program_id(1).to(tl.int64)
        x += batch * M * K
        out += batch * M * M
        rows = i * BLOCK + tl.arange(0, BLOCK)
        cols = j * BLOCK + tl.arange(0, BLOCK)
        ks = tl.arange(0, BLOCK_K)
        left = x + rows.to(tl.int64)[:, None] * K + ks[None, :]
        right = x + cols.to(tl.int64)[:, None] * K + ks[None, :]
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for k in range(0, K, BLOCK_K):
            inside = ks[None, :] < K - k
            a = tl.load(left, mask=(rows[:, None] < M) & inside, other=0.0)
            b = tl.load(right, mask=(cols[:, None] < M) & inside, other=0.0)
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
            left += BLOCK_K
            right += BLOCK_K
        acc *= alpha
        within = (rows[:, None] < M) & (cols[None, :] < M)
        here = rows.to(tl.int64)[:, None] * M + cols[None, :]
        if ADD:
            acc += beta * tl.load(x + here, mask=within, other=0.0).to(tl.float32)
        tl.store(out + here, acc, mask=within)
        if i != j:
            mirrored = (cols[:, None] < M) & (rows[None, :] < M)
            tl.store(out + cols.to(tl.int64)[:, None] * M + rows[None, :], tl.trans(acc), mask=mirrored)


def config(batch: int, m: int, k: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(BLOCK, BLOCK_K, warps, stages) of the product of `batch` matrices [m, k]. Unmeasured on a GPU.

    Rows that do not begin at multiples of 16 are moved number by number: large tiles of them spill registers.
    """
    if dtype not in HALF or m % 16 or k % 16:
        return 64, 32, 8, 2
    columns = -(-m // 128)
    many = batch * columns * (columns + 1) // 2 >= PROCESSORS
    return (128, 64, 8, 4) if many else (64, 64, 4, 4)


def _launch(x: Tensor, alpha: float, beta: float, add: bool) -> Tensor:
    """x: [batch, m, k], contiguous."""
    batch, m, k = x.shape
    out = torch.empty(batch, m, m, dtype=x.dtype, device=x.device)
    block, block_k, warps, stages = config(batch, m, k, x.dtype)
    tiles = -(-m // block)
    grid = (tiles * (tiles + 1) // 2, batch)
    _upper[grid](
        x, out, m, k, float(alpha), float(beta), add, block, block_k, num_warps=warps, num_stages=stages
    )  # fmt: skip
    return out


def _strips(x: Tensor, alpha: float, beta: float, add: bool) -> Tensor:
    """The CPU's form: strip by strip the columns up to the diagonal, and their mirror image."""
    batch, m, _ = x.shape
    if m <= STRIP or (m <= 2 * STRIP and x.dtype in HALF):
        if add:
            return torch.baddbmm(x, x, x.mT, beta=beta, alpha=alpha)
        return torch.bmm(x, x.mT) if alpha == 1.0 else torch.bmm(x, x.mT).mul_(alpha)
    out = torch.empty(batch, m, m, dtype=x.dtype, device=x.device)
    for b in range(batch):
        for first in range(0, m, STRIP):
            last = min(m, first + STRIP)
            strip = out[b, first:last, :last]
            if add:
                torch.addmm(x[b, first:last, :last], x[b, first:last], x[b, :last].T, beta=beta, alpha=alpha, out=strip)
            else:
                torch.mm(x[b, first:last], x[b, :last].T, out=strip)
                if alpha != 1.0:
                    strip.mul_(alpha)
            out[b, :first, first:last] = strip[:, :first].T
    return out


@torch.library.custom_op(f"{NAMESPACE}::symmetric_product", mutates_args=())
def _product(x: Tensor, alpha: float, beta: float, add: bool, path: str) -> Tensor:
    x = x.contiguous()  # free inside Newton-Schulz
    if not x.numel():
        return x.new_zeros(x.shape[0], x.shape[1], x.shape[1])
    return _launch(x, alpha, beta, add) if path == "triton" else _strips(x, alpha, beta, add)


@_product.register_fake
def _(x: Tensor, alpha: float, beta: float, add: bool, path: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])


def _save(ctx, inputs: tuple[Tensor, float, float, bool, str], output: Tensor) -> None:
    x, ctx.alpha, ctx.beta, ctx.add, _ = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    """dx = alpha (dy + dy^T) x, and beta dy where x is added: library products, since dy is not symmetric."""
    (x,) = ctx.saved_tensors
    both = dy + dy.mT
    dx = torch.baddbmm(dy, both, x, beta=ctx.beta, alpha=ctx.alpha) if ctx.add else ctx.alpha * torch.bmm(both, x)
    return dx, None, None, None, None


_product.register_autograd(_backward, setup_context=_save)


def _cast(x: Tensor) -> Tensor:
    """As autocast casts what is multiplied."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x


def _batched(x: Tensor) -> Tensor:
    """[..., m, n] -> [batch, m, n]."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def symmetric_product(x: Tensor, impl: str = "auto") -> Tensor:
    """x x^T: [..., m, n] -> [..., m, m], sums in float32, tiles above the diagonal mirrored.

    Under autocast x is cast as for a matrix product. `auto` takes Triton's kernel for half precision only: in float32
    it multiplies without tensor cores, where the library is well tuned.
    """
    path = pick("symmetric_product", x, impl, cpu=True, fits=x.dtype in HALF)
    x = _cast(x)
    with torch.autocast(x.device.type, enabled=False):
        if path == "reference":
            return symmetric_product_reference(x)
        return _product(_batched(x), 1.0, 0.0, False, path).view(*x.shape[:-1], x.shape[-2])


def symmetric_polynomial(a: Tensor, alpha: float, beta: float, impl: str = "auto") -> Tensor:
    """alpha A A^T + beta A for symmetric A [..., m, m] in one pass; what is below A's diagonal is not looked at there.

    Casts and paths as symmetric_product's.
    """
    path = pick("symmetric_polynomial", a, impl, cpu=True, fits=a.dtype in HALF)
    a = _cast(a)
    with torch.autocast(a.device.type, enabled=False):
        if path == "reference":
            return symmetric_polynomial_reference(a, alpha, beta)
        return _product(_batched(a), alpha, beta, True, path).view(a.shape)


def iterate(x: Tensor, triples: Sequence[Triple], path: str) -> Tensor:
    """The steps on x [batch, m, n], m <= n, whose spectral norm is at most one. The third product is the library's."""
    for a, b, c in triples:
        gram = _product(x, 1.0, 0.0, False, path)
        x = torch.baddbmm(x, _product(gram, c, b, True, path), x, beta=a)
    return x


def orthogonalise(
    u: Tensor,
    method: str | Sequence[Triple] = "polar_express",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
    impl: str = "auto",
) -> Tensor:
    """U with its singular values moved to about one: [..., m, n] -> the same shape in `dtype`.

    method: polar_express, classic, or (a, b, c) per step.  steps: None: all of the method's; more repeat the last.
    dtype: of the products (None: u's own); `working_dtype` names the fastest. The norm is taken and divided by before
    the cast, so a gradient too small for float16 survives.  eps: keeps a zero U zero.
    The result does not depend on U's scale, as long as |U|_F is far from eps.
    Raises ValueError for an unknown method.
    """
    path = pick("newton_schulz", u, impl, cpu=True, fits=(dtype or u.dtype) in HALF)
    if path == "reference":
        with torch.autocast(u.device.type, enabled=False):
            return orthogonalise_reference(u, method, steps, dtype, eps)
    triples = schedule(method, steps)
    with torch.autocast(u.device.type, enabled=False):
        x, tall = _scaled(u, dtype or u.dtype, eps)
        if x.numel():
            x = iterate(_batched(x).contiguous(), triples, path).view(x.shape)
        return x.mT if tall else x


def _builds() -> list[Build]:
    """Float16 once: its instructions are bfloat16's."""
    if triton is None:
        return []
    builds = []
    for dtype, name, batch, k, add in (
        *((torch.bfloat16, "bf16", batch, 1024, add) for batch in (1, PROCESSORS) for add in (False, True)),
        *((torch.bfloat16, "bf16", 1, 1023, add) for add in (False, True)),  # odd sizes
        (torch.float16, "fp16", PROCESSORS, 1024, True),
        *((torch.float32, "fp32", 1, 1024, add) for add in (False, True)),
    ):
        block, block_k, warps, stages = config(batch, 1024, k, dtype)
        types = {"x": f"*{name}", "out": f"*{name}", "M": "i32", "K": "i32", "alpha": "fp32", "beta": "fp32"}
        constants = {"ADD": add, "BLOCK": block, "BLOCK_K": block_k}
        builds.append(Build(_upper, types, constants, warps, stages, () if k % 16 else ("M", "K")))
    return builds


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()}


def _symmetric_inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor | float]:
    """Symmetric as it is in Newton-Schulz, with a spectrum in [0, 1]."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    return {"a": (x @ x.mT).requires_grad_(), "alpha": 2.0315, "beta": -4.775}


def _matrices(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    return {"u": torch.randn(shape, generator=generator, dtype=torch.float64)}


PRODUCT = Op(
    "symmetric_product",
    symmetric_product,
    symmetric_product_reference,
    _inputs,
    shapes=((1, 1), (3, 7, 20), (65, 33), (2, 130, 70)),
    empty=(0, 3, 5),
    paths=("triton", "cpu", "reference"),
    builds=_builds,
)
POLYNOMIAL = Op(
    "symmetric_polynomial",
    symmetric_polynomial,
    symmetric_polynomial_reference,
    _symmetric_inputs,
    shapes=((1, 1), (3, 7, 20), (65, 70), (2, 130, 140)),
    empty=(0, 3, 5),
    paths=("triton", "cpu", "reference"),
)
OP = Op(
    "newton_schulz",
    orthogonalise,
    orthogonalise_reference,
    _matrices,
    shapes=((1, 1), (3, 9, 20), (70, 33), (2, 33, 33)),
    empty=(0, 3, 5),
    paths=("triton", "cpu", "reference"),
)
