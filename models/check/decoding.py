"""Checks of decoding: memory, padding, continuous batching, generation.   B batch, T time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig

from models.check.helpers import Make, Verdict, apart, context, exact, judge, tokens
from models.lm import LM
from models.memory import At


@torch.no_grad()
def cached_equals_full(make: Make) -> Verdict:
    """Logits from memory, in chunks of several sizes, are those of one full call."""
    model = exact(make)
    ids = tokens(model, 2, context(model, 15))
    full, worst = model(ids).logits, 0.0
    for first, step in ((1, 1), (7, 1), (5, 4)):
        out = model(ids[:, :first], use_cache=True)
        parts = [out.logits]
        for start in range(first, ids.shape[1], step):
            parts.append(model(ids[:, start : start + step], past_key_values=out.past_key_values).logits)
        worst = max(worst, apart(torch.cat(parts, 1), full))
    return judge(worst, full.abs().max().item(), f"{ids.shape[1]} tokens in steps of 1 and 4")


@torch.no_grad()
def rows_equal_single(make: Make) -> Verdict:
    """Continuous batching with chunked prefill over explicit rows gives what each sequence gives alone.

    Rows are reused: the memory is poisoned with NaN first, and every admission resets its row.
    """
    model = exact(make)
    lengths = [min(n, context(model, n)) for n in (11, 3, 17, 1, 8)]
    rows, chunk, worst = 3, 4, 0.0
    prompts = [tokens(model, 1, n, seed=n)[0] for n in lengths]
    memory = model.memory(rows, max(lengths))
    for mem in memory.mem:
        for tensor in mem.tensors.values():
            tensor.fill_(float("nan"))
    waiting, live, done = list(range(len(prompts))), {}, [[] for _ in prompts]  # type: ignore[var-annotated]
    memory.reset_rows(slice(None))
    while waiting or live:
        while waiting and len(live) < rows:
            row = next(r for r in reversed(range(rows)) if r not in live)
            live[row] = waiting.pop(0)
            memory.reset_rows([row])
        used = sorted(live, key=lambda r: live[r])
        at_ = [sum(len(x) for x in done[live[r]]) for r in used]
        n = [min(chunk, lengths[live[r]] - a) for r, a in zip(used, at_, strict=True)]
        T = max(n)
        ids = torch.stack(
            [F.pad(prompts[live[r]][a : a + k], (0, T - k)) for r, a, k in zip(used, at_, n, strict=True)]
        )
        pos = torch.tensor(at_)[:, None] + torch.arange(T)
        upto = max(a + k for a, k in zip(at_, n, strict=True))
        at = At(pos.to(ids.device), torch.tensor(n, device=ids.device), torch.tensor(used, device=ids.device), upto)
        logits = model.run(ids, at, memory)
        for i, r in enumerate(used):
            done[live[r]].append(logits[i, : n[i]])
            if at_[i] + n[i] == lengths[live[r]]:
                del live[r]
    scale = 0.0
    for prompt, parts in zip(prompts, done, strict=True):
        full = model(prompt[None]).logits[0]
        worst, scale = max(worst, apart(torch.cat(parts), full)), max(scale, full.abs().max().item())
    return judge(worst, scale, f"{len(lengths)} sequences over {rows} rows, chunks of {chunk}")


@torch.no_grad()
def rollback_forgets(make: Make) -> Verdict:
    """Tokens that were rolled back (per-token memory) or restored from a snapshot (states) leave no trace."""
    model = exact(make)
    T = context(model, 12)
    ids, other = tokens(model, 2, T), tokens(model, 2, T, seed=9)
    memory = model(ids[:, : T - 4], use_cache=True).past_key_values
    snapshot = memory.snapshot()
    model(other[:, :3], past_key_values=memory)
    if memory.has_state:
        memory.restore(snapshot)
    else:
        memory.crop(-3)
    full = model(ids).logits
    again = model(ids[:, T - 4 :], past_key_values=memory).logits
    return judge(apart(again, full[:, T - 4 :]), full.abs().max().item(), "3 tokens taken back")


@torch.no_grad()
def padding_is_unseen(make: Make) -> Verdict:
    """A batch padded on the left, or on the right, gives each row's own logits, with memory and without."""
    model = exact(make)
    T = context(model, 10)
    lengths = [T, T - 3, 2, 1]
    rows = [tokens(model, 1, n, seed=n) for n in lengths]
    single = [model(row).logits[0] for row in rows]
    worst = 0.0
    for left in (True, False):
        pad = [(T - n, 0) if left else (0, T - n) for n in lengths]
        ids = torch.cat([F.pad(row, p, value=1) for row, p in zip(rows, pad, strict=True)])
        mask = torch.cat([F.pad(torch.ones_like(row), p) for row, p in zip(rows, pad, strict=True)])
        for use_cache in (False, True):
            logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
            for i, (want, p) in enumerate(zip(single, pad, strict=True)):
                worst = max(worst, apart(logits[i, p[0] : T - p[1]], want))
    return judge(worst, max(s.abs().max().item() for s in single), "rows of 4 lengths, pads left and right")


# ---- generation


@torch.no_grad()
def uncached_greedy(model: LM, ids: Tensor, n: int) -> Tensor:
    """Greedy decoding that runs the whole sequence for every token."""
    for _ in range(n):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def generated(model: Any, ids: Tensor, mask: Tensor, n: int, **options: Any) -> Tensor:
    """transformers' `generate` for exactly n tokens, whatever the folder's generation_config says of ends."""
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, **options)


def generate_equals_greedy(make: Make) -> Verdict:
    """transformers' `generate`, with memory and left padding, is our uncached greedy decoding, token for token."""
    model = exact(make)
    n = min(8, model.spec.seq_len - 4)
    rows = [tokens(model, 1, 4), tokens(model, 1, 2, seed=4)]
    ids = torch.cat([rows[0], F.pad(rows[1], (2, 0))])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    out = generated(model, ids, mask, n)
    for row, got, skip in zip(rows, out, (0, 2), strict=True):
        want = uncached_greedy(model, row, n)[0]
        if not torch.equal(got[skip:], want):
            return False, f"{got[skip:].tolist()} instead of {want.tolist()}"
    return True, f"2 rows, one left-padded, {n} tokens"


def beams_equal_uncached(make: Make) -> Verdict:
    """Beam search over reordered memory finds what it finds without memory."""
    model = exact(make)
    n = min(6, model.spec.seq_len - 3)
    ids = tokens(model, 2, 3)
    beams = min(3, model.spec.vocab)
    ours, want = (
        generated(model, ids, torch.ones_like(ids), n, num_beams=beams, use_cache=use_cache)
        for use_cache in (True, False)
    )
    other = next((i for i in range(len(ids)) if not torch.equal(ours[i], want[i])), 0)
    return torch.equal(ours, want), f"{beams} beams, {n} tokens: {ours[other].tolist()} and {want[other].tolist()}"
