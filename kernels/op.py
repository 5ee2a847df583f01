"""What tests and benchmarks must know of an operation, and how an operation picks the path it runs.

A path is `triton` (CUDA; a CPU too, where TRITON_INTERPRET=1 was set before the import), `cpu` (fast on processors) or
`reference` (plain PyTorch in any dtype: float64 is the judge). A file of an operation ends with its `Op`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a processor needs neither; the jit part of a file stands under `if triton is not None:`
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PATHS = ("triton", "cpu", "reference")
# Where operations are registered. An exported model carries copies of these files: registered under the same name, they
# would take it from the operations of this package in the same process, which then fail without a schema.
NAMESPACE = "novella" if __name__ == "kernels.op" else f"novella_{zlib.crc32(__name__.encode()):08x}"


@dataclass(frozen=True)
class Build:
    """One shipped configuration of a Triton kernel, as the compiler needs it: `python -m kernels.compiled`.

    kernel: the jit function.  signature: type of each run-time argument in order, "*bf16", "i32", "fp32", ...
    constants: its tl.constexpr arguments.  aligned: arguments that are multiples of 16 (pointers and row lengths).
    spills: why registers are spilled in this configuration, where they are; a spill without a reason is a fault.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    spills: str = ""

    @property
    def name(self) -> str:
        words = [f"{k}={v}" for k, v in self.constants.items()]
        types = "/".join(dict.fromkeys(t.removeprefix("*") for t in self.signature.values() if t.startswith("*")))
        return f"{self.kernel.__name__.lstrip('_')} {types} {' '.join(words)} warps={self.num_warps}".strip()


@dataclass(frozen=True)
class Op:
    """One operation of this package.

    fn: the public name, with `impl="auto"` among its arguments where it has more than one path.
    reference: the same arguments (without impl) in plain PyTorch, in the dtype it is given.
    inputs: (shape, generator) -> its arguments by name, floating tensors in float64 on the CPU; those that require grad
        are the ones that have gradients. Values are what the operation is used on.
    shapes: small ones, 1 and odd numbers among them; `empty` one without rows (none: there is no such thing).
    paths: what `impl` takes.  builds: what is compiled, made when asked for, since it needs Triton uninterpreted.
    dtypes: what the paths are tried in.  exact: outputs (by place) that must equal the reference's: ids, counts.
    """

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[tuple[int, ...], torch.Generator], dict[str, Any]]
    shapes: tuple[tuple[int, ...], ...]
    empty: tuple[int, ...] | None = None
    paths: tuple[str, ...] = ("triton", "reference")
    builds: Callable[[], Sequence[Build]] = field(default=tuple)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
    exact: tuple[int, ...] = ()


_record: list[tuple[str, str]] | None = None


def pick(op: str, x: Tensor, impl: str, cpu: bool = False, fits: bool = True) -> str:
    """The path for `x`: Triton on a GPU, the CPU's own where there is one (`cpu`), else the reference.

    fits: whether Triton's kernel takes these arguments; False sends a GPU to the reference under `auto`.
    Raises ValueError for an unknown impl, or for one that cannot run here.
    """
    if impl == "auto":
        if x.is_cuda and triton is not None and fits:
            impl = "triton"
        else:
            impl = "cpu" if cpu and x.device.type == "cpu" else "reference"
    elif impl not in PATHS:
        raise ValueError(f"{op}: impl={impl!r} does not exist; auto, {', '.join(PATHS)} do")
    elif impl == "triton" and not (triton is not None and (x.is_cuda or INTERPRETED)):
        raise ValueError(f"{op}: impl='triton' needs a GPU and Triton (or TRITON_INTERPRET=1 before the import)")
    note(op, impl)
    return impl


def note(op: str, path: str) -> None:
    """Says to `record` what runs: `pick` does for its paths, an operation for one that it has besides."""
    if _record is not None:
        _record.append((op, path))


@contextmanager
def record() -> Iterator[list[tuple[str, str]]]:
    """What ran inside, as (operation, path) in order: how a test knows. Compiled code records when it is traced."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n: Triton's block sizes."""
    return 1 << max(0, n - 1).bit_length()


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
