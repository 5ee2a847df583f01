"""From logits to the next token: what a request may ask for, and the rules that draw from it.   B rows, V vocabulary.

Every rule works in float32 on all rows at once and decides by value, never by position in a sort, so the outcome of a
row does not depend on its neighbours; the one random number of a draw comes from the request's own generator.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # a temperature this low is greedy: its softmax is one-hot in float32 already


class RequestError(ValueError):
    """A request that cannot be served. param: the setting at fault; code: a short machine-readable word."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued.

    max_tokens: tokens to generate at most; None fills the model's context
    temperature: 0 is greedy; logits are divided by it
    top_k: keep the k most likely tokens (ties with the k-th stay); 0 keeps all
    top_p: keep the smallest set of most likely tokens with at least this probability (nucleus, arXiv:1904.09751)
    min_p: keep tokens with at least this fraction of the best token's probability (arXiv:2407.01082)
    repetition_penalty: above 1 makes tokens of prompt and output less likely (CTRL, arXiv:1909.05858)
    presence_penalty: taken once from the logit of every token already generated (OpenAI's rule)
    frequency_penalty: taken from a token's logit as many times as it was generated (OpenAI's rule)
    logit_bias: token id -> number added to its logit
    stop: generation ends where one of these strings begins; the string itself is not returned
    stop_token_ids: tokens that end the generation, beside the model's own end tokens
    ignore_eos: go on after the model's end token
    seed: makes the draws repeatable, whatever else is in the batch; None draws a fresh one
    logprobs: log-probabilities of generated tokens and this many most likely ones (0: the token's own only)
    prompt_logprobs: the same for the prompt's tokens
    cosine_penalty: (N, a): a token's logit loses a times the largest cosine of its embedding with one of the last N
        tokens' (prompt included)
    draws: note for each generated token what it was drawn from, with this many of the most likely tokens
    """

    max_tokens: int | None = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cosine_penalty: tuple[int, float] | None = None
    draws: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        rules: tuple[tuple[str, bool, str], ...] = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 <= self.top_p <= 1, "between 0 and 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 changes nothing"),
            ("presence_penalty", abs(self.presence_penalty) < float("inf"), "a finite number"),
            ("frequency_penalty", abs(self.frequency_penalty) < float("inf"), "a finite number"),
            ("logit_bias", all(abs(b) < float("inf") for b in self.logit_bias.values()), "finite numbers"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more"),
            ("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= 0, "0 or more"),
            (
                "cosine_penalty",
                self.cosine_penalty is None
                or (self.cosine_penalty[0] >= 1 and abs(self.cosine_penalty[1]) < float("inf")),
                "a number of tokens, at least 1, and a finite strength",
            ),
            ("draws", self.draws is None or self.draws >= 0, "0 or more"),
        )
        for name, good, wanted in rules:
            if not good:
                raise RequestError(f"{name}={getattr(self, name)!r} must be {wanted}", param=name)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


class TokenLogprob(NamedTuple):
    """A token's log-probability under the model (before temperature and rules), and the most likely tokens' there."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Draw(NamedTuple):
    """What one token was drawn from: p, the model's distribution (no temperature, no rule), and q, that after them all.

    id: the token.  logit: its raw logit.  logprob: ln p of it.  entropy: of p, in nats.  rank: 1 + the tokens with
    more p.  above: p of these together.  drawn: q of the token.  kept: tokens with q above 0.  kl: KL(q' || p'), nats,
    of the distributions at the temperature after and before the cosine penalty, no token cut off; 0 without one.
    top: the most likely tokens under p, as (id, ln p, q).
    """

    id: int
    logit: float
    logprob: float
    entropy: float
    rank: int
    above: float
    drawn: float
    kept: int
    kl: float
    top: tuple[tuple[int, float, float], ...]


def seed_of_sample(seed: int | None, index: int) -> int | None:
    """The seed of sample number `index` of one request; sample 0 has the request's own."""
    return None if seed is None else (seed ^ (index * 0x9E3779B97F4A7C15)) & (2**63 - 1)


class Sampler:
    """One request's part in the draw: its generator and the tokens it has seen.

    directions: [V, D], the embeddings scaled to length 1; needed for a cosine penalty only.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab: int,
        device: torch.device,
        directions: Tensor | None = None,
    ) -> None:
        self.params = params
        self.generator: torch.Generator | None = None
        if not params.greedy:
            # Always on the CPU: the same seed draws the same numbers on every device.
            seed = secrets.randbits(63) if params.seed is None else params.seed & (2**63 - 1)
            self.generator = torch.Generator().manual_seed(seed)
        self.seen: Tensor | None = None  # [V] bool: in prompt or output
        self.counts: Tensor | None = None  # [V] float: times generated
        self.bias: tuple[Tensor, Tensor] | None = None
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab, dtype=torch.bool, device=device)
            self.seen[torch.tensor([i for i in prompt if i < vocab], dtype=torch.long, device=device)] = True
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros(vocab, device=device)
        if params.logit_bias:
            ids = [i for i in params.logit_bias if 0 <= i < vocab]
            self.bias = (
                torch.tensor(ids, dtype=torch.long, device=device),
                torch.tensor([params.logit_bias[i] for i in ids], dtype=torch.float32, device=device),
            )
        self.directions = directions[:vocab] if params.cosine_penalty and directions is not None else None
        self.recent: deque[int] = deque(maxlen=params.cosine_penalty[0] if params.cosine_penalty else 0)
        self.recent.extend(i for i in prompt if i < vocab)
        self.changes_logits = any(t is not None for t in (self.seen, self.counts, self.bias, self.directions))

    def saw(self, token: int) -> None:
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        self.recent.append(token)

    def too_near(self) -> Tensor | None:
        """[V]: what the cosine penalty takes from each logit; None without one."""
        if self.directions is None or not self.recent or self.params.cosine_penalty is None:
            return None
        last = self.directions[torch.tensor(list(self.recent), device=self.directions.device)]
        return self.params.cosine_penalty[1] * (self.directions @ last.T).amax(-1)

    def penalised(self, x: Tensor, cosine: bool = True) -> Tensor:
        """x: [V] float32 logits. Returns them after penalties and bias. cosine: whether that penalty counts."""
        p = self.params
        if self.seen is not None:
            x = torch.where(self.seen, torch.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty), x)
        if self.counts is not None:
            x = x - p.frequency_penalty * self.counts - p.presence_penalty * (self.counts > 0)
        if self.bias is not None:
            x = x.index_add(0, *self.bias)
        near = self.too_near() if cosine else None
        return x if near is None else x - near


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """The next token of every row; None where a row has no finite logit, so that nothing can be chosen.

    logits: [B, V], any float dtype. NaN counts as impossible, +inf as the largest finite number.
    """
    x = logits.float()
    best, token = x.max(-1)  # NaN wins a max, so one look at `best` finds it anywhere in the row
    highest = best.tolist()
    dead = [False] * len(highest)
    if not all(-float("inf") < h < float("inf") for h in highest):
        x = x.nan_to_num(nan=-float("inf"), posinf=torch.finfo(torch.float32).max, neginf=-float("inf"))
        best, token = x.max(-1)
        dead = [h == -float("inf") for h in best.tolist()]
        x = torch.where(torch.tensor(dead, device=x.device)[:, None], 0.0, x)
    if any(s.changes_logits for s in samplers):
        x = torch.stack([s.penalised(row) for s, row in zip(samplers, x, strict=True)])
        token = x.argmax(-1)
    chosen: list[int | None] = list(token.tolist())
    drawn = [i for i, s in enumerate(samplers) if s.generator is not None]
    if drawn:
        subset = x if len(drawn) == len(samplers) else x[torch.tensor(drawn, device=x.device)]
        probs = distribution(subset, [samplers[i].params for i in drawn])
        u = [float(torch.rand((), generator=samplers[i].generator, dtype=torch.float64)) for i in drawn]
        for i, t in zip(drawn, draw(probs, u), strict=True):
            chosen[i] = t
    return [None if gone else t for t, gone in zip(chosen, dead, strict=True)]


def distribution(x: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Temperature, top-k, top-p, min-p in this order (that of transformers' generate).

    x: [B, V] float32 logits with at least one finite entry a row. Returns [B, V] probabilities, not renormalised.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=x.dtype, device=x.device)[:, None]

    V = x.shape[-1]
    x = x - x.max(-1, keepdim=True).values  # <= 0, so a tiny temperature gives -inf, never inf - inf
    if any(p.temperature != 1 for p in params):
        x = x / column([p.temperature for p in params])
    k = [min(p.top_k, V) for p in params]
    if any(k):
        top = x.topk(max(k), -1).values
        kth = top.gather(-1, torch.tensor([max(0, n - 1) for n in k], device=x.device)[:, None])
        kth = torch.where(torch.tensor([n > 0 for n in k], device=x.device)[:, None], kth, -float("inf"))
        x = x.masked_fill(x < kth, -float("inf"))
    probs = x.softmax(-1)
    if any(p.top_p < 1 for p in params):
        # Only top_k tokens are left when every row has one: sorting those is enough.
        ordered = probs.topk(max(k), -1).values if all(k) else probs.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        kept = (before < column([p.top_p for p in params])).sum(-1, keepdim=True).clamp(min=1)
        least = ordered.gather(-1, kept - 1)
        least = torch.where(column([p.top_p for p in params]) < 1, least, 0.0)
        probs = probs.masked_fill(probs < least, 0.0)
    if any(p.min_p > 0 for p in params):
        floor = column([p.min_p for p in params]) * probs.max(-1, keepdim=True).values
        probs = probs.masked_fill(probs < floor, 0.0)
    return probs


def draw(probs: Tensor, u: Sequence[float]) -> list[int]:
    """Inverse of the cumulative distribution: one index per row of probs [B, V] for one number in [0, 1) each."""
    wide = torch.float64 if probs.device.type != "mps" else torch.float32  # Apple's GPUs have no float64
    cumulative = probs.to(wide).cumsum(-1)
    total = cumulative[:, -1]
    at = torch.tensor(u, dtype=wide, device=probs.device) * total
    # Strictly below the total, so that rounding can never select a token of probability zero behind the last.
    at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, at[:, None], right=True)[:, 0].tolist()


def logprobs_of(logits: Tensor, tokens: Sequence[int], n_top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` [N] under logits [N, V] in float32, each with its n_top[i] most likely tokens.

    A token's own value and the list's come from one tensor: a greedy token's equals the list's maximum exactly.
    """
    out: list[TokenLogprob] = []
    for start in range(0, len(tokens), 256):  # bounds the [N, V] float32 copies
        some, wanted = tokens[start : start + 256], n_top[start : start + 256]
        table = logits[start : start + 256].float().log_softmax(-1)
        own = table.gather(-1, torch.tensor(some, device=table.device)[:, None])[:, 0].tolist()
        most = min(max(wanted), table.shape[-1])
        values, ids = table.topk(most, -1) if most else (table[:, :0], table[:, :0])
        for t, lp, n, top_ids, top in zip(some, own, wanted, ids.tolist(), values.tolist(), strict=True):
            out.append(TokenLogprob(t, lp, tuple(zip(top_ids[:n], top[:n], strict=True))))
    return out


def draws_of(logits: Tensor, tokens: Sequence[int], samplers: Sequence[Sampler], choosable: int) -> list[Draw]:
    """What each of `tokens` [N] was drawn from, under logits [N, V]; to be asked before the samplers see the tokens.

    choosable: tokens that can be chosen; rows behind them have p, and q = 0.  At a temperature of 0 q is one-hot.
    """
    wide = logits.float()
    table = wide.log_softmax(-1)  # the same as in `logprobs_of`
    p = table.exp()
    at = torch.tensor(tokens, device=table.device)[:, None]
    own = table.gather(-1, at)
    better = table > own
    q, kl = _drawn_from(wide[:, :choosable], at, samplers)
    q = torch.nn.functional.pad(q, (0, table.shape[-1] - q.shape[-1]))
    columns = (
        wide.gather(-1, at)[:, 0],
        own[:, 0],
        torch.special.entr(p).sum(-1),
        better.sum(-1) + 1,
        (p * better).sum(-1),
        q.gather(-1, at)[:, 0],
        (q > 0).sum(-1),
    )
    most = min(max(s.params.draws or 0 for s in samplers), table.shape[-1])
    values, ids = table.topk(most, -1)
    shares = q.gather(-1, ids)
    figures = zip(*(c.tolist() for c in columns), kl, strict=True)
    lists = zip(ids.tolist(), values.tolist(), shares.tolist(), strict=True)
    out = []
    for token, s, figure, (some, logprobs, each) in zip(tokens, samplers, figures, lists, strict=True):
        n = s.params.draws or 0
        top = tuple(zip(some[:n], logprobs[:n], each[:n], strict=True))
        out.append(Draw._make([token, *figure, top]))
    return out


def _drawn_from(x: Tensor, at: Tensor, samplers: Sequence[Sampler]) -> tuple[Tensor, list[float]]:
    """q [N, V] of logits x [N, V] whose chosen tokens are `at` [N, 1], and what the cosine penalty changed (nats)."""
    x = x.nan_to_num(nan=-float("inf"), posinf=torch.finfo(torch.float32).max, neginf=-float("inf"))
    params = [s.params for s in samplers]
    after = torch.stack([s.penalised(row) for s, row in zip(samplers, x, strict=True)])
    kl = [0.0] * len(params)
    for i, s in enumerate(samplers):
        if s.directions is not None:
            heat = 1.0 if s.params.greedy else s.params.temperature
            new, old = ((y / heat).log_softmax(-1) for y in (after[i], s.penalised(x[i], cosine=False)))
            both = new > -float("inf")
            kl[i] = float((new.exp() * (new - old))[both].sum())
    q = torch.zeros_like(after).scatter_(-1, at, 1.0)  # greedy
    drawn = [i for i, p in enumerate(params) if not p.greedy]
    if drawn:
        probs = distribution(after[drawn], [params[i] for i in drawn])
        q[drawn] = probs / probs.sum(-1, keepdim=True)
    return q, kl
