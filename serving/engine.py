"""Text generation with continuous batching over memory rows. Torch only: no Ray, no web.

    engine = Engine(model, tokenizer)
    texts = engine.generate(["Once upon a time", "import "], SamplingParams(temperature=0.8, seed=1))

Requests wait in a queue, take a memory row when one is free, are read in chunks (so that a long prompt does not stop
the others) and then continued together, one token a step. What a request gets does not depend on its neighbours: its
draws come from its own generator, and a row of a batch is computed as it would be alone.
"""

from __future__ import annotations

import bisect
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from serving.backends import Feed, backend_for, context_of
from serving.sampling import (
    Draw,
    RequestError,
    Sampler,
    SamplingParams,
    TokenLogprob,
    choose,
    draws_of,
    logprobs_of,
    seed_of_sample,
)
from serving.text import Detokenizer, StopStrings, TokenBytes, detokenizer, of_streams

__all__ = [
    "Draw",
    "Engine",
    "EngineStopped",
    "EngineThread",
    "QueueFull",
    "Request",
    "RequestError",
    "SamplingParams",
    "TokenBytes",
    "TokenLogprob",
    "ids_of",
    "seed_of_sample",
]

log = logging.getLogger("novella.engine")


class QueueFull(RuntimeError):
    """No more requests may wait."""


class EngineStopped(RuntimeError):
    """The engine's thread has ended, on demand or after faults."""


