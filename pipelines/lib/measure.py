"""Figures that explain a run: the machine's peak, the size of updates, the shape of hidden states."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Dense peak in FLOP/s of bf16 matrix products, from the makers' data sheets (SXM parts; without sparsity).
KNOWN_BF16 = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "A10G": 70e12, "A10": 125e12,
    "L40S": 362e12, "L4": 121e12, "V100": 125e12, "T4": 65e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12,
}  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """flops: FLOP/s that matrix products reach on this worker.  how: `known` or `measured`, with the device's name."""

    flops: float
    how: str
    device: torch.device

    def memory_gb(self) -> float:
        """Largest memory this process has used: of the GPU where it computes on one, else resident on the machine."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@functools.cache
def peak_flops(device: torch.device, precision: str) -> Peak:
    """The peak that MFU refers to: the data sheet's for a known GPU, else the best of a few large matrix products."""
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for known, flops in KNOWN_BF16.items():
            if known in name:
                return Peak(flops, f"known, {name}", device)
    n = 1024 if device.type == "cpu" else 8192
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - began)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return Peak(2 * n**3 / best, f"measured, {name}", device)


def update_ratio(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Median over the matrices of |change| / |weight|; near 1e-3 is the rule of thumb for a healthy learning rate."""
    ratios = [
        ((a.detach() - b).norm() / b.norm().clamp_min(1e-12)).item()
        for b, a in zip(before, after, strict=True)
        if a.ndim >= 2
    ]
    return float(torch.tensor(ratios).median()) if ratios else 0.0


def hidden_statistics(x: Tensor) -> dict[str, float]:
    """Effective rank and spectrum slope of hidden states.

    x: [..., D].  effective_rank = exp(entropy of the normalised singular values) of the centred states (Roy & Vetterli
    2007): between 1 and D.  spectrum_slope: least-squares slope of log eigenvalue of the covariance over log rank,
    over the leading half; steeper (more negative) means that fewer directions carry the states.
    Both are NaN for states that are not finite: a model that diverged is a finding and not an error.
    """
    x = x.detach().flatten(0, -2).double().cpu()
    if not bool(x.isfinite().all()):
        return {"val/effective_rank": math.nan, "val/spectrum_slope": math.nan}
    x = x - x.mean(0)
    values = torch.linalg.eigvalsh(x.T @ x / max(1, len(x) - 1)).flip(0).clamp_min(0)
    share = values.sqrt() / values.sqrt().sum().clamp_min(1e-300)
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    lead = values[: max(2, len(values) // 2)].clamp_min(1e-300).log()
    rank = torch.arange(1, len(lead) + 1, dtype=torch.float64).log()
    rank = rank - rank.mean()
    slope = (rank * (lead - lead.mean())).sum() / rank.square().sum()
    return {"val/effective_rank": float(entropy.exp()), "val/spectrum_slope": float(slope)}
