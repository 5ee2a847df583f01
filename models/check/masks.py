"""Checks of what a token may depend on: earlier ones of its own document and row, nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.check.helpers import Make, Verdict, apart, compare, context, exact, judge, tokens
from models.memory import At


def no_look_ahead(make: Make) -> Verdict:
    """No logit depends on a later token, by value and by gradient; each depends on its own and on an earlier one.

    A model that remembers nothing cannot depend on an earlier one; sparse weights may leave out the one just before.
    """
    model = exact(make)
    T = context(model, 12)
    cut = T // 2
    ids, other = tokens(model, 1, T), tokens(model, 1, T, seed=5)
    changed = torch.cat([ids[:, :cut], other[:, cut:]], 1)
    with torch.no_grad():
        full = model(ids).logits
        error = apart(full[:, :cut], model(changed).logits[:, :cut])
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    hook = model.embedding.register_forward_hook(keep)
    try:
        logits = model(ids).logits
    finally:
        hook.remove()
    weight = torch.randn(logits.shape[-1], dtype=logits.dtype, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((logits[0, cut - 1] * weight.to(logits.device)).sum(), kept[0])
    size = gradient[0].abs().amax(-1)
    remembers = cut > 1 and any(block.mixer.memory() for block in model.applications())
    if not bool(size[cut - 1] > 0) or (remembers and not bool((size[: cut - 1] > 0).any())):
        return False, f"the logit at {cut - 1} does not depend on its own token and an earlier one"
    return judge(max(error, size[cut:].max().item()), full.abs().max().item(), "values and gradients")


@torch.no_grad()
def documents_are_apart(make: Make) -> Verdict:
    """Documents packed into a row give the logits that each gives alone, with positions that restart."""
    model = exact(make)
    lengths = [5, 1, 4] if model.spec.seq_len >= 10 else [1, 1]
    parts = [tokens(model, 1, n, seed=n) for n in lengths]
    ids = torch.cat(parts, 1)
    pos = torch.cat([torch.arange(n) for n in lengths])[None].to(ids.device)
    doc = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].to(ids.device)
    packed = model.logits(model.hidden(ids, At(pos, upto=ids.shape[1], doc=doc)))
    alone = torch.cat([model(part).logits for part in parts], 1)
    return judge(apart(packed, alone), alone.abs().max().item(), f"documents of {lengths} tokens")


def masked_rows_are_finite(make: Make) -> Verdict:
    """A row of pads only, documents of one token and every gradient stay finite."""
    model = exact(make).train()
    T = context(model, 6)
    ids = tokens(model, 3, T)
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[2, :-1] = 0
    outputs = [model(ids, attention_mask=mask, use_cache=use_cache).logits for use_cache in (False, True)]
    doc = torch.arange(T, device=ids.device).expand(3, T)
    outputs.append(model.logits(model.hidden(ids, At(doc, upto=T, doc=doc))))
    for name, out in zip(("no memory", "memory", "documents"), outputs, strict=True):
        model.zero_grad(set_to_none=True)
        if name != "memory":
            out.sum().backward()
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
        if bad or not bool(out.isfinite().all()):
            return False, f"{name}: not finite: {', '.join(bad) or 'logits'}"
    return True, "all-pad row, one-token documents: logits and gradients finite"


@torch.no_grad()
def rows_do_not_mix(make: Make) -> Verdict:
    """A row's logits are the same whatever other rows stand in the batch; a scale over all of it would couple them."""
    model = exact(make)
    T = context(model, 9)
    ids = tokens(model, 3, T)
    others = torch.cat([ids[:1], tokens(model, 2, T, seed=7), tokens(model, 2, T, seed=8)])
    full = model(ids).logits
    worst = max(apart(full[:1], model(batch).logits[:1]) for batch in (others, ids[:1]))
    return judge(worst, full.abs().max().item(), "one row beside 0, 2 and 4 others")


def fused_equals_written_out(make: Make) -> Verdict:
    """Where a part has a fused form, it equals the one that is written out, in value and gradient, masked or not."""
    model = exact(make)
    fused = [m for m in model.modules() if isinstance(m, nn.Module) and getattr(m, "fused", None) is True]
    if not fused:
        return True, "nothing is fused"
    T = context(model, 9)
    ids = tokens(model, 2, T)
    doc = (torch.arange(T, device=ids.device) // 4).expand(2, T)
    pos = torch.arange(T, device=ids.device).expand(2, T)
    verdicts = []
    for packed in (None, doc):
        found = []
        for switch in (True, False):
            for module in fused:
                module.fused = switch  # type: ignore[assignment]
            at = None if packed is None else At(pos, upto=T, doc=packed)
            model.zero_grad(set_to_none=True)
            logits = model.logits(model.hidden(ids, at))
            logits.square().mean().backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append({"logits": logits.detach(), **grads})
        verdicts.append(compare(found[0], found[1], f"{len(fused)} fused modules"))
    return min(verdicts)
