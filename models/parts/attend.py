"""From queries, keys and values to weighted sums: by kernels.attention over whole rows, fused by PyTorch over memory.

B batch, T queries, S keys, H heads, K key heads, h head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.attention import attention, fused, repeat_heads, triangle
from models.memory import At, visible


class Seen(NamedTuple):
    """Which keys the queries of a call see.  mask: [B or 1, 1, T, S]; None with causal: the triangle; None: all keys.

    last: only the last so many keys count (a window at single-token decoding); 0: all.
    window, doc: of the triangle, the last `window` keys and the same run of document ids [B, T] only; None: all.
    """

    mask: Tensor | None
    causal: bool
    last: int = 0
    window: int | None = None
    doc: Tensor | None = None

    @property
    def narrow(self) -> bool:
        """Whether less than the triangle is seen."""
        return self.window is not None or self.doc is not None

    def written_out(self, T: int, device: torch.device) -> Seen:
        """The same with the triangle as a mask. A triangle has as many keys as queries."""
        return Seen(triangle(T, self.window, self.doc, device), False) if self.causal else self


def what_is_seen(at: At, T: int, cached: bool, window: int | None) -> Seen:
    """The cheapest form: no mask is built in training, in whole prompts and in unpadded decoding."""
    limit = None if window is None or window >= (at.upto if cached else T) else window
    if cached:
        if at.start is not None and T == 1:
            return Seen(None, False, limit or 0)
        if at.start == 0 and at.upto == T:  # a chunk that ends in pads alone has fewer keys than queries
            return Seen(None, True, window=limit)
    elif limit is None or at.start is not None or at.doc is not None:  # positions go up by one in a row or document
        return Seen(None, True, window=limit, doc=at.doc)
    return Seen(visible(at, cached, window)[:, None], False)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    dropout: float = 0.0,
    scale: float | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias) v: q [B, H, T, h], k [B, K, S, h], v [B, K, S, v] -> [B, H, T, v], fused.

    scale: None: 1 / sqrt(h).  bias: [B or 1, H, T, S].  sink: its score [1, H or 1, 1, 1].  softcap: c of
    c tanh(score / c). A triangle without bias and dropout takes all the others, however narrow it is. Anything else
    takes no soft-cap, and with a bias, a sink or a narrow triangle a `seen` that is written out.
    """
    if seen.causal and bias is None and not dropout:
        sink = sink.flatten() if sink is not None else None
        return attention(q, k, v, scale=scale, window=seen.window, softcap=softcap, sink=sink, segments=seen.doc)
    assert softcap is None and not (seen.causal and seen.narrow)
    mask = seen.mask
    if seen.last:
        k, v = k[:, :, -seen.last :], v[:, :, -seen.last :]
        bias = bias[..., -seen.last :] if bias is not None else None
    if bias is not None or sink is not None:
        scale = scale or q.shape[-1] ** -0.5
        mask = _additive(q, k.shape[2], seen, bias, sink)
        if sink is not None:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))  # its key is 0, so its score is what the mask adds
    B, H, T, h = q.shape
    K = k.shape[1]
    if T == 1 and K != H and not H % K and not seen.causal:
        # One query per head: the heads that share a key head become its queries, so that no key is repeated.
        if mask is not None and mask.shape[1] == H:
            mask = mask.reshape(mask.shape[0], K, H // K, mask.shape[-1])
        y = F.scaled_dot_product_attention(q.view(B, K, H // K, h), k, v, mask, dropout, scale=scale)
        return y.reshape(B, H, 1, v.shape[-1])
    return fused(q, k, v, mask, causal=seen.causal, scale=scale, dropout=dropout)


def attention_weights(
    q: Tensor,
    k: Tensor,
    seen: Seen,
    softmax: nn.Module,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """softmax(cap(scale q k^T) + bias) [B, H, T, S], the sink's share left out, in float32 at least.

    softcap: c of c tanh(score / c).  `seen` is written out; everything else as in `attend`.
    """
    if seen.last:
        k, bias = k[:, :, -seen.last :], bias[..., -seen.last :] if bias is not None else None
    B, H, T, h = q.shape
    scores = q @ repeat_heads(k, H).transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * (scale or h**-0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if sink is None:
        return softmax(scores, seen.mask)
    mask = F.pad(seen.mask, (0, 1), value=True) if seen.mask is not None else None
    return softmax(torch.cat([scores, sink.to(scores.dtype).expand(B, H, T, 1)], -1), mask)[..., :-1]


def _additive(q: Tensor, S: int, seen: Seen, bias: Tensor | None, sink: Tensor | None) -> Tensor:
    """What is added to the scores, [B or 1, H or 1, T, S (+ 1 for the sink)] in q's dtype; -inf where not seen."""
    assert not seen.causal
    T = q.shape[2]
    added = q.new_zeros(1, 1, T, S) if bias is None else bias.to(q.dtype)
    if seen.mask is not None:
        added = added.masked_fill(~seen.mask, -torch.inf)
    if sink is None:
        return added
    rows, heads = added.shape[0], max(added.shape[1], sink.shape[1])
    sink = sink.to(q.dtype).expand(rows, heads, T, 1)
    return torch.cat([added.expand(rows, heads, T, S), sink], -1)
