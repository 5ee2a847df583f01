"""Checks of narrower number formats, judged by float64."""

from __future__ import annotations

import torch
from torch import nn

from models.check.helpers import Make, Verdict, context, exact, tokens


@torch.no_grad()
def narrow_memory_errs_as_a_full_pass(make: Make) -> Verdict:
    """Decoding from memory in float32 and bfloat16 errs at most twice as much as a full pass in that format does."""
    ids = tokens(make(), 2, context(make(), 16))
    first = max(1, ids.shape[1] - 7)
    truth = exact(make)(ids).logits
    said = []
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Module.to(make(), dtype).eval()
        full = model(ids).logits
        out = model(ids[:, :first], use_cache=True)
        parts = [out.logits]
        for t in range(first, ids.shape[1]):
            parts.append(model(ids[:, t : t + 1], past_key_values=out.past_key_values).logits)
        error = (torch.cat(parts, 1) - truth).abs().max().item()
        budget = 2 * (full - truth).abs().max().item() + 1e-5
        said.append(f"{str(dtype)[6:]}: error {error:.1e}, budget {budget:.1e}")
        if not error <= budget:
            return False, said[-1]
    return True, "; ".join(said)


def autocast_is_finite(make: Make) -> Verdict:
    """A training step under bfloat16 autocast gives a finite loss and finite gradients."""
    model = make().train()
    ids = tokens(model, 2, context(model, 12))
    with torch.autocast(model.device.type, torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    if bad or not bool(loss.isfinite()):
        return False, f"not finite: {', '.join(bad) or 'loss'}"
    return True, f"loss {loss.item():.3f}"