def ids_of(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of a text. Raises RequestError for what the tokenizer cannot read: a character, or half of one."""
    half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    if half is not None:
        raise RequestError(f"the text holds {half!a}, half of a character, so it is no Unicode text", param="prompt")
    try:
        return list(tokenizer(text, **options).input_ids)
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library raises bare Exceptions for what its model lacks
            raise
        if of_streams(tokenizer) and tokenizer.backend_tokenizer.normalizer is None:
            what = "text alone does not give this model's tokens, which stand for other streams too; give token ids"
            raise RequestError(what, param="prompt") from None
        lacking = next((c for c in dict.fromkeys(text) if not _reads(tokenizer, c)), None)
        what = f"the text: {error}" if lacking is None else f"the character {lacking!r} (U+{ord(lacking):04X})"
        raise RequestError(f"the model's tokenizer has no token for {what}", param="prompt") from None


def _reads(tokenizer: Any, text: str) -> bool:
    try:
        tokenizer(text)
    except Exception:
        return False
    return True


@dataclass(eq=False)
class Request:
    """One prompt on its way. Readers in other threads may look at any time: everything here only grows.

    text: released, hence final (a stop string's beginning, or half a character, is held back).
    tokens: generated ids, including one that ended the generation.  offsets: where in the text each token begins.
    logprobs, prompt_logprobs: aligned with tokens and prompt (the first prompt token has None); empty unless asked for.
    draws: what each token was drawn from; empty unless asked for.
    finish_reason: None while running; then stop, length, cancelled or error (with `error` in words).
    cut: a stop string ended the text, so the last tokens may lie behind it.
    listener: called by the engine's thread after each step that changed the request.
    """

    prompt: list[int]
    params: SamplingParams
    listener: Callable[[], None] | None = None
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    cancelled: bool = False
    cut: bool = False

    # The engine's own.
    ids: list[int] = field(default_factory=list, repr=False)  # prompt + tokens
    fed: int = 0  # of ids, how many the model has seen
    row: int = -1
    length: int = 0  # characters of text, held ones included
    sampler: Sampler | None = field(default=None, repr=False)
    detokenizer: Detokenizer | None = field(default=None, repr=False)
    stops: StopStrings | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def shown_tokens(self) -> int:
        """How many of the tokens begin within the text released so far; at the end all, but for a stop string's."""
        if self.finished and not self.cut:
            return len(self.tokens)
        return bisect.bisect_left(self.offsets, len(self.text))


class Engine:
    """Continues many prompts at once on one model.

    model: a Novella model, or any transformers causal language model.  tokenizer: of transformers; None works with
    token ids alone (no text, no stop strings).  rows: requests that run together.  context: tokens a request may have,
    at most (and by default) the model's own.  chunk: prompt tokens read in one step.  cache=False recomputes the whole
    sequence for every token; it is slow and exists to check the rest.  max_waiting: requests that may wait for a row.
    dedicated: the model is used for nothing else, so torch's inference mode (a sixth faster at one small row) is safe;
    in training it is not, because tables that a model makes in it cannot be used under autograd later.

    Not thread-safe, except for submit() and cancel(); `EngineThread` runs one for others.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        rows: int = 8,
        context: int | None = None,
        chunk: int = 512,
        cache: bool = True,
        max_waiting: int | None = None,
        dedicated: bool = False,
    ) -> None:
        if rows < 1 or chunk < 1:
            raise ValueError(f"rows={rows} and chunk={chunk} must be 1 or more")
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        own = context_of(model)
        if context is not None and own is not None and context > own:
            raise ValueError(f"context={context} exceeds the model's own {own}")
        self.context = context or own or 1 << 30
        self.chunk = chunk if cache else 1 << 30  # without a memory a second chunk would repeat the first
        self.use_cache = cache
        self.max_waiting, self.dedicated = max_waiting, dedicated
        self.device = next(model.parameters()).device
        self.ends = end_tokens(model, tokenizer)
        self.vocab = int(model.get_input_embeddings().weight.shape[0])  # ids that the model can read
        # Rows beyond the tokenizer's last id only pad the embedding: such a token has no text and is never chosen.
        self.choosable = self.vocab if tokenizer is None else min(self.vocab, max(tokenizer.get_vocab().values()) + 1)
        self.token_bytes = TokenBytes(tokenizer) if tokenizer is not None else None
        self.waiting: deque[Request] = deque()
        self.live: list[Request] = []  # live[i] is in row i
        self.counts = {"prompt_tokens": 0, "generated_tokens": 0, "finished": 0, "steps": 0}
        self._backend: Any = None
        self._directions: Tensor | None = None  # made when the first request wants them
        self._lock = threading.Lock()  # guards `waiting`
        self._sweep = False  # a waiting or running request was cancelled

    # ---- requests

    def encode(self, text: str, tokenizer: Any = None) -> list[int]:
        """Token ids of a prompt. tokenizer: a copy of the engine's, for use beside its thread.

        Raises RequestError for text that the tokenizer cannot read, as a character that it has no id for.
        """
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise RequestError("text prompts need a tokenizer; give token ids", param="prompt")
        ids = ids_of(tokenizer, text)
        if len(ids) > 1 and ids[-1] in self.ends and not text.endswith(tokenizer.decode(ids[-1:])):
            ids.pop()  # a tokenizer that closes every text with an end token would end the continuation here
        return ids

    def check(self, prompt: str | Sequence[int], params: SamplingParams, tokenizer: Any = None) -> list[int]:
        """The prompt's ids. Raises RequestError if this request can never be served here.

        An empty prompt becomes the token that begins a document.
        """
        ids = self.encode(prompt, tokenizer) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids:
            start = getattr(self.tokenizer, "bos_token_id", None)
            start = start if start is not None else getattr(self.tokenizer, "eos_token_id", None)
            if start is None:
                raise RequestError("the prompt is empty, and the tokenizer has no token to begin with", param="prompt")
            ids = [start]
        if min(ids) < 0 or max(ids) >= self.vocab:
            wrong = next(i for i in ids if not 0 <= i < self.vocab)
            raise RequestError(
                f"the prompt's token id {wrong} is not in the model's 0..{self.vocab - 1}", param="prompt"
            )
        if len(ids) > self.context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, but this model's context is {self.context}; shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer", param="stop")
        unknown = next((i for i in (*params.logit_bias, *params.stop_token_ids) if not 0 <= i < self.vocab), None)
        if unknown is not None:
            name = "logit_bias" if unknown in params.logit_bias else "stop_token_ids"
            raise RequestError(f"{name}: token id {unknown} is not in 0..{self.vocab - 1}", param=name)
        for name in ("logprobs", "prompt_logprobs", "draws"):
            if (getattr(params, name) or 0) > self.vocab:
                raise RequestError(f"{name}={getattr(params, name)} exceeds the vocabulary's {self.vocab}", param=name)
        return ids

    def room(self, prompt_tokens: int) -> int:
        """Tokens that can be generated after a prompt: the context's rest, and one more, which is never fed back."""
        return self.context + 1 - prompt_tokens

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        listener: Callable[[], None] | None = None,
    ) -> Request:
        """Queues a prompt (text or token ids). Raises RequestError, or QueueFull."""
        params = params or SamplingParams()
        ids = self.check(prompt, params)
        request = Request(prompt=ids, params=params, listener=listener, ids=list(ids))
        with self._lock:
            if self.max_waiting is not None and len(self.waiting) >= self.max_waiting + self.free_rows:
                raise QueueFull(f"{len(self.waiting)} requests are waiting already")
            self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request at the next step, wherever it is. A finished one stays as it is."""
        request.cancelled = True
        self._sweep = True

    @property
    def free_rows(self) -> int:
        return self.rows - len(self.live)

    @property
    def busy(self) -> bool:
        return bool(self.live or self.waiting)

    # ---- convenience

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[str]:
        """The continuations of some prompts, as texts. Raises RequestError for one that cannot be served."""
        return [request.text for request in self.complete(prompts, params)]

    def complete(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Request]:
        """The same as finished requests. The model computes in evaluation mode and is left in the mode it was in."""
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        requests = [self.submit(p, s) for p, s in zip(prompts, each, strict=True)]
        training = self.model.training
        self.model.eval()
        try:
            while not all(r.finished for r in requests):
                self.step()
        finally:
            self.model.train(training)
        return requests

    # ---- the loop

    def step(self) -> bool:
        """One token for every running request and one chunk of waiting prompts. Returns whether there is more to do."""
        with torch.inference_mode() if self.dedicated else torch.no_grad():
            return self._step()

    def _step(self) -> bool:
        if self._sweep:
            self._remove_cancelled()
        self._admit()
        if self.live:
            self.counts["steps"] += 1
            decoding = [r for r in self.live if r.fed + 1 == len(r.ids) and r.tokens]
            reading = [r for r in self.live if not r.tokens]
            if decoding:
                self._advance([Feed(r.row, r.ids, r.fed, r.fed + 1) for r in decoding], decoding)
            if reading:
                self._read(reading)
            self._release()
        return self.busy

    def _remove_cancelled(self) -> None:
        self._sweep = False
        with self._lock:
            gone = [r for r in self.waiting if r.cancelled]
            self.waiting = deque(r for r in self.waiting if not r.cancelled)
        for request in [*gone, *(r for r in self.live if r.cancelled)]:
            self._finish(request, "cancelled")
        self._release()
        self._tell(gone)

    def _admit(self) -> None:
        while self.free_rows:
            with self._lock:
                if not self.waiting:
                    return
                request = self.waiting.popleft()
            if self._backend is None:
                self._backend = backend_for(self.model, self.rows, self.use_cache)
            request.row = len(self.live)
            self.live.append(request)
            self._backend.begin(request.row)
            near = self.directions() if request.params.cosine_penalty else None
            request.sampler = Sampler(request.params, request.prompt, self.choosable, self.device, near)
            if self.token_bytes is not None:
                request.detokenizer = detokenizer(self.token_bytes, request.prompt)
            request.stops = StopStrings(request.params.stop)

    def directions(self) -> Tensor:
        """[V, D]: the model's embeddings in float32, each scaled to length 1."""
        if self._directions is None or not self.dedicated:  # in training they move
            rows = self.model.get_input_embeddings().weight.detach().float()
            self._directions = torch.nn.functional.normalize(rows, dim=-1)
        return self._directions

    def _read(self, reading: list[Request]) -> None:
        """One chunk of prompts: the oldest first, with others beside it as far as the padded batch fits the chunk."""
        width = min(self.chunk, len(reading[0].ids) - reading[0].fed)
        some = reading[: max(1, self.chunk // width)]
        feeds = []
        for r in some:
            stop = min(r.fed + width, len(r.ids))
            keep = stop - r.fed if r.params.prompt_logprobs is not None else 1
            feeds.append(Feed(r.row, r.ids, r.fed, stop, keep))
        self._advance(feeds, some)

    def _advance(self, feeds: list[Feed], requests: list[Request]) -> None:
        """Feeds the model, and chooses the next token where a prompt is read to its end."""
        logits = self._backend.logits(feeds)  # [sum of keep, V]
        ends, at = [], 0
        for feed, r in zip(feeds, requests, strict=True):
            if not r.tokens:
                self.counts["prompt_tokens"] += feed.stop - feed.start
                if r.params.prompt_logprobs is not None:
                    self._note_prompt(r, feed, logits[at : at + feed.keep])
            at += feed.keep
            r.fed = feed.stop
            ends.append(at - 1)
        ready = [i for i, r in enumerate(requests) if r.fed == len(r.ids)]
        for i in [i for i in ready if requests[i].params.max_tokens == 0]:
            self._finish(requests[i], "length")
            ready.remove(i)
        if not ready:
            return
        if len(ready) < logits.shape[0]:
            logits = logits[torch.tensor([ends[i] for i in ready], device=logits.device)]
        samplers: list[Any] = [requests[i].sampler for i in ready]
        tokens = choose(logits[:, : self.choosable], samplers)
        asked = [k for k, i in enumerate(ready) if requests[i].params.logprobs is not None and tokens[k] is not None]
        if asked:
            rows = logits if len(asked) == len(ready) else logits[torch.tensor(asked, device=logits.device)]
            tops = [requests[ready[k]].params.logprobs or 0 for k in asked]
            for k, entry in zip(asked, logprobs_of(rows, [tokens[k] or 0 for k in asked], tops), strict=True):
                requests[ready[k]].logprobs.append(entry)
        asked = [k for k, i in enumerate(ready) if requests[i].params.draws is not None and tokens[k] is not None]
        if asked:
            some = [requests[ready[k]] for k in asked]
            rows = logits if len(asked) == len(ready) else logits[torch.tensor(asked, device=logits.device)]
            found = draws_of(rows, [tokens[k] or 0 for k in asked], [samplers[k] for k in asked], self.choosable)
            for request, draw in zip(some, found, strict=True):
                request.draws.append(draw)
        for i, token in zip(ready, tokens, strict=True):
            self._accept(requests[i], token)

    def _note_prompt(self, r: Request, feed: Feed, logits: Tensor) -> None:
        """Log-probabilities of the prompt tokens that these logits predict: ids[start+1 .. stop]."""
        if not r.prompt_logprobs:
            r.prompt_logprobs.append(None)  # nothing predicts the first token
        targets = r.ids[feed.start + 1 : feed.stop + 1]
        if targets:
            top = [r.params.prompt_logprobs or 0] * len(targets)
            r.prompt_logprobs.extend(logprobs_of(logits[: len(targets)], targets, top))

    def _accept(self, r: Request, token: int | None) -> None:
        """Takes a chosen token: its text, and whether the request ends with it."""
        if token is None:
            r.error = "the model gave no finite logit"
            return self._finish(r, "error")
        assert r.sampler is not None and r.stops is not None
        r.tokens.append(token)
        r.ids.append(token)
        r.offsets.append(r.length)
        r.sampler.saw(token)
        self.counts["generated_tokens"] += 1
        if (token in self.ends and not r.params.ignore_eos) or token in r.params.stop_token_ids:
            return self._finish(r, "stop")
        if r.detokenizer is not None:
            piece = r.detokenizer.add(token)
            r.length += len(piece)
            released, met = r.stops.add(piece)
            r.text += released
            if met:
                r.cut = True
                return self._finish(r, "stop")
        limit = r.params.max_tokens
        if len(r.tokens) == limit or len(r.ids) > self.context:
            return self._finish(r, "length")
        return None

    def _finish(self, r: Request, reason: str) -> None:
        """Ends a request. Text that is still held back is released, unless its end completes a stop string."""
        if reason in ("stop", "length") and not r.cut and r.detokenizer is not None and r.stops is not None:
            released, r.cut = r.stops.add(r.detokenizer.flush())
            r.text += released if r.cut else released + r.stops.flush()
            reason = "stop" if r.cut else reason
        r.finish_reason = reason
        self.counts["finished"] += 1

    def _release(self) -> None:
        """Frees the rows of finished requests; the last row moves into the gap, so that rows stay neighbours."""
        changed = self.live
        if any(r.finished for r in self.live):
            rest = list(self.live)
            for gap in [i for i, r in enumerate(rest) if r.finished][::-1]:
                last = rest.pop()
                if last.row != gap:
                    self._backend.move(last.row, gap)
                    last.row = gap
                    rest[gap] = last
            self.live = rest
        self._tell(changed)

    @staticmethod
    def _tell(requests: Sequence[Request]) -> None:
        for r in requests:
            if r.listener is not None:
                r.listener()

    def fail(self, message: str) -> None:
        """Ends every request with an error, after a fault of the model or the machine."""
        with self._lock:
            waiting, self.waiting = list(self.waiting), deque()
        live, self.live = self.live, []
        for r in [*waiting, *live]:
            if not r.finished:
                r.error, r.finish_reason = message, "error"
        self._tell([*waiting, *live])


class EngineThread(threading.Thread):
    """Runs an engine for other threads. It sleeps while there is nothing to do.

    A fault in a step ends the requests at hand with an error and is logged; after three in a row `alive` turns False
    and the thread ends, for whoever watches to replace it.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine = engine
        self.engine.model.eval()
        self._wake = threading.Condition()
        self._stopping = False

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        listener: Callable[[], None] | None = None,
    ) -> Request:
        if self._stopping or not self.is_alive():
            raise EngineStopped("the engine has stopped")
        request = self.engine.submit(prompt, params, listener)
        with self._wake:
            self._wake.notify()
        return request

    def cancel(self, request: Request) -> None:
        self.engine.cancel(request)
        with self._wake:
            self._wake.notify()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread after the step at hand; requests still running end with an error."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self.join(timeout_s)

    def run(self) -> None:
        faults = 0
        while faults < 3:
            with self._wake:
                while not self._stopping and not self.engine.busy:
                    self._wake.wait()
            if self._stopping:
                break
            try:
                self.engine.step()
                faults = 0
            except Exception:
                faults += 1
                log.exception("a step of the engine failed (%d in a row)", faults)
                self.engine.fail("the engine failed on this batch; see the server's log")
        self.engine.fail("the server is stopping")


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens after which a text is over: the generation config's, the model config's and the tokenizer's."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found.update(value if isinstance(value, (list, tuple)) else () if value is None else (value,))
    return frozenset(found)
