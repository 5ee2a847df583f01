"""Tables and figures on a terminal or in a log."""

from __future__ import annotations

import math
import sys
from typing import Any

LOG_WIDTH = 120  # a log has no width of its own; rich would take 80 columns and break tables


def print_table(table: Any) -> None:
    """Print a rich table on stdout."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(table)


def with_error(value: float | None, error: float | None) -> str:
    """A figure with its standard error, both to the error's third digit: `2.2354 ± 0.0201`."""
    if value is None:
        return "not known"
    if error is None or not math.isfinite(error):
        return f"{value:.4f}"
    digits = max(2, min(6, 2 - math.floor(math.log10(error)))) if error > 0 else 4
    return f"{value:.{digits}f} ± {error:.{digits}f}"
