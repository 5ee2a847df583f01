"""The OpenAI protocol: what clients may send, what they get, and the error object. Knows no model and no web server.

Two request types become one `Job` for the engine; what comes back from it (`Delta`s of choices) becomes completions,
chat completions, or chunks of either. A parameter that would change the result but is not supported is refused by name;
those without any effect on the text (user, metadata, ...) are taken and ignored.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypedDict, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from models.spec import near


class ApiError(Exception):
    """An answer that is an error: HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        kinds = {429: "requests", 401: "authentication_error"}
        self.type = type or kinds.get(status, "invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def unknown_model(name: str, known: str) -> ApiError:
    return ApiError(404, f"the model {name!r} does not exist{near(name, [known])}", "model", "model_not_found")


# ---- what passes between the app and the engine's replica: plain data


class Job(TypedDict):
    """One request for the engine. Exactly one of prompts and messages is given."""

    prompts: list[str | list[int]] | None
    messages: list[dict[str, str]] | None
    params: dict[str, Any]  # fields of SamplingParams
    n: int
    echo: bool
    stream: bool


class Entry(TypedDict):
    """A token in a table of log-probabilities. offset: where it begins in the choice's text."""

    token: str
    bytes: list[int]
    logprob: float | None
    top: list[tuple[str, list[int], float]]
    offset: int


class Delta(TypedDict):
    """What is new of one choice. finish is None until its last delta."""

    index: int
    text: str
    entries: list[Entry]
    finish: str | None
    tokens: int  # generated so far


# ---- requests


def _one_or_many(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else value


MAX_STOPS, MAX_STOP_LENGTH = 16, 256
Stop = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)], ...],
    BeforeValidator(_one_or_many),
    Field(max_length=MAX_STOPS),
]


