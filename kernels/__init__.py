"""Operations that make training fast: one per file, each with a plain PyTorch form, a kernel and one public name.

`ops()` lists them for tests, benchmarks and `python -m kernels.compiled`; models import public names from their files.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.op import Op

# File -> the names of its operations' `Op`s.
FILES: dict[str, tuple[str, ...]] = {
    "attention": ("OP",),
    "bank_search": ("OP",),
    "count_sketch": ("OP",),
    "glu": ("OP",),
    "grouped_linear": ("OP",),
    "hadamard": ("FWHT", "SKETCH"),
    "linear_cross_entropy": ("OP",),
    "linear_scan": ("OP",),
    "newton_schulz": ("PRODUCT", "POLYNOMIAL", "OP"),
    "normuon": ("OP",),
    "qk_norm_rope": ("OP",),
    "rms_norm": ("OP",),
}


def ops() -> dict[str, Op]:
    """Every operation by name."""
    found = [
        getattr(importlib.import_module(f"kernels.{file}"), name) for file, names in FILES.items() for name in names
    ]
    return {op.name: op for op in found}
