"""Exact search for the k keys of a bank most similar to each query, and the weights that blend what belongs to them.

    s[b, i] = q_b . key_i,   the k largest of each row in falling order; of equal scores the lower id comes first

B queries, N keys, r numbers each; scores are kept in float32 at least and never stored as [B, N] (the reference does).
Only chosen keys have gradients: dq_b = sum_i ds[b, i] key_i and dkey_n = sum of ds[b, i] q_b over its choices, sorted
by key and added in the order of the queries, so that results repeat bit by bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.bank_search import gpu, processor
from kernels.op import NAMESPACE, Op, pick, wide


def bank_search_reference(q: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All scores, sorted with equal ones in the order of their ids."""
    dtype = wide(q.dtype)
    scores, ids = torch.sort(q.to(dtype) @ keys.to(dtype).T, dim=-1, descending=True, stable=True)
    return scores[..., :k], ids[..., :k]


@torch.library.custom_op(f"{NAMESPACE}::bank_search", mutates_args=())
def _search(q: Tensor, keys: Tensor, k: int, impl: str) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        return gpu.search(q, keys, k)
    return processor.search(q.to(wide(q.dtype)), keys.to(wide(q.dtype)), k)


@_search.register_fake
def _(q: Tensor, keys: Tensor, k: int, impl: str) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], k)
    return (
        torch.empty(shape, dtype=wide(q.dtype), device=q.device),
        torch.empty(shape, dtype=torch.int64, device=q.device),
    )


@torch.library.custom_op(f"{NAMESPACE}::bank_search_backward", mutates_args=())
def _search_back(ds: Tensor, ids: Tensor, q: Tensor, keys: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        return gpu.gradients(ds, ids, q, keys)
    dq, dkeys = processor.gradients(ds, ids, q.to(ds.dtype), keys.to(ds.dtype))
    return dq.to(q.dtype), dkeys.to(keys.dtype)


@_search_back.register_fake
def _(ds: Tensor, ids: Tensor, q: Tensor, keys: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(keys.shape, dtype=keys.dtype, device=keys.device),
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int, str], output: tuple[Tensor, Tensor]) -> None:
    q, keys, _, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], q, keys)


def _backward(ctx: Any, ds: Tensor, _: Tensor) -> tuple:
    """Scores are inner products: each pair of a query and a key gets ds times the other."""
    ids, q, keys = ctx.saved_tensors
    return *_search_back(ds, ids, q, keys, ctx.impl), None, None


_search.register_autograd(_backward, setup_context=_save)


def bank_search(q: Tensor, keys: Tensor, k: int, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """The k keys with the largest inner products with each query, exactly.

    q: [B, r].  keys: [N, r], of one dtype and finite.  k: 1 to N; above 128 a GPU takes the plain form.
    Returns scores [B, k] in float32 (float64 where that is given), falling, and ids [B, k] in int64; of equal scores
    the lower id comes first. Under autocast inputs are cast as for a matrix product.
    Raises ValueError for shapes that do not fit.
    """
    if q.dim() != 2 or keys.dim() != 2 or q.shape[1] != keys.shape[1]:
        raise ValueError(f"bank_search: q {tuple(q.shape)} and keys {tuple(keys.shape)} must be [B, r] and [N, r]")
    if not 1 <= k <= len(keys):
        raise ValueError(f"bank_search: k={k} of {len(keys)} keys; it must be 1 to {len(keys)}")
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, keys = q.to(dtype), keys.to(dtype)
    if q.dtype != keys.dtype:
        raise ValueError(f"bank_search: q is {q.dtype}, keys are {keys.dtype}; make them one")
    fits = k <= gpu.MOST and q.dtype != torch.float64 and len(keys) < 2**31
    path = pick("bank_search", q, impl, cpu=True, fits=fits)
    if path == "reference" or not q.numel():
        return bank_search_reference(q, keys, k)
    with torch.autocast(device, enabled=False):
        return _search(q, keys, k, path)


def blend_weights(scores: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Weights of what belongs to the chosen keys: softmax(scores / temperature) over the last axis, which sums to 1.

    scores: [..., k].  temperature: above 0, a number or a tensor that broadcasts. Raises ValueError for a number <= 0.
    """
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0; small ones choose the best key alone")
    return torch.softmax(scores / temperature, dim=-1)


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    """shape: queries, keys, numbers, k. Quarters, so that products are exact in float32 and many scores are equal."""
    B, N, r, k = shape
    q, keys = (torch.randint(-4, 5, (n, r), generator=generator).double() / 4 for n in (B, N))
    return {"q": q.requires_grad_(), "keys": keys.requires_grad_(), "k": k}


OP = Op(
    "bank_search",
    bank_search,
    bank_search_reference,
    _inputs,
    shapes=((1, 1, 1, 1), (5, 70, 7, 9), (17, 100, 40, 20), (3, 33, 65, 33)),
    empty=(0, 5, 3, 2),
    paths=("triton", "cpu", "reference"),
    builds=gpu.builds,
    exact=(1,),
)
