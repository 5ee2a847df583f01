"""What happens inside a model on some text: the residual stream, what branches add to it, attention, final states.

B batch, T time, D model width, H heads. Sums are kept in float64 and text comes in batches, so memory does not grow
with the text, but for the final hidden states, which are kept whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.lm import LM
from pipelines.lib.inspection.weights import entropy_rank, singular_values


@dataclass
class Running:
    """Moments of numbers that come in pieces. Raw sums in float64: activations lie around 0, so no digits are lost."""

    n: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    largest: float = 0.0
    bad: int = 0

    def add(self, x: Tensor) -> None:
        wide = x.detach().cpu().double().flatten()
        good = wide[wide.isfinite()]
        self.bad += wide.numel() - good.numel()
        if good.numel():
            self.n += good.numel()
            square = good.square()
            found = (good.sum(), square.sum(), (square * good).sum(), square.square().sum())
            self.sums = [a + float(b) for a, b in zip(self.sums, found, strict=True)]
            self.largest = max(self.largest, float(good.abs().max()))

    @property
    def rms(self) -> float:
        return math.sqrt(self.sums[1] / self.n) if self.n else math.nan

    @property
    def kurtosis(self) -> float:
        """Excess: 0 for a normal distribution; NaN where all numbers are equal."""
        if not self.n:
            return math.nan
        m, m2, m3, m4 = (s / self.n for s in self.sums)
        variance = m2 - m * m
        if variance <= 1e-14 * m2:
            return math.nan
        return (m4 - 4 * m * m3 + 6 * m * m * m2 - 3 * m**4) / variance**2 - 3


@dataclass
class Head:
    """One attention head. Sums over queries that see at least two keys; of rows scaled to sum 1.

    entropy: nats.  share: entropy / ln(keys it sees), 1 is uniform.  distance: tokens it looks back on average.
    total: what the row's weights sum to before they are scaled (below 1 with a sink).
    """

    n: int = 0
    entropy: float = 0.0
    share: float = 0.0
    distance: float = 0.0
    total: float = 0.0

    def mean(self) -> dict[str, float]:
        names = ("entropy", "share", "distance", "total")
        return {name: getattr(self, name) / self.n if self.n else math.nan for name in names}


@dataclass
class Activations:
    """The figures of one model on one text.

    stream: the residual stream, by place: embedding, layer 0, ..., final norm.  mixers, mlps: what each layer's
    branches gave, in the order they ran.  heads: of each layer that has attention weights, by its number.
    """

    tokens: int = 0
    nats: float = 0.0
    targets: int = 0
    stream: dict[str, Running] = field(default_factory=dict)
    mixers: list[Running] = field(default_factory=list)
    mlps: list[Running] = field(default_factory=list)
    heads: dict[int, list[Head]] = field(default_factory=dict)
    final: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.targets if self.targets else math.nan

    def states(self) -> States:
        return States.of(torch.cat(self.final))


@dataclass(frozen=True)
class States:
    """The shape of the final hidden states, [N, D].

    rankme: exp(entropy of the shares of the singular values) of the states as they are, between 1 and min(N, D)
    (arXiv:2210.02885).  alpha_req: a of eigenvalue i of their covariance ~ i^-a, fitted to the leading half by least
    squares on logarithms (arXiv:2202.05808).  singular: the values.  eigenvalues: of the covariance.
    """

    n: int
    rankme: float
    alpha_req: float
    singular: tuple[float, ...]
    eigenvalues: tuple[float, ...]

    @classmethod
    def of(cls, x: Tensor) -> States:
        x = x.double()
        singular = singular_values(x)
        centred = singular_values(x - x.mean(0))
        eigenvalues = tuple(s * s / max(1, len(x) - 1) for s in centred)
        return cls(len(x), entropy_rank(singular), slope(eigenvalues), singular, eigenvalues)


def slope(eigenvalues: tuple[float, ...]) -> float:
    """Minus the least-squares slope of ln(eigenvalue) over ln(number) in the leading half of them; NaN below two."""
    lead = [v for v in eigenvalues[: max(2, len(eigenvalues) // 2)] if v > 0]
    if len(lead) < 2:
        return math.nan
    xs, ys = [math.log(i) for i in range(1, len(lead) + 1)], [math.log(v) for v in lead]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return -sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def observe(model: Any, batches: Iterable[Tensor]) -> Activations:
    """Runs the model on batches of token ids [B, T], whole rows from position 0, and gathers the figures."""
    seen = Activations()
    run = _own if isinstance(model, LM) else _foreign
    with torch.no_grad():
        for ids in batches:
            ids = ids.to(model.device)
            final, logits = run(model, ids, seen)
            seen.tokens += ids.numel()
            seen.final.append(final.flatten(0, 1).float().cpu())
            targets = ids[:, 1:].flatten()
            losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
            seen.nats, seen.targets = seen.nats + float(losses), seen.targets + targets.numel()
    return seen


def _own(model: LM, ids: Tensor, seen: Activations) -> tuple[Tensor, Tensor]:
    """One of ours: the trace of its residual stream, hooks on mixers and MLPs, weights that the mixers recompute."""
    trace: list[Tensor] = []
    with _hooks(model, seen):
        final = model.hidden(ids, trace=trace)
    for i, x in enumerate(trace):
        _note(seen, "embedding" if i == 0 else f"layer {i - 1}", x)
    _note(seen, "final norm", final)
    return final, model.logits(final)


def _note(seen: Activations, name: str, x: Tensor) -> None:
    seen.stream.setdefault(name, Running()).add(x)


@contextmanager
def _hooks(model: LM, seen: Activations) -> Iterator[None]:
    """While it lasts, every call of a mixer or MLP is noted; a module that several layers share once for each."""
    calls = {"mixer": 0, "mlp": 0}
    handles = []

    def of_branch(kind: str, found: list[Running]) -> Any:
        def hook(module: Any, args: tuple, output: Any) -> None:
            at = calls[kind]
            calls[kind] += 1
            if at == len(found):
                found.append(Running())
            y = output[0] if isinstance(output, tuple) else output
            found[at].add(y)
            weights = getattr(module, "weights", None)
            if kind == "mixer" and callable(weights):
                add_heads(seen.heads.setdefault(at, []), weights(*args[:2]))

        return hook

    for kind, found in (("mixer", seen.mixers), ("mlp", seen.mlps)):
        modules = {id(m): m for block in model.applications() if (m := getattr(block, kind, None)) is not None}
        handles += [m.register_forward_hook(of_branch(kind, found)) for m in modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _foreign(model: Any, ids: Tensor, seen: Activations) -> tuple[Tensor, Tensor]:
    """Any causal model of transformers: the hidden states and attention weights that it gives itself."""
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True, output_attentions=True)
    states = out.hidden_states
    for i, x in enumerate(states[:-1]):
        _note(seen, "embedding" if i == 0 else f"layer {i - 1}", x)
    _note(seen, "final norm", states[-1])
    for i, weights in enumerate(getattr(out, "attentions", None) or ()):
        if weights is not None and weights.dim() == 4:
            add_heads(seen.heads.setdefault(i, []), weights)
    return states[-1], out.logits


def add_heads(heads: list[Head], weights: Tensor) -> None:
    """Adds the rows of attention weights [B, H, T, T] to the heads' figures. A row without weight counts as none."""
    _, H, T, S = weights.shape
    heads += [Head() for _ in range(H - len(heads))]
    weights = weights.detach().cpu()
    # Keys a query can see, one [T]: with a window they are fewer than the triangle's.
    visible = (torch.ones(T, S, dtype=torch.bool).tril() & (weights > 0).any(0).any(0)).sum(-1)
    back = (torch.arange(T)[:, None] - torch.arange(S)).clamp_min(0).double()
    for row in weights:  # one at a time: float64 of all of them would fill the memory
        w = row.double().clamp_min(0)
        total = w.sum(-1)  # [H, T]
        p = w / total.clamp_min(1e-300)[..., None]
        entropy = torch.special.entr(p).sum(-1)
        share, distance = entropy / visible.clamp_min(2).double().log(), (p * back).sum(-1)
        counts = (visible >= 2) & (total > 0)
        for h, head in enumerate(heads):
            head.n += int(counts[h].sum())
            for name, x in (("entropy", entropy), ("share", share), ("distance", distance), ("total", total)):
                setattr(head, name, getattr(head, name) + float(x[h][counts[h]].sum()))
