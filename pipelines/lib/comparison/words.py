"""Figures as people read them: losses to the digit that their error allows, sizes with SI prefixes, gaps said so."""

from __future__ import annotations

import math

from pipelines.lib.statistics import Interval

MISSING = "not known"
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))
UNITS = {  # of a cost; one that is not here is a count
    "parameters": "",
    "tokens": "",
    "flops": "FLOP",
    "macs_per_token": "MAC",
    "step_time_s": "s",
    "seconds": "s",
    "memory_gb": "GiB",
    "disk_gb": "GiB",
    "energy_j": "J",
}


def si(value: float, unit: str = "") -> str:
    """Three digits and a prefix: `87.6 GFLOP`, `12.8 ms`."""
    if not math.isfinite(value):
        return MISSING
    size = abs(value)
    factor, prefix = next(((f, p) for f, p in PREFIXES if size >= f), (1.0, ""))
    return f"{digits(value / factor, 3)} {prefix}{unit}".strip()


def digits(value: float, n: int) -> str:
    """So many significant digits, without an exponent where a point will do."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = n - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, places)}f}" if -n < places <= n + 4 else f"{value:.{n}g}"


def cost(name: str, value: float | None) -> str:
    """A cost with its unit."""
    if value is None or not math.isfinite(value):
        return MISSING
    if name in ("memory_gb", "disk_gb") and value < 0.1:
        return f"{digits(value * 1024, 3)} MiB"
    if name in ("memory_gb", "disk_gb", "seconds"):
        return f"{digits(value, 3)} {UNITS[name]}"
    if name in ("parameters", "tokens") and value < 1e6:
        return f"{value:,.0f}"
    return si(value, UNITS.get(name, ""))


def duration(seconds: float) -> str:
    """`42 s`, `3.5 min`, `2.1 h`."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (math.inf, 3600, "h")):
        if seconds < limit:
            return f"{digits(seconds / unit, 2)} {name}"
    return MISSING


def places(error: float) -> int:
    """Decimals that a figure with this standard error deserves: to the error's second digit."""
    return max(2, min(6, 1 - math.floor(math.log10(error)))) if error > 0 and math.isfinite(error) else 4


def figure(value: float, error: float = math.nan) -> str:
    return f"{value:.{places(error)}f}" if math.isfinite(value) else "no number"


def bounds(low: float, high: float, error: float = math.nan) -> str:
    """`[3.60, 3.70]`; empty where there is no interval."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"[{low:.{places(error)}f}, {high:.{places(error)}f}]"


def mean(over: Interval, error: float) -> str:
    """`3.651 [3.603, 3.698]`, or the figure alone where there is no interval."""
    return f"{figure(over.mean, error)} {bounds(over.low, over.high, error)}".strip()


def signed(value: float, error: float = math.nan) -> str:
    value = round(value, places(error)) + 0.0  # no minus before zeros
    return f"{value:+.{places(error)}f}" if math.isfinite(value) else "no number"


def chance(p: float) -> str:
    """A p value."""
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
