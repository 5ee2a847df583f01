"""NorMuon's update of a whole group of matrices: momentum, orthogonalisation, neuron statistic, cautious decay, write.

    M <- mu M + (1 - mu) G                                momentum
    U  = (1 - mu) G + mu M                                Nesterov's form; else U = M
    O  = orthogonalise(U)                                 kernels/newton_schulz.py
    S <- beta2 S + (1 - beta2) mean of O^2                over a neuron's weights: one number per row or column
    N  = O / sqrt(max(S, 1e-10)),    N <- N |O|_F / max(|N|_F, 1e-10)
    W <- W - lr wd W [sign N = sign W]                    cautious: decay what the step shrinks; zero counts as positive
    W <- W - lr scale(m, n) N

m rows (fan out), n columns (fan in). M is a running mean, as in torch.optim.Muon; a running sum would differ by a
factor, to which the orthogonalisation is blind. Neither M nor S is corrected for its start at zero: for that reason,
and because |N|_F is restored.
Sources: NorMuon, arXiv:2510.05491 (whose neurons are rows, whatever the shape); cautious decay, arXiv:2510.12402; Muon,
arXiv:2502.16982 and torch.optim.Muon, which is `neuron_norm=None, cautious=False, method="classic"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kernels.newton_schulz import Triple, schedule, working_dtype
from kernels.normuon import tiles
from kernels.normuon.reference import NEURON_NORMS, SCALES, Rule, new_statistic, statistic_shape, update_reference
from kernels.op import NAMESPACE, Op, pick

__all__ = ["NEURON_NORMS", "OP", "SCALES", "new_statistic", "normuon_update"]


@torch.library.custom_op(f"{NAMESPACE}::normuon", mutates_args=("params", "momenta", "statistics"))
def _update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    statistics: Sequence[Tensor],
    lr: float,
    momentum: float,
    beta2: float,
    weight_decay: float,
    cautious: bool,
    neuron_norm: str,
    nesterov: bool,
    scale: str,
    coefficients: Sequence[float],
    dtype: torch.dtype,
    eps: float,
    path: str,
) -> None:
    """One node for torch.compile. neuron_norm: "" is none.  coefficients: a, b, c of each step in a row."""
    triples = list(zip(coefficients[::3], coefficients[1::3], coefficients[2::3], strict=True))
    rule = Rule(
        lr, momentum, beta2, weight_decay, cautious, neuron_norm or None, nesterov, scale, triples, dtype, eps
    )  # fmt: skip
    if path == "triton":
        tiles.update(list(params), list(grads), list(momenta), list(statistics), rule)
    else:
        update_reference(params, grads, momenta, statistics, rule, path)


@_update.register_fake
def _(params, grads, momenta, statistics, *_) -> None:
    """Nothing is returned."""


@torch.no_grad()
def normuon_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    statistics: Sequence[Tensor] = (),
    *,
    lr: float,
    momentum: float = 0.95,
    beta2: float = 0.95,
    weight_decay: float = 0.0,
    cautious: bool = True,
    neuron_norm: str | None = "auto",
    nesterov: bool = True,
    scale: str = "spectral",
    method: str | Sequence[Triple] = "polar_express",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
    impl: str = "auto",
) -> None:
    """One step of every matrix, in place on params, momenta and statistics; gradients are read only.

    params: [..., m, n], leading axes are more matrices (experts).  grads, momenta: of the same shapes.
    statistics: `new_statistic(param, neuron_norm)` of each, or nothing where neuron_norm is None.
    neuron_norm: auto: one number per row where m >= n, else per column; row; column; None: no statistic.
    cautious: decay only where the step and the weight have the same sign.  scale: spectral (lr / sqrt(n) of movement,
    root mean square), original (the same, torch.optim.Muon's name), match_rms_adamw (0.2 lr).
    method, steps, eps: orthogonalise's.  dtype: of its products; None: the fastest here, bfloat16 where it is native.
    Matrices that share their two sides are orthogonalised as one batch by Triton. It copies what is not contiguous or
    does not begin at a multiple of 16 bytes.
    Raises ValueError for unknown names, and for lists that do not belong together.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} does not exist; {', '.join(SCALES)} do")
    if neuron_norm not in NEURON_NORMS:
        raise ValueError(f"neuron_norm={neuron_norm!r} does not exist; {', '.join(map(str, NEURON_NORMS))} do")
    statistics = statistics if neuron_norm is not None else ()
    _check(params, grads, momenta, statistics, neuron_norm)
    triples = schedule(method, steps)
    if not params:
        return
    dtype = dtype or working_dtype(params[0].device)
    path = pick("normuon", params[0], impl, cpu=True, fits=tiles.fits([*params, *grads, *momenta, *statistics], dtype))
    with torch.autocast(params[0].device.type, enabled=False):
        _update(
            list(params), list(grads), list(momenta), list(statistics), lr, momentum, beta2, weight_decay, cautious,
            neuron_norm or "", nesterov, scale, [number for triple in triples for number in triple], dtype, eps, path,
        )  # fmt: skip


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    statistics: Sequence[Tensor],
    neuron_norm: str | None,
) -> None:
    counts = [len(grads), len(momenta), *([len(statistics)] if neuron_norm is not None else [])]
    if any(count != len(params) for count in counts):
        raise ValueError(f"{len(params)} params, but {counts} gradients, momenta and statistics")
    for i, w in enumerate(params):
        if w.dim() < 2:
            raise ValueError(f"params[{i}] has shape {tuple(w.shape)}; a matrix is needed, vectors are AdamW's")
        if not w.shape == grads[i].shape == momenta[i].shape:
            raise ValueError(
                f"params[{i}] has shape {tuple(w.shape)}, its gradient {tuple(grads[i].shape)}, its momentum "
                f"{tuple(momenta[i].shape)}"
            )
        if neuron_norm is not None:
            wanted = statistic_shape(w.shape, neuron_norm)
            if statistics[i].shape != wanted:
                raise ValueError(
                    f"statistics[{i}] has shape {tuple(statistics[i].shape)}; neuron_norm={neuron_norm!r} keeps "
                    f"{tuple(wanted)} for a parameter of shape {tuple(w.shape)}: new_statistic makes it"
                )


