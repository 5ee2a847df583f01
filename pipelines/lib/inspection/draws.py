"""A continuation token by token: the text each adds, what it was drawn from, a value in [0, 1] to colour it by.

Colour modes, each with 1 for what the model is sure of or likes:
    probability   p of the token under the model (temperature 1, no rule), over the full vocabulary
    top_k         the probability with which it was drawn: after temperature, penalties, top-k, top-p and min-p
    entropy       1 - H / ln V of the model's distribution at this step
    rank          1 + the tokens that were more likely: the best stays plain, then from 1 down to 0 at rank k and beyond
    minmax        its raw logit between the lowest and the highest that a token of this continuation was chosen with
    cosine        of its embedding with that of the token before it, between the lowest and the highest there
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from models.spec import ConfigError, near
from pipelines.lib.inspection.modes import Mode

if TYPE_CHECKING:
    from serving.engine import Draw, Engine, Request

MODES: tuple[str, ...] = tuple(m for m in get_args(Mode) if m not in ("none", "all"))


@dataclass(frozen=True)
class Token:
    """One generated token.

    name: what it stands for, alone (`bytes:\\xe4` for a part of a character).  text: what it added to the text, often
    the same; empty while a character is not complete.  cosine: with the token before it.  top: names of draw.top.
    """

    name: str
    text: str
    draw: Draw
    cosine: float
    top: tuple[str, ...]


@dataclass(frozen=True)
class Continuation:
    """A prompt's continuation under one setting.  vocab: tokens the model knows.  sample: number among its likes."""

    prompt: str
    sample: int
    temperature: float
    top_k: int
    tokens: tuple[Token, ...]
    vocab: int
    finish_reason: str

    @property
    def text(self) -> str:
        return "".join(t.text for t in self.tokens)

    def title(self) -> str:
        best = f"top-k {self.top_k}" if self.top_k else "all tokens"
        return f"temperature {self.temperature:g}, {best}, sample {self.sample + 1}"

    def figures(self) -> dict[str, float]:
        """Means over the tokens: cross-entropy and entropy in nats, rank, and what the cosine penalty changed."""
        draws = [t.draw for t in self.tokens]
        n = len(draws)
        if not n:
            return {}
        out = {
            "cross_entropy": -sum(d.logprob for d in draws) / n,
            "entropy": sum(d.entropy for d in draws) / n,
            "rank": sum(d.rank for d in draws) / n,
        }
        kl = sum(d.kl for d in draws) / n
        return {**out, "kl": kl} if any(d.kl for d in draws) else out


def continuation(engine: Engine, request: Request, prompt: str, sample: int) -> Continuation:
    """What a finished request of this engine looks like token by token; it must have asked for `draws`."""
    names: Any = engine.token_bytes
    n = min(request.shown_tokens(), len(request.draws))
    ends = [*request.offsets[1:n], len(request.text)]
    pieces = [request.text[a : max(a, b)] for a, b in zip(request.offsets[:n], ends, strict=True)]
    directions = engine.directions()
    ids = [request.prompt[-1], *request.tokens[:n]]
    cosines = (directions[ids[1:]] * directions[ids[:-1]]).sum(-1).tolist()
    tokens = tuple(
        Token(names.name(d.id), piece, d, cosine, tuple(names.name(i) for i, _, _ in d.top))
        for d, piece, cosine in zip(request.draws[:n], pieces, cosines, strict=True)
    )
    p = request.params
    return Continuation(prompt, sample, p.temperature, p.top_k, tokens, engine.vocab, request.finish_reason or "")


def values(tokens: Sequence[Token], mode: str, vocab: int, k: int) -> list[float | None]:
    """In [0, 1] for each token, None for what stays plain.  k: the rank from which on the value is 0."""
    if mode == "probability":
        return [math.exp(t.draw.logprob) for t in tokens]
    if mode == "top_k":
        return [t.draw.drawn for t in tokens]
    if mode == "entropy":
        return [1 - t.draw.entropy / math.log(vocab) for t in tokens]
    if mode == "rank":
        return [None if t.draw.rank == 1 else by_rank(t.draw.rank, k) for t in tokens]
    if mode == "minmax":
        return between([t.draw.logit for t in tokens])
    if mode == "cosine":
        return between([t.cosine for t in tokens])
    raise ConfigError(f"colour={mode!r}{near(mode, MODES)}")


def by_rank(rank: int, k: int) -> float:
    """1 at rank 2, 0 at rank k and beyond, straight in between."""
    return max(0.0, 1 - (rank - 2) / max(1, k - 2)) if rank < max(k, 3) else 0.0


def between(numbers: Sequence[float]) -> list[float | None]:
    """Each between the smallest (0) and the largest (1); 0.5 where all are equal."""
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    return [(x - low) / (high - low) if high > low else 0.5 for x in numbers]


def ends_of_scale(tokens: Sequence[Token], mode: str, vocab: int, k: int) -> tuple[str, str]:
    """What 0 and 1 of a mode stand for, in words."""
    if mode == "entropy":
        return f"{math.log(vocab):.2f} nats", "0 nats"
    if mode == "rank":
        return f"rank {max(k, 3)} and beyond", "rank 2 (rank 1 is plain)"
    if mode in ("minmax", "cosine"):
        numbers = [t.draw.logit if mode == "minmax" else t.cosine for t in tokens]
        word = "logit" if mode == "minmax" else "cosine"
        return f"{word} {min(numbers, default=0):.2f}", f"{word} {max(numbers, default=0):.2f}"
    return "0", "1"
