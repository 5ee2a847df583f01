"""Figures of weight tensors: moments, norms, histogram, singular values, and how far two checkpoints lie apart.

Everything is computed in float64. Tensors come one by one from a checkpoint's files, so one at a time is in memory.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.lib.config import InputError

AT_ONCE = 1 << 22  # numbers turned into float64 together
BINS = 61
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
ROWS = 1024  # of a matrix whose angles are taken
LONGEST_SIDE = (
    1024  # of a matrix whose singular values are computed from the matrix itself; five times as long as below
)
LONGEST_SHORT_SIDE = 8192  # of one whose singular values are computed at all


@dataclass(frozen=True)
class Moments:
    """n numbers; `bad` of them are not finite and left out of the rest. kurtosis: excess, 0 for a normal distribution.

    mean, std (over n, not n - 1), norm (L2), largest |x|, share of zeros, low and high end.
    """

    n: int
    bad: int
    mean: float
    std: float
    norm: float
    kurtosis: float
    largest: float
    zeros: float
    low: float
    high: float


@dataclass(frozen=True)
class Axes:
    """A matrix by its rows and columns: mean and standard deviation of their L2 norms.

    row_cosine: mean |cosine| of two different rows, of at most ROWS of them, spread over all; random rows of n columns
    have about 0.8 / sqrt(n).
    """

    row_norm: float
    row_norm_std: float
    column_norm: float
    column_norm_std: float
    row_cosine: float


@dataclass(frozen=True)
class TensorFigures:
    """A tensor's name, shape and moments; histogram: edges and counts; singular: values, largest first, of a matrix.

    quantiles: of its finite numbers at QUANTILES.  axes: of a matrix of finite numbers.
    """

    name: str
    shape: tuple[int, ...]
    moments: Moments
    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    singular: tuple[float, ...] = field(default=(), repr=False)
    quantiles: tuple[float, ...] = ()
    axes: Axes | None = None

    @property
    def stable_rank(self) -> float:
        """|W|_F^2 / |W|_2^2: how many directions of the strongest one's size would have this norm."""
        return (
            sum(s * s for s in self.singular) / self.singular[0] ** 2
            if self.singular and self.singular[0]
            else math.nan
        )

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values' shares.   Source: Roy & Vetterli, EUSIPCO 2007."""
        return entropy_rank(self.singular)


@dataclass(frozen=True)
class Change:
    """From a to b: angle between the two as vectors (degrees), |b - a| / |a|, |b| / |a|."""

    name: str
    angle: float
    relative: float
    norm_ratio: float


def entropy_rank(values: Any) -> float:
    """exp(entropy of the shares of non-negative numbers); NaN where there is nothing."""
    total = math.fsum(values)
    if not total > 0:
        return math.nan
    return math.exp(-math.fsum(v / total * math.log(v / total) for v in values if v > 0))


def moments(x: Tensor) -> Moments:
    """The figures of all numbers in a tensor."""
    flat = x.detach().reshape(-1)
    pieces = flat.split(AT_ONCE)
    n = flat.numel()

    def each() -> Iterator[Tensor]:
        for piece in pieces:
            wide = piece.double()
            yield wide[wide.isfinite()]

    good, total, square, low, high, zeros = 0, 0.0, 0.0, math.inf, -math.inf, 0
    for wide in each():
        if wide.numel():
            good += wide.numel()
            total += float(wide.sum())
            square += float(wide.square().sum())
            zeros += int((wide == 0).sum())
            low, high = min(low, float(wide.min())), max(high, float(wide.max()))
    if not good:
        return Moments(n, n, *(math.nan,) * 8)
    mean = total / good
    second = fourth = 0.0
    for wide in each():
        squared = (wide - mean).square()
        second += float(squared.sum()) / good
        fourth += float(squared.square().sum()) / good
    # Of numbers that are equal but for rounding there is no kurtosis.
    kurtosis = fourth / second**2 - 3 if second > 1e-20 * max(1e-200, square / good) else math.nan
    largest = max(abs(low), abs(high))
    return Moments(n, n - good, mean, math.sqrt(second), math.sqrt(square), kurtosis, largest, zeros / good, low, high)