def _functional(impl: str = "auto", **tensors: Tensor) -> tuple[Tensor, ...]:
    """One step of copies: w0, w1, ... are parameters, g, m and s theirs. Returns the new w, m and s."""
    count = len(tensors) // 4
    params, momenta, statistics = ([tensors[f"{kind}{i}"].clone() for i in range(count)] for kind in "wms")
    grads = [tensors[f"g{i}"] for i in range(count)]
    normuon_update(
        params, grads, momenta, statistics, lr=0.3, momentum=0.9, beta2=0.8, weight_decay=0.1, dtype=params[0].dtype,
        impl=impl,
    )  # fmt: skip
    return (*params, *momenta, *statistics)


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """shape: two sides; two matrices of them and one transposed, some steps after the start."""
    m, n = shape
    tensors: dict[str, Tensor] = {}
    for i, size in enumerate(((m, n), (m, n), (n, m))):
        w, noise = (torch.randn(size, generator=generator, dtype=torch.float64) / max(1, n) ** 0.5 for _ in range(2))
        # A gradient of singular values near one, so that Newton-Schulz, judged by itself, adds little error of its own.
        tall = size[0] > size[1]
        g = torch.linalg.qr(noise if tall else noise.mT)[0]
        g = g if tall else g.mT
        s = torch.rand(statistic_shape(w.shape, "auto"), generator=generator, dtype=torch.float64) + 0.1
        tensors |= {f"w{i}": w, f"g{i}": 0.1 * g, f"m{i}": 0.08 * g + 0.01 * noise, f"s{i}": s / max(1, m, n)}
    return tensors


OP = Op(
    "normuon",
    _functional,
    partial(_functional, impl="reference"),
    _inputs,
    shapes=((2, 3), (9, 20), (70, 33)),  # one row alone: only in float32, tests/kernels/test_normuon.py
    empty=(0, 5),
    paths=("triton", "cpu", "reference"),
    builds=tiles.builds,
)
