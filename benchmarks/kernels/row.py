"""One line of the table of kernels: the work, ours, its peers, and the proof that ours is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """One measurement. Tensors live in the closures, so a row is dropped when its line is written.

    op, case: what is measured ("rms_norm", "forward+backward N=16384 D=1152 bf16").
    ours: the call that is timed.  peers: name -> call of the same work; what cannot be imported is left out.
    check: raises AssertionError when ours is wrong; runs before anything is timed.
    flops, bytes: of the work: multiplications and additions, and the least traffic to and from memory.
    dtype: of the products, which picks the floor's rate.  goal: what is aimed at, in words.
    """

    op: str
    case: str
    ours: Callable[[], Any]
    check: Callable[[], None]
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "bfloat16"
    goal: str = ""

    @property
    def name(self) -> str:
        return f"{self.op}: {self.case}"