def histogram(x: Tensor, bins: int = BINS) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Edges and counts of the finite numbers over their whole range."""
    flat = x.detach().reshape(-1).float().cpu()
    flat = flat[flat.isfinite()]
    if not flat.numel():
        return (), ()
    low, high = float(flat.min()), float(flat.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(flat, bins, low, high).long().tolist()
    return tuple(low + (high - low) * i / bins for i in range(bins + 1)), tuple(counts)


def singular_values(x: Tensor) -> tuple[float, ...]:
    """Of a matrix, largest first; () for what is none, holds numbers that are not finite, or is too large.

    A long side beyond LONGEST_SIDE is summed away first (the eigenvalues of the smaller Gram matrix, in float64, whose
    smallest roots are right to 1e-8 of the largest).
    """
    if x.dim() != 2 or min(x.shape) < 2 or min(x.shape) > LONGEST_SHORT_SIDE or not bool(x.isfinite().all()):
        return ()
    x = x.detach()
    if max(x.shape) <= LONGEST_SIDE:
        return tuple(torch.linalg.svdvals(x.double()).tolist())
    tall = x if x.shape[0] >= x.shape[1] else x.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=x.device)
    for piece in tall.split(max(1, AT_ONCE // tall.shape[1])):
        wide = piece.double()
        gram += wide.T @ wide
    return tuple(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0).tolist())


def figures_of(name: str, x: Tensor) -> TensorFigures:
    """Everything about one tensor."""
    edges, counts = histogram(x)
    own = (name, tuple(x.shape), moments(x), edges, counts, singular_values(x))
    return TensorFigures(*own, quantiles(x), axes(x))


def quantiles(x: Tensor) -> tuple[float, ...]:
    """At QUANTILES, in between linearly; () where no number is finite."""
    flat = x.detach().reshape(-1).float().cpu()
    flat = flat[flat.isfinite()]
    return tuple(np.quantile(flat.numpy(), QUANTILES).tolist()) if flat.numel() else ()


def axes(x: Tensor) -> Axes | None:
    """Norms along both axes of a matrix and the angles between its rows; None for what is none, or not finite."""
    if x.dim() != 2 or not bool(x.isfinite().all()):
        return None
    x = x.detach()
    wide = x.double() if x.numel() <= AT_ONCE else x.float()
    rows, columns = wide.norm(dim=1), wide.norm(dim=0)
    some = wide[torch.linspace(0, len(x) - 1, min(len(x), ROWS)).long()]
    some = torch.nn.functional.normalize(some, dim=1)
    n = len(some)
    apart = ((some @ some.T).abs().sum() - some.square().sum()) / max(1, n * (n - 1))
    spread = [float(v.std(correction=0)) for v in (rows, columns)]
    return Axes(float(rows.mean()), spread[0], float(columns.mean()), spread[1], float(apart) if n > 1 else math.nan)


def change(name: str, a: Tensor, b: Tensor) -> Change:
    """How tensor b lies to tensor a, of the same shape."""
    p, q = a.detach().double().reshape(-1), b.detach().double().reshape(-1)
    one, two, apart = float(p.norm()), float(q.norm()), float((q - p).norm())
    if not one or not two:
        return Change(name, math.nan, apart / one if one else math.nan, two / one if one else math.nan)
    # By the half angle, which keeps its digits where the arc cosine of a product near 1 has none left.
    u, v = p / one, q / two
    angle = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))
    return Change(name, math.degrees(angle), apart / one, two / one)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: safetensors, else torch's. Raises InputError if there is none."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise InputError(f"{folder}: no weights here (*.safetensors or pytorch_model*.bin)")


def buffer_names(folder: Path) -> frozenset[str]:
    """Names of what a model of ours saves beside its parameters (a fixed radius); empty for other models."""
    try:
        return _buffers((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):  # no config, or one that cannot be: its row says so elsewhere
        return frozenset()


@functools.lru_cache(maxsize=256)
def _buffers(text: str) -> frozenset[str]:
    from models.families import classes

    tree = json.loads(text)
    for config_class, model_class in classes().values():
        if config_class.model_type == tree.get("model_type"):
            with torch.device("meta"):
                model: Any = model_class(config_class.from_dict(tree))
            return frozenset(name for name, _ in model.named_buffers())
    return frozenset()


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every floating-point tensor in a folder's weight files, a tied one once.

    Raises InputError, naming the file, for one that cannot be read. Pickles are read by torch's weights-only loader.
    """
    for path in weight_files(folder):
        yield from (safe_tensors(path) if path.suffix == ".safetensors" else pickled_tensors(path))


def safe_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # the file is no mapping
                x = file.get_tensor(name)
                if x.is_floating_point():
                    yield name, x
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None


def pickled(path: Path) -> Any:
    """What torch saved there, if it is plain data and tensors. Raises InputError otherwise."""
    import zipfile

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # pickle, zipfile, torch and the system each have their own
        said = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise InputError(f"{path}: not readable as plain tensors ({said[0][:160]})") from None


def pickled_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    tree = pickled(path)
    if isinstance(tree, dict) and isinstance(tree.get("model"), dict):  # nanoGPT's ckpt.pt
        tree = tree["model"]
    if not isinstance(tree, dict):
        raise InputError(f"{path}: holds no weights by name")
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, x in tree.items():
        if isinstance(x, Tensor) and x.is_floating_point() and (x.data_ptr(), tuple(x.shape)) not in seen:
            seen.add((x.data_ptr(), tuple(x.shape)))
            yield str(name).removeprefix("_orig_mod."), x


def safe_header(path: Path) -> dict[str, Any]:
    """The JSON that a safetensors file begins with: dtype and shape of each tensor. Raises InputError."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= min(path.stat().st_size - 8, 100 << 20):
                raise InputError(f"{path}: its header would be {size:,} bytes long; this is no whole safetensors file")
            header = json.loads(file.read(size))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path}: its header is no JSON; this is no safetensors file") from None
    return {name: entry for name, entry in header.items() if name != "__metadata__"}