def _prompt(value: Any) -> Any:
    """The four forms of a prompt, with one sentence for everything else (a union of types gives one for each)."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        kinds = {type(item) for item in value}
        if kinds in ({int}, {str}):
            return value
        if kinds == {list} and all({type(token) for token in item} == {int} for item in value):
            return value
    raise ValueError("must be a text, a list of texts, token ids, or a list of lists of token ids; none of them empty")


Prompt = Annotated[Any, BeforeValidator(_prompt)]
PRIMITIVES = (str, int, float, bool, type(None))


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # taken and ignored: nothing is obfuscated


class Request(BaseModel):
    """What both kinds of completion have in common."""

    model_config = ConfigDict(extra="forbid", strict=False)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: Stop = ()
    seed: int | None = None

    # Beyond OpenAI, under the names that other servers use.
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    stop_token_ids: Annotated[list[int], Field(max_length=64)] = []
    ignore_eos: bool = False

    # Without effect on the text: taken and ignored.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: allowed only together with stream=true")
        return self

    def sampling(self) -> dict[str, Any]:
        """Fields of SamplingParams. A null means the default, as with OpenAI."""
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": self.logit_bias or {},
            "stop": self.stop,
            "stop_token_ids": tuple(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "seed": self.seed,
        }


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: Prompt = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        if self.suffix:
            raise ValueError("suffix: not supported; this server continues text at its end only")
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of: only best_of = n is supported (n={self.n}); ask for n choices and choose")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 makes sense with echo=true only")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)

    def job(self) -> Job:
        params = self.sampling() | {"max_tokens": self.max_tokens, "logprobs": self.logprobs}
        if self.echo:
            params["prompt_logprobs"] = self.logprobs
        return Job(prompts=self.prompts, messages=None, params=params, n=self.n, echo=self.echo, stream=self.stream)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None  # taken and ignored

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _supported(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs=true")
        return self

    def job(self) -> Job:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        params = self.sampling() | {
            "max_tokens": limit,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }
        messages = [m.plain() for m in self.messages]
        return Job(prompts=None, messages=messages, params=params, n=self.n, echo=False, stream=self.stream)


UNSUPPORTED = {"tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "audio", "modalities"}
UNSUPPORTED |= {"prediction", "reasoning_effort", "verbosity", "web_search_options"}
R = TypeVar("R", bound=Request)


def parse(kind: type[R], body: bytes) -> R:
    """A request from its JSON. Raises ApiError (400) that names the parameter at fault."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ApiError(400, "the body must be a JSON object")
    if re.search(rb"\\u[dD][89a-fA-F]", body):  # half of a surrogate pair is JSON, but no text
        try:
            json.dumps(tree, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ApiError(400, "the body holds half of a surrogate pair, which is no character") from None
    for name in UNSUPPORTED & tree.keys():
        if tree[name] is not None:
            raise ApiError(400, f"{name} is not supported by this server", name, "unsupported_parameter")
        del tree[name]
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _explain(kind, error) from None


def _explain(kind: type[BaseModel], error: ValidationError) -> ApiError:
    """The first fault in one sentence. A union reports one fault per member; the deepest says most."""
    faults = error.errors(include_url=False, include_input=True)
    first = str(faults[0]["loc"][0]) if faults[0]["loc"] else None
    fault = max((f for f in faults if not first or f["loc"][:1] == (first,)), key=lambda f: len(f["loc"]))
    if not fault["loc"]:  # a rule about several parameters: "name: what is wrong"
        message = fault["msg"].removeprefix("Value error, ")
        name = message.split(":")[0]
        return ApiError(400, message, name if name in kind.model_fields else None, "invalid_value")
    where = ".".join(str(p) for p in fault["loc"] if "[" not in str(p))  # without the names of a union's members
    if fault["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter {where!r}{near(where, kind.model_fields)}", where, "unknown_parameter")
    if fault["type"] == "missing":
        return ApiError(400, f"the parameter {where!r} is required", where, "missing_required_parameter")
    given = fault["input"]
    shown = f", got {str(given)[:60]!r}" if isinstance(given, PRIMITIVES) else ""
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return ApiError(400, f"{where}: {message}{shown}", first, "invalid_value")


# ---- answers


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def completion_logprobs(entries: Sequence[Entry]) -> dict[str, list[Any]]:
    """The table of /v1/completions. The most likely tokens come with the token itself, as OpenAI does it."""
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        if entry["logprob"] is None:  # the first token of a prompt
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for name, _, logprob in entry["top"]:
            top.setdefault(name, logprob)  # two tokens may read alike; the likelier one stays
        top.setdefault(entry["token"], entry["logprob"])
        tops.append(top)
    return {
        "tokens": [e["token"] for e in entries],
        "token_logprobs": [e["logprob"] for e in entries],
        "top_logprobs": tops,
        "text_offset": [e["offset"] for e in entries],
    }


def chat_logprobs(entries: Sequence[Entry]) -> dict[str, Any]:
    """The table of /v1/chat/completions."""
    return {
        "content": [
            {
                "token": e["token"],
                "logprob": e["logprob"],
                "bytes": e["bytes"],
                "top_logprobs": [{"token": t, "logprob": lp, "bytes": raw} for t, raw, lp in e["top"]],
            }
            for e in entries
        ],
        "refusal": None,
    }


class Completion:
    """Builds the answers of one /v1/completions request."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, request: Request) -> None:
        self.model, self.with_logprobs = request.model, self._asks_logprobs(request)
        self.include_usage = bool(request.stream_options and request.stream_options.include_usage)
        self.id, self.created = new_id(self.prefix), int(time.time())

    @staticmethod
    def _asks_logprobs(request: Any) -> bool:
        return request.logprobs is not None

    def answer(self, deltas: Iterable[Delta], prompt_tokens: int) -> dict[str, Any]:
        """The whole answer from all deltas."""
        merged: dict[int, Delta] = {}
        for d in deltas:
            old = merged.get(d["index"])
            merged[d["index"]] = (
                {**d, "text": old["text"] + d["text"], "entries": [*old["entries"], *d["entries"]]} if old else d
            )
        choices = [self._whole_choice(merged[i]) for i in sorted(merged)]
        count = usage(prompt_tokens, sum(d["tokens"] for d in merged.values()))
        return self._frame(self.whole, choices) | {"usage": count}

    def first(self, choices: int) -> list[dict[str, Any]]:
        """Chunks that open a stream."""
        return []

    def part(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """A chunk of a stream."""
        frame = self._frame(self.chunk, [self._choice(d) for d in deltas])
        return frame | {"usage": None} if self.include_usage else frame

    def last(self, prompt_tokens: int, completion_tokens: int) -> list[dict[str, Any]]:
        """Chunks that close a stream."""
        if not self.include_usage:
            return []
        return [self._frame(self.chunk, []) | {"usage": usage(prompt_tokens, completion_tokens)}]

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _choice(self, d: Delta) -> dict[str, Any]:
        table = completion_logprobs(d["entries"]) if self.with_logprobs else None
        return {"index": d["index"], "text": d["text"], "logprobs": table, "finish_reason": d["finish"]}

    def _whole_choice(self, d: Delta) -> dict[str, Any]:
        return self._choice(d)


class ChatCompletion(Completion):
    """Builds the answers of one /v1/chat/completions request."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @staticmethod
    def _asks_logprobs(request: Any) -> bool:
        return bool(request.logprobs)

    def first(self, choices: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        opened = [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(choices)]
        frame = self._frame(self.chunk, opened)
        return [frame | {"usage": None} if self.include_usage else frame]

    def _choice(self, d: Delta) -> dict[str, Any]:
        table = chat_logprobs(d["entries"]) if self.with_logprobs else None
        delta = {"content": d["text"]} if d["text"] or not d["finish"] else {}
        return {"index": d["index"], "delta": delta, "logprobs": table, "finish_reason": d["finish"]}

    def _whole_choice(self, d: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": d["text"], "refusal": None}
        table = chat_logprobs(d["entries"]) if self.with_logprobs else None
        return {"index": d["index"], "message": message, "logprobs": table, "finish_reason": d["finish"]}


def event(tree: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    data = tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
    return f"data: {data}\n\n".encode()


DONE = event("[DONE]")

PLAIN_STOPS = ("\nUser:", "\nSystem:")


def plain_chat(messages: Sequence[dict[str, str]]) -> str:
    """How a conversation is written for a tokenizer without a chat template; the answer ends at PLAIN_STOPS.

    >>> plain_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    'Be brief.\\n\\nUser: Hello\\nAssistant:'
    """
    lines = [m["content"] + "\n" if m["role"] == "system" else f"{m['role'].title()}: {m['content']}" for m in messages]
    return "\n".join([*lines, "Assistant:"])
