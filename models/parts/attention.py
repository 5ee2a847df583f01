"""Mixers: what moves information between tokens.   B batch, T time, S keys, D model, H heads, K key heads, h head size.

A mixer is a module with
    memory() -> {name: Field}                     what it wants remembered; {} = nothing
    prepare(at, cached, dtype)                    puts into at.tables what the layers of a call can share
    forward(x [B, T, D], at, mem, shared) -> (y, shared)     shared carries e.g. value residuals, functionally
    flops_per_token(T) -> float                   forward FLOPs besides its matrices, at context T
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.memory import At, Field, Mem, visible
from models.parts.linear import Dense, Linear
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class Attention(Part):
    """A kind of mixer: `build(block)`, `n_parameters(block)`, `width(d_model)` of one head."""

    kinds: ClassVar[dict[str, type]]

    def build(self, block: BlockSpec) -> nn.Module:
        raise NotImplementedError

    def n_parameters(self, block: BlockSpec) -> int:
        raise NotImplementedError

    def width(self, d_model: int) -> int:
        raise NotImplementedError

    def refuses(self, block: BlockSpec) -> str | None:
        return None


@dataclass(frozen=True)
class Causal(Attention):
    """softmax(q k^T / sqrt(h)) v over the tokens so far (MHA), with fewer key heads GQA, with one MQA.

    Sources: arXiv:1706.03762, arXiv:2305.13245 (GQA).

    n_heads: query heads, one number or one per layer
    n_kv_heads: key and value heads, a divisor of n_heads; none: n_heads
    head_dim: size of a head; none: d_model / n_heads
    window: a token sees itself and the window - 1 tokens before it; none: all
    bias: whether the matrices have biases; none: as the family's `bias` says
    dropout: of attention weights; none: as the family's `dropout` says
    linear: kind of linear layer
    """

    n_heads: int | tuple[int, ...] = 12
    n_kv_heads: int | tuple[int, ...] | None = None
    head_dim: int | tuple[int, ...] | None = None
    window: int | tuple[int | None, ...] | None = None
    bias: bool | None = None
    dropout: float | None = None
    linear: Linear = field(default_factory=Dense)

    @classmethod
    def small(cls) -> Causal:
        """Fits the width that the conformance suite uses."""
        return cls(n_heads=4, n_kv_heads=2)

    def width(self, d_model: int) -> int:
        return self.head_dim or d_model // self.n_heads  # type: ignore[operator,return-value]

    def heads(self) -> tuple[int, int]:
        """Query heads and key heads of a resolved layer."""
        H: int = self.n_heads  # type: ignore[assignment]
        K: int = self.n_kv_heads or H  # type: ignore[assignment]
        return H, K

    def build(self, block: BlockSpec) -> nn.Module:
        return CausalAttention(self, block)

    def n_parameters(self, block: BlockSpec) -> int:
        (H, K), h, d, bias = self.heads(), self.width(block.d_model), block.d_model, block.bias_of(self)
        return self.linear.n_parameters(d, (H + 2 * K) * h, bias) + self.linear.n_parameters(H * h, d, bias)

    def refuses(self, block: BlockSpec) -> str | None:
        d, H, K = block.d_model, self.n_heads, self.n_kv_heads
        assert not isinstance(H, tuple) and not isinstance(K, tuple)
        assert not isinstance(self.head_dim, tuple) and not isinstance(self.window, tuple)
        if H < 1:
            return f"n_heads={H} must be at least 1"
        if self.head_dim is None and d % H:
            return (
                f"d_model={d} is not divisible by n_heads={H}; try {_near_multiples(d, H)}, or set attention.head_dim"
            )
        if self.head_dim is not None and self.head_dim < 1:
            return f"head_dim={self.head_dim} must be at least 1"
        if K is not None and (K < 1 or H % K):
            divisors = ", ".join(str(k) for k in range(1, H + 1) if H % k == 0)
            return f"n_heads={H} is not divisible by n_kv_heads={K}; try one of {divisors}"
        if self.window is not None and self.window < 1:
            return f"window={self.window} must be at least 1; 1 is a token that sees itself only"
        if self.window is not None and self.window >= block.seq_len:
            return f"window={self.window} has no effect at seq_len={block.seq_len}; make it smaller or leave it out"
        if self.dropout is not None and not 0 <= self.dropout < 1:
            return f"dropout={self.dropout} must lie in [0, 1)"
        return None


class Seen(NamedTuple):
    """Which keys the queries of a call see.  mask: [B or 1, 1, T, S]; None with causal: the triangle; None: all keys.

    last: only the last so many keys count (a window at single-token decoding); 0: all.
    """

    mask: Tensor | None
    causal: bool
    last: int = 0


def what_is_seen(at: At, T: int, cached: bool, window: int | None) -> Seen:
    """The cheapest form: no mask is built in training and in unpadded decoding."""
    if cached:
        wide = window is None or window >= at.upto
        if at.start is not None and T == 1:
            return Seen(None, False, 0 if wide else window or 0)
        if at.start == 0 and wide:
            return Seen(None, True)
    elif at.doc is None and (window is None or window >= T):
        return Seen(None, True)
    return Seen(visible(at, cached, window)[:, None], False)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen, dropout: float = 0.0) -> Tensor:
    """q [B, H, T, h], k and v [B, K, S, h] -> [B, H, T, h].   Fused wherever PyTorch has a fused form."""
    if seen.last:
        k, v = k[:, :, -seen.last :], v[:, :, -seen.last :]
    B, H, T, h = q.shape
    K = k.shape[1]
    if T == 1 and K != H and not seen.causal:
        # One query per head: the heads that share a key head become its queries, so that no key is repeated.
        y = F.scaled_dot_product_attention(q.view(B, K, H // K, h), k, v, seen.mask, dropout)
        return y.view(B, H, 1, h)
    if seen.mask is not None and K != H and q.is_cuda:
        # CUDA's fused forms take a mask or shared key heads, not both; repeating keys costs less than the unfused form.
        k, v, K = repeat_heads(k, H), repeat_heads(v, H), H
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and T <= 256 and torch.is_grad_enabled():
        # The fused backward for bfloat16 on CPU took 5.9 ms where float32 took 1.2 (B=12, H=4, T=64, h=32); at T=512
        # they are even. Autocast would cast back, so it is off for this one call.
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(
                q.float(),
                k.float(),
                v.float(),
                seen.mask,
                dropout,
                is_causal=seen.causal,
                enable_gqa=K != H,
            )
            return y.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, seen.mask, dropout, is_causal=seen.causal, enable_gqa=K != H)


def repeat_heads(x: Tensor, H: int) -> Tensor:
    """[B, K, S, h] -> [B, H, S, h]: each key head once for every query head that shares it."""
    return x.repeat_interleave(H // x.shape[1], 1)


class CausalAttention(nn.Module):
    def __init__(self, spec: Causal, block: BlockSpec) -> None:
        super().__init__()
        d, bias = block.d_model, block.bias_of(spec)
        self.H, self.K = spec.heads()
        self.h = spec.width(d)
        self.window: int | None = spec.window  # type: ignore[assignment]
        self.dropout = block.dropout if spec.dropout is None else spec.dropout
        self.rotation = block.position.rotation(self.h)
        self.qkv = spec.linear.build(d, (self.H + 2 * self.K) * self.h, bias, "matrix")
        self.out = spec.linear.build(self.H * self.h, d, bias, "residual")

    def memory(self) -> dict[str, Field]:
        return {"k": Field((self.K, self.h)), "v": Field((self.K, self.h))}

    def flops_per_token(self, T: int) -> float:
        """Scores and weighted sum over min(T, window) keys, causality not subtracted (the convention of PaLM's MFU)."""
        return 4.0 * self.H * self.h * min(T, self.window or T)

    def prepare(self, at: At, cached: bool, dtype: torch.dtype) -> None:
        assert at.tables is not None
        if ("seen", self.window) not in at.tables:
            at.tables["seen", self.window] = what_is_seen(at, at.pos.shape[1], cached, self.window)
        if self.rotation is not None and self.rotation.key not in at.tables:
            at.tables[self.rotation.key] = self.rotation.tables(at, dtype)

    def forward(self, x: Tensor, at: At, mem: Mem | None = None, shared: tuple = ()) -> tuple[Tensor, tuple]:
        assert at.tables is not None
        B, T, _ = x.shape
        H, K, h = self.H, self.K, self.h
        qkv = self.qkv(x).view(B, T, H + 2 * K, h)
        if self.rotation is not None:
            qk, v = qkv.split((H + K, K), 2)
            q, k = self.rotation(qk, at.tables[self.rotation.key]).split((H, K), 2)
        else:
            q, k, v = qkv.split((H, K, K), 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, T, h]
        if mem is not None:
            k, v = mem.append(at, k=k, v=v)
        y = attend(q, k, v, at.tables["seen", self.window], self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, T, H * h)), shared


def _near_multiples(value: int, of: int) -> str:
    low = value // of * of
    return f"{low} or {low + of}" if low else str(of)


Attention.kinds = {"causal": Causal}
