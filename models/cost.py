"""What hardware a model asks for, per token: counts of operations, and bytes and bits that must be stored.

Every part states its own counts (`ops`), a family adds them up (`Family.ops`); the catalogue prints them and a search
can take any of them as its cost. They count arithmetic of one forward pass for one new token at context T, whatever a
particular program does: a ternary matrix has additions and no multiplications, a table look-up has neither.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Ops:
    """Counts per token of a forward pass; `a + b` adds, `n * a` repeats.

    multiplies: of two numbers
    additions: additions, subtractions, comparisons and maxima of two numbers
    exponentials: exponentials, logarithms, sines and what is built on one of them (sigmoid, tanh, erf)
    divisions: divisions and square roots
    reductions: sums or maxima over a whole row, which nothing after them can start before
    table_bytes: bytes of tables that are looked up (embeddings, positions, learned curves), at their stored width
    weight_bits: bits of the weights that are multiplied
    bit_operations: products of the bit widths of both factors, summed over multiply-accumulates with weights (BOPs);
        those of scores with values have no width that a part could choose
    """

    multiplies: float = 0.0
    additions: float = 0.0
    exponentials: float = 0.0
    divisions: float = 0.0
    reductions: float = 0.0
    table_bytes: float = 0.0
    weight_bits: float = 0.0
    bit_operations: float = 0.0

    def __add__(self, other: Ops) -> Ops:
        return Ops(*(a + b for a, b in zip(self.counts().values(), other.counts().values(), strict=True)))

    def __rmul__(self, times: float) -> Ops:
        return Ops(*(times * a for a in self.counts().values()))

    def counts(self) -> dict[str, float]:
        """The counts by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


WIDTH = 16  # bits of a weight or activation that nothing quantises (bfloat16)


def product(d_in: int, d_out: int, weight_bits: float = WIDTH, input_bits: float = WIDTH, bias: bool = False) -> Ops:
    """A matrix times a vector: d_in x d_out multiply-accumulates with weights read once."""
    macs, b = d_in * d_out, d_out if bias else 0
    return Ops(
        multiplies=macs,
        additions=macs + b,
        weight_bits=macs * weight_bits + b * WIDTH,
        bit_operations=macs * weight_bits * input_bits,
    )


def elementwise(n: int, **per_element: float) -> Ops:
    """n elements, each with the given counts: `elementwise(d, multiplies=2, exponentials=1)`."""
    return n * Ops(**per_element)
