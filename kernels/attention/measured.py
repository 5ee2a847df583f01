"""What table.py measured; written by `python -m kernels.attention.table`."""

from __future__ import annotations

ROWS: tuple[tuple, ...] = ()
