"""What all checks use: models in float64 with parameters that have a say, tokens, and verdicts with figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.lm import LM

TOLERANCE = 1e-9  # of logits and gradients in float64, relative to the largest of them


class Result(NamedTuple):
    """One promise: whether it holds, and the figures that say so."""

    name: str
    ok: bool
    detail: str


Make = Callable[[], LM]
Verdict = tuple[bool, str]


def exact(make: Make) -> LM:
    """The model in float64, in eval mode."""
    return nn.Module.to(make(), torch.float64).eval()


def stirred(make: Make, scale: float = 0.3, seed: int = 1) -> Make:
    """Models whose parameters are moved away from initialisation, so that every part has a say in the logits."""

    def make_stirred() -> LM:
        model = make()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
        return model

    return make_stirred


def tokens(model: LM, B: int, T: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.spec.vocab, (B, T), generator=generator).to(model.device)


def context(model: LM, T: int) -> int:
    return min(T, model.spec.seq_len)


def judge(error: float, scale: float, what: str) -> Verdict:
    limit = TOLERANCE * max(scale, 1.0)
    return error <= limit, f"{what}: largest error {error:.1e}, limit {limit:.1e}"


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference; infinite where either is not finite."""
    difference = (a - b).abs().max().item()
    return difference if difference == difference else float("inf")


def gradients(model: LM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> Verdict:
    if ours.keys() != theirs.keys():
        return False, f"{what}: gradients of {sorted(ours.keys() ^ theirs.keys())} exist on one side only"
    error = max(apart(ours[name], theirs[name]) for name in ours)
    return judge(error, max(g.abs().max().item() for g in theirs.values()), what)
