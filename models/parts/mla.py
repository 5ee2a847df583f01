"""Multi-head latent attention: keys and values are projections of one small latent vector per token.

B batch, T time, S keys, D model, H heads, h head size, c latent size, r channels of the rotary branch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.cost import Ops
from models.memory import At, Field, Mem
from models.parts.linear import Dense, Linear
from models.parts.mixer import Attention
from models.parts.scores import Scores, scores_ops, scores_refuse
from models.parts.sink import NoSink, Sink
from models.parts.softmax import PlainSoftmax, Softmax
from models.spec import kind_of

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


@dataclass(frozen=True)
class MLA(Attention):
    """softmax((q k^T + q_r k_r^T) / sqrt(h + r)) v with c = W_c x, (k, v) = W_up c; q_r and k_r are turned by position.

    k_r = W_r x is one vector for all heads, q_r one per head. Memory holds c and k_r only, c + r numbers per token.
    Source: DeepSeek-V2, arXiv:2405.04434, without its norm of c.

    n_heads: heads, one number or one per layer
    head_dim: size of a head's q, k and v without the rotary branch; none: d_model / n_heads
    latent_dim: size of c; none: 4 * head_dim
    rope_dim: channels of the rotary branch, even; none: head_dim / 2 with rotary positions, 0 without
    window: a token sees itself and the window - 1 tokens before it; none: all
    softmax: what turns scores into weights; the plain one is fused
    softcap: c of c tanh(score / c); none: no cap
    sink: a share of the attention that goes to nothing; e^l as it stands, whatever the largest score is
    bias: whether the matrices have biases; none: as the family's `bias` says
    dropout: of attention weights; none: as the family's `dropout` says
    linear: kind of linear layer
    """

    n_heads: int | tuple[int, ...] = 12
    head_dim: int | tuple[int, ...] | None = None
    latent_dim: int | tuple[int, ...] | None = None
    rope_dim: int | tuple[int, ...] | None = None
    window: int | tuple[int | None, ...] | None = None
    softmax: Softmax | tuple[Softmax, ...] = field(default_factory=PlainSoftmax)
    softcap: float | tuple[float | None, ...] | None = None
    sink: Sink | tuple[Sink, ...] = field(default_factory=NoSink)
    bias: bool | None = None
    dropout: float | None = None
    linear: Linear = field(default_factory=Dense)

    @classmethod
    def small(cls) -> MLA:
        """Fits the width that the conformance suite uses."""
        return cls(n_heads=4, head_dim=8, latent_dim=6)

    def width(self, d_model: int) -> int:
        return self.head_dim or d_model // self.n_heads  # type: ignore[operator,return-value]

    def sizes(self, block: BlockSpec) -> tuple[int, int, int, int]:
        """H, h, c, r of a resolved layer."""
        h = self.width(block.d_model)
        r = self.rope_dim
        if r is None:
            r = 2 * max(h // 4, 1) if block.position.turns else 0
        return self.n_heads, h, self.latent_dim or 4 * h, r  # type: ignore[return-value]

    def rotated(self, block: BlockSpec) -> tuple[int, int]:
        H, _, _, r = self.sizes(block)
        return (H + 1, r) if r else (0, 0)

    def scored(self, block: BlockSpec) -> int:
        return self.n_heads  # type: ignore[return-value]

    def n_keys(self, T: int) -> int:
        return min(T, self.window or T)  # type: ignore[type-var,return-value]

    def matrices(self, block: BlockSpec) -> list[tuple[int, int]]:
        """(inputs, outputs) of query, down, up and out."""
        d, (H, h, c, r) = block.d_model, self.sizes(block)
        return [(d, H * (h + r)), (d, c + r), (c, 2 * H * h), (H * h, d)]

    def build(self, block: BlockSpec) -> nn.Module:
        return LatentAttention(self, block)

    def n_parameters(self, block: BlockSpec) -> int:
        H: int = self.n_heads  # type: ignore[assignment]
        total = sum(self.linear.n_parameters(a, b, block.bias_of(self)) for a, b in self.matrices(block))
        total += self.softmax.n_parameters(H) + self.sink.n_parameters(H)  # type: ignore[union-attr]
        return total + (0 if block.position.shared else block.position.bias_parameters(block))

    def ops(self, block: BlockSpec, T: int) -> Ops:
        """Keys and values are counted as made once per token; decoding folds W_up into queries and outputs instead."""
        H, h, _, r = self.sizes(block)
        total = sum((self.linear.ops(a, b, block.bias_of(self)) for a, b in self.matrices(block)), Ops())
        return total + block.position.ops(block, T) + scores_ops(self, block, H, h + r, h, T)

    def refuses(self, block: BlockSpec) -> str | None:
        d, H = block.d_model, self.n_heads
        assert not isinstance(H, tuple) and not isinstance(self.rope_dim, tuple)
        if H < 1:
            return f"n_heads={H} must be at least 1"
        if self.head_dim is None and d % H:
            return f"d_model={d} is not divisible by n_heads={H}; set attention.head_dim"
        for name in ("head_dim", "latent_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                return f"{name}={value} must be at least 1"
        if self.rope_dim is not None and (self.rope_dim < 0 or self.rope_dim % 2):
            return f"rope_dim={self.rope_dim} must be even, its channels are turned in pairs, and at least 0"
        if self.rope_dim and not block.position.turns:
            return f"rope_dim={self.rope_dim} channels are turned, but position={kind_of(block.position)} turns nothing"
        if reason := self.linear.refuses(block):
            return f"linear={kind_of(self.linear)}: {reason}"
        return scores_refuse(self, block)


class LatentAttention(nn.Module):
    def __init__(self, spec: MLA, block: BlockSpec) -> None:
        super().__init__()
        bias = block.bias_of(spec)
        self.H, self.h, self.c, self.r = spec.sizes(block)
        query, down, up, out = spec.matrices(block)
        self.query = spec.linear.build(*query, bias, "matrix")
        self.down = spec.linear.build(*down, bias, "matrix")
        self.up = spec.linear.build(*up, bias, "matrix")
        self.out = spec.linear.build(*out, bias, "residual")
        self.rotation = block.position.rotation(self.r) if self.r else None
        self.scores = Scores(spec, block, self.H, (self.h + self.r) ** -0.5)
        # Other linear layers (quantised ones) compute something else than a product with `weight`.
        self.folds = isinstance(spec.linear, Dense) and not bias

    @property
    def window(self) -> int | None:
        return self.scores.window

    def memory(self) -> dict[str, Field]:
        fields = {"latent": Field((self.c,))}
        return {**fields, "rope": Field((self.r,))} if self.r else fields

    def flops_per_token(self, T: int) -> float:
        return 2.0 * self.H * (2 * self.h + self.r) * min(T, self.window or T)

    def prepare(self, at: At, cached: bool, dtype: torch.dtype) -> None:
        assert at.tables is not None
        self.scores.prepare(at, cached)
        if self.rotation is not None and self.rotation.key not in at.tables:
            at.tables[self.rotation.key] = self.rotation.tables(at, dtype)

    def forward(self, x: Tensor, at: At, mem: Mem | None = None, shared: tuple = ()) -> tuple[Tensor, tuple]:
        q, turned, latent, rope = self.project(x, at)
        if mem is not None:
            new = {"latent": latent, "rope": rope} if self.r else {"latent": latent}
            latent, *rest = mem.append(at, **new)
            rope = rest[0] if rest else latent[..., :0]
        # Memory is much longer than what is new, so keys and values of all of it are not made again for every token.
        fold = mem is not None and self.folds and x.shape[1] * self.c < latent.shape[1] * self.h
        over: Any = self.over_latents if fold else self.over_keys
        y = over(q, turned, latent, rope, at, mem is not None)
        return self.out(y.transpose(1, 2).flatten(2)), shared

    def project(self, x: Tensor, at: At) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, D] -> q [B, H, T, h], turned queries [B, H, T, r], latent [B, T, c], turned key [B, T, r]."""
        assert at.tables is not None
        B, T, _ = x.shape
        q, turned = self.query(x).view(B, T, self.H, self.h + self.r).split((self.h, self.r), -1)
        latent, rope = self.down(x).split((self.c, self.r), -1)
        if self.rotation is not None:
            tables = at.tables[self.rotation.key]
            turned, rope = self.rotation(turned, tables), self.rotation(rope[:, :, None], tables)[:, :, 0]
        return q.transpose(1, 2), turned.transpose(1, 2), latent, rope

    def keys_and_values(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """latent [B, S, c], turned key [B, S, r] -> k [B, H, S, h + r], v [B, H, S, h]."""
        B, S, _ = latent.shape
        k, v = self.up(latent).view(B, S, 2, self.H, self.h).permute(2, 0, 3, 1, 4)
        return torch.cat([k, rope[:, None].expand(B, self.H, S, self.r)], -1), v

    def over_keys(self, q: Tensor, turned: Tensor, latent: Tensor, rope: Tensor, at: At, cached: bool) -> Tensor:
        """[B, H, T, h], by the formula: the keys and values of every token are made."""
        k, v = self.keys_and_values(latent, rope)
        return self.scores(torch.cat([q, turned], -1), k, v, at, cached)

    def over_latents(self, q: Tensor, turned: Tensor, latent: Tensor, rope: Tensor, at: At, cached: bool) -> Tensor:
        """The same with W_up folded into queries and outputs: q (W_k c) = (q W_k) c, so c is the only key and value."""
        weight: Any = self.up.weight
        wk, wv = weight.to(q.dtype).view(2, self.H, self.h, self.c)
        k = torch.cat([latent, rope], -1)[:, None]  # [B, 1, S, c + r]
        y = self.scores(torch.cat([q @ wk, turned], -1), k, latent[:, None], at, cached)  # [B, H, T, c]
        return y @ wv.transpose(-1, -2)

    def weights(self, x: Tensor, at: At) -> Tensor:
        """The attention weights [B, H, T, S] of a call without memory, for inspection. at: with `prepare`d tables."""
        q, turned, latent, rope = self.project(x, at)
        return self.scores.weights(torch.cat([q, turned], -1), self.keys_and_values(latent, rope)[0], at)
