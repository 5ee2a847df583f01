"""Exact top-k search beside a product with torch.topk and faiss's exact index, and the products alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import normalize

from benchmarks.kernels.row import Row
from kernels.bank_search import bank_search


def tiles(q: torch.Tensor, keys: torch.Tensor) -> Callable[[], None]:
    """The product in tiles that are thrown away: what a search in these operands cannot be faster than."""
    out = torch.empty(512, 2048, dtype=q.dtype)

    def run() -> None:
        for i in range(0, len(q), 512):
            for j in range(0, len(keys), 2048):
                torch.mm(q[i : i + 512], keys[j : j + 2048].T, out=out)

    return run


def row(device: str, B: int, N: int, r: int, k: int, dtype: torch.dtype) -> Row:
    torch.manual_seed(0)
    q, keys = (normalize(torch.randn(n, r), dim=1).to(device, dtype) for n in (B, N))
    peers: dict[str, Callable[[], Any]] = {"product, topk": lambda: (q @ keys.T).topk(k)}
    if device == "cpu":
        try:
            import faiss  # type: ignore[import-not-found]

            faiss.omp_set_num_threads(torch.get_num_threads())
            index = faiss.IndexFlatIP(r)
            index.add(keys.numpy())
            queries = q.numpy()
            peers["faiss"] = lambda: index.search(queries, k)
        except ImportError:
            pass
        half = q.bfloat16(), keys.bfloat16()
        peers |= {"product alone, float32": tiles(q, keys), "product alone, bfloat16": tiles(*half)}

    def check() -> None:
        some = q[:256]
        scores, ids = bank_search(some, keys, k)
        exact = some.double() @ keys.double().T
        best, names = exact.topk(k)
        assert (exact.gather(1, ids) - best).abs().max() <= 1e-6
        assert (scores.double() - best).abs().max() <= 1e-5
        assert device == "cuda" or torch.equal(ids, names), "ids differ from float64's"

    return Row(
        "bank_search", f"B={B:,} N={N:,} r={r} k={k} {str(dtype).removeprefix('torch.')}",
        lambda: bank_search(q, keys, k), check, peers, 2.0 * B * N * r,
        (q.numel() + keys.numel()) * q.element_size() + B * k * 12, str(dtype).removeprefix("torch."),
        "2 times product and topk" if device == "cuda" else "3 times faiss, exact ids",
    )  # fmt: skip


def rows(device: str) -> Iterator[Row]:
    if device == "cuda":
        for N in (16384, 65536, 131072):
            for k in (32, 64):
                yield row(device, 4096, N, 256, k, torch.bfloat16)
        return
    for N in (16384, 65536):
        yield row(device, 4096, N, 256, 32, torch.float32)
