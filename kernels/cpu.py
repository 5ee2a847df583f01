"""What the processors' own paths share: Numba where it is installed, and rows spread over threads.

Numba is optional: a model that was exported runs with torch and transformers alone. Without it an operation takes the
vectorised PyTorch form that stands beside its compiled one. Nothing is compiled or imported before the first call, and
nothing is written to disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@cache
def numba() -> Any:
    """The module, or None where it is not installed or cannot be imported."""
    try:
        import numba as module
    except ImportError:
        return None
    return module


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork; the child makes its own
    os.register_at_fork(after_in_child=lambda: _pool.cache_clear())


def spread(rows: int, least: int, function: Callable[[int, int], object]) -> None:
    """function(first, stop) over ranges that make up [0, rows), on torch.get_num_threads() threads.

    least: rows below which a thread of its own does not pay. The function must release the GIL (nogil=True). Threads of
    Python and not Numba's own: those abort when two threads call them at once, and would be a second OpenMP pool.
    """
    parts = min(torch.get_num_threads(), rows // max(1, least))
    if parts <= 1:
        function(0, rows)
        return
    cuts = [rows * i // parts for i in range(parts + 1)]
    later = [_pool(parts).submit(function, a, b) for a, b in pairwise(cuts[1:])]
    function(cuts[0], cuts[1])
    for job in later:
        job.result()


def array(x: Tensor) -> Any:
    """The tensor's numbers as a NumPy array of the same memory."""
    return x.detach().numpy()
