"""A trained model behind the OpenAI protocol, on Ray Serve.

    python -m serving.app runs/demo port=8000            # http://127.0.0.1:8000, a chat page at /
    python -m serving.app serving/config.yaml            # the same with port, host and replicas from a file
    serve run serving.app:build run=runs/demo            # by Ray's own command

A Ray that is started for this listens on 127.0.0.1 only. `serve run serving/config.yaml` cannot see to that: there Ray
is started, with ports open to the network, before anything of ours is read.

Two deployments: `Gateway` speaks HTTP and knows no torch, `LanguageModel` runs the engine in a thread of its own. A
`Job` goes from one to the other, and batches of `Delta`s come back. Ray Serve's own limits are set out of reach, as
it answers in plain text where clients expect the OpenAI error object: the limits that count are ours (body, prompt,
tokens, sequences, requests, queue).
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from ray.exceptions import TaskCancelledError
from ray.serve import Application
from ray.serve.exceptions import RequestCancelledError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from models.spec import ConfigError
from models.spec import build as build_config
from pipelines.lib.cluster import LOCAL_ENVIRONMENT, ensure_ray
from pipelines.lib.config import InputError, assemble, describe, scalar
from pipelines.lib.jobs import storage_path
from pipelines.lib.run import resolve
from pipelines.lib.tracking import endpoint
from serving.protocol import (
    DONE,
    PLAIN_STOPS,
    ApiError,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Delta,
    Entry,
    Job,
    event,
    parse,
    plain_chat,
    unknown_model,
)

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from serving.engine import Request as EngineRequest
    from serving.engine import TokenLogprob

log = logging.getLogger("ray.serve")

API_KEY = "NOVELLA_API_KEY"
EVENTS_PER_S = 500  # of all streams together: each costs 0.6 ms of CPU on its way through Ray Serve
OUT_OF_REACH = 100_000
HUNG_UP = (ClientDisconnect, TaskCancelledError, RequestCancelledError)
CLOSE_S = 5.0  # MLflow has this long to take the end of the server
DRAIN_S = 20.0  # requests that are open when the server is told to stop have this long to end
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class ServeConfig:
    """What `build` takes, as `key=value` of either command or under `args:` in a Serve config file.

    run: run folder, checkpoint folder or any local Hugging Face folder
    which: the checkpoint of a run: best, last or step_N
    name: the model's name in requests; none: the folder's name
    host: address to listen on; 0.0.0.0 opens the port to the network; in a Serve config file http_options decides
    port: port to listen on; in a Serve config file http_options decides
    device: auto, cpu, cuda, mps or xpu
    dtype: number format of the weights; auto: as they were saved
    threads: CPU threads of a replica; one is fastest for small models
    rows: sequences that are generated together in a replica
    context: tokens that prompt and continuation may have together; none: the model's own limit
    chunk: prompt tokens read between two steps of the sequences that are running
    max_waiting: sequences that may wait for a row of a replica; more are answered with 429
    max_requests: requests that may be open at once; more are answered with 503
    max_sequences: prompts times n of one request
    max_tokens: tokens that one request may ask for
    max_body_bytes: size of a request's body
    api_key: key that clients must send; none: NOVELLA_API_KEY, and if that is not set, no key is asked for
    api_key_file: file that holds the key
    replicas: copies of the model
    num_cpus: CPUs that Ray sets aside for a replica; a small share lets it stand beside other work
    num_gpus: GPUs of a replica; none: 1 if device is cuda
    track: mlflow shows the endpoint below the model it serves, where that is of a tracked run (not from a config file)
    """

    run: str
    which: str = "best"
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = 1
    rows: int = 16
    context: int | None = None
    chunk: int = 512
    max_waiting: int = 256
    max_requests: int = 1024
    max_sequences: int = 256
    max_tokens: int = 4096
    max_body_bytes: int = 4 * 2**20
    api_key: str | None = None
    api_key_file: str | None = None
    replicas: int = 1
    num_cpus: float = 0.2
    num_gpus: float | None = None
    track: Literal["mlflow", "none"] = "mlflow"

    def __post_init__(self) -> None:
        positive = ("threads", "rows", "chunk", "max_requests", "max_sequences", "max_tokens", "replicas")
        for name in (*positive, "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.max_waiting < 0 or self.num_cpus < 0 or (self.num_gpus or 0) < 0:
            raise ConfigError("max_waiting, num_cpus and num_gpus must be 0 or more")
        if not 0 < self.port < 1 << 16:
            raise ConfigError(f"port={self.port} is not in 1..65535")

    def key(self) -> str | None:
        """The API key. Raises ConfigError for a key file that cannot be read or is empty."""
        key = self.api_key or os.environ.get(API_KEY) or None
        if self.api_key_file is not None:
            try:
                key = Path(self.api_key_file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"api_key_file={self.api_key_file}: {error}") from None
            if not key:
                raise ConfigError(f"api_key_file={self.api_key_file} is empty")
        return key


def build(args: dict[str, Any]) -> Application:
    """The application; `serve run serving.app:build run=...` calls it.

    Raises ConfigError or InputError that names the setting, the file and what would do; under the `serve` command this
    is one line and exit code 2.
    """
    command = click.get_current_context(silent=True)
    try:
        config: ServeConfig = build_config(
            ServeConfig, {k: scalar(v) if isinstance(v, str) else v for k, v in args.items()}
        )
        key = config.key()
        # Here, because replicas work in directories of Ray's own, and so that all of them serve the same checkpoint.
        folder = resolve(storage_path(config.run), config.which).absolute()
        if command is not None:
            prepare(command, config, folder)
    except (ConfigError, InputError) as error:
        if command is None:
            raise
        raise Refusal(str(error)) from None
    settings = {
        "run": str(folder),
        "name": config.name or Path(config.run).absolute().name,
        **{k: getattr(config, k) for k in ("device", "dtype", "threads", "rows", "context", "chunk")},
        **{k: getattr(config, k) for k in ("max_waiting", "max_sequences", "max_tokens")},
    }
    num_gpus = config.num_gpus if config.num_gpus is not None else float(config.device.startswith("cuda"))
    # One OpenMP pool per replica: two on two busy cores made a 20 ms step take 320 ms.
    environment = {"OMP_NUM_THREADS": str(config.threads), "TOKENIZERS_PARALLELISM": "false"}
    model = LanguageModel.options(  # type: ignore[attr-defined]
        num_replicas=config.replicas,
        ray_actor_options={
            "num_cpus": config.num_cpus,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": environment},
        },
    ).bind(settings)
    limits = {"max_requests": config.max_requests, "max_body_bytes": config.max_body_bytes}
    return Gateway.bind(model, settings["name"], limits, digest(key) if key else None)  # type: ignore[attr-defined]


class Refusal(click.ClickException):
    """One line on stderr and exit code 2, when the `serve` command calls `build`."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=True)


def prepare(command: click.Context, config: ServeConfig, folder: Path) -> None:
    """Start Ray and Serve as we want them, before `serve run` does; not if the command says where or how.

    folder: the checkpoint that will be served.  Raises InputError for a port that is taken.
    """
    named = ("address", "working_dir", "runtime_env", "runtime_env_json")
    if command.info_name != "run" or any(command.params.get(name) for name in named):
        return
    if "RAY_ADDRESS" not in os.environ and any(name not in os.environ for name in LOCAL_ENVIRONMENT):
        # `serve` has imported ray, which by now has chosen to listen on the network: begin again, told otherwise.
        start_again(sys.orig_argv[1:])
    if ensure_ray():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.host, config.port))
            except OSError as error:
                raise InputError(f"host={config.host} port={config.port}: {error.strerror}; choose others") from None
    serve.start(proxy_location="HeadOnly", http_options={"host": config.host, "port": config.port})
    end_gracefully(str(command.params.get("name") or "default"))
    if config.track != "none":
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "api_key"}
        tracker = endpoint(folder, f"http://{config.host}:{config.port}", settings)
        command.call_on_close(lambda: tracker.close(wait_s=CLOSE_S))


def start_again(words: Sequence[str]) -> NoReturn:
    """Replace this process by Python with these words and with what Ray must find in the environment."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *words], {**LOCAL_ENVIRONMENT, **os.environ})


def end_gracefully(app: str) -> None:
    """Let SIGTERM and Ctrl-C end `serve run` only after the requests that are open; a second one ends it at once.

    `serve run` alone takes the proxy down first, which cuts every stream, and on SIGTERM Ray ends without a word. Ray
    sets its own handler when it starts, so this comes after.
    """

    def stop(*_: Any) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.default_int_handler)
        with contextlib.suppress(Exception):  # not up yet, or already down
            gateway = serve.get_deployment_handle("Gateway", app)
            gateway.drain.remote(DRAIN_S).result(timeout_s=DRAIN_S + 2)
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # not in the main thread: whoever called is in charge of signals
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, stop)


def keep_to_the_node() -> None:
    """Let this replica's own gRPC server, which runs pickled code, listen where its node does and not everywhere.

    Ray 2.60 writes `[::]:0` for it into the code; a deployment is made before that line is reached.
    """
    import ray
    from ray.serve._private import replica

    add_port = getattr(replica, "add_port_to_grpc_server", None)
    if add_port is None:
        log.warning("this version of Ray Serve starts its replicas' gRPC servers otherwise; look with ss -ltn")
        return

    def add_port_of_node(server: Any, address: str) -> int:
        node = ray.util.get_node_ip_address()
        return add_port(server, address.replace("[::]", f"[{node}]" if ":" in node else node))

    if add_port.__name__ != add_port_of_node.__name__:
        replica.add_port_to_grpc_server = add_port_of_node


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


# ---- HTTP

api = FastAPI(title="Novella", docs_url=None, redoc_url=None, openapi_url=None)  # their pages load from elsewhere


@api.exception_handler(ApiError)
async def _answer_error(_: Request, error: ApiError) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
    return JSONResponse(error.body(), error.status, headers.get(error.status))


@api.exception_handler(HTTPException)
async def _answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)


async def _answer_nobody(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the client has hung up; the number is what nginx writes in its log


for _kind in HUNG_UP:
    api.add_exception_handler(_kind, _answer_nobody)


@api.exception_handler(Exception)
async def _answer_fault(_: Request, error: Exception) -> JSONResponse:
    log.error("a request failed", exc_info=error)
    return JSONResponse(ApiError(500, "the server failed on this request; see its log").body(), 500)


class EventStream(StreamingResponse):
    """Server-sent events, and what to do when the stream is over, however it ends, even before it began."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.close = close

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self.close()


@serve.deployment(
    max_ongoing_requests=OUT_OF_REACH,  # the default of 5 makes the sixth stream wait
    ray_actor_options={"num_cpus": 0.1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=DRAIN_S,
)
@serve.ingress(api)
class Gateway:
    """Checks requests, passes them to a model and writes what comes back as the OpenAI protocol has it."""

    def __init__(self, model: "DeploymentHandle", name: str, limits: dict[str, int], key: bytes | None) -> None:
        keep_to_the_node()
        self.model, self.name, self.limits, self.key = model, name, limits, key
        self.streaming = model.options(stream=True)
        self.created = int(time.time())
        self.open, self.draining = 0, False
        folder = Path(__file__).parent / "web"
        self.page = {path: ((folder / file).read_bytes(), kind) for path, (file, kind) in PAGE.items()}

    # ---- routes

    @api.get("/")
    @api.get("/page.css")
    @api.get("/page.js")
    async def show_page(self, request: Request) -> Response:
        content, kind = self.page[request.url.path]
        return Response(content, media_type=kind, headers=PAGE_HEADERS)

    @api.get("/health")
    async def health(self) -> JSONResponse:
        """200 while the model answers; what it is doing. Needs no key, as load balancers have none."""
        try:
            state = await asyncio.wait_for(self.model.state.remote(), 5)
        except Exception as error:
            raise ApiError(503, f"the model does not answer ({type(error).__name__})", code="unavailable") from None
        return JSONResponse({"status": "ok", "model": self.name, "open_requests": self.open, **state})

    @api.get("/v1/models")
    async def models(self, request: Request) -> dict[str, Any]:
        self._authorise(request)
        return {"object": "list", "data": [await self._card()]}

    @api.get("/v1/models/{name:path}")
    async def one_model(self, name: str, request: Request) -> dict[str, Any]:
        self._authorise(request)
        if name != self.name:
            raise unknown_model(name, self.name)
        return await self._card()

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._generate(request, CompletionRequest, Completion)

    @api.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, ChatRequest, ChatCompletion)

    # ---- the work

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests and waits for those that are open. Returns how many still are."""
        self.draining = True
        end = time.monotonic() + timeout_s
        while self.open and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return self.open

    async def _card(self) -> dict[str, Any]:
        state = await self.model.state.remote()
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "novella"}
        return card | {"max_model_len": state["context"]}

    def _authorise(self, request: Request) -> None:
        if self.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest(given.strip()), self.key):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        """The body, of which never more than the limit is held."""
        # A page of another site can post text without being asked first, JSON it cannot.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "Content-Type: application/json is needed")
        limit = self.limits["max_body_bytes"]
        too_large = ApiError(413, f"the body exceeds {limit} bytes", code="request_too_large")
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise too_large
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_large
        return bytes(body)

    async def _generate(
        self, http: Request, kind: type[CompletionRequest] | type[ChatRequest], answer_kind: type[Completion]
    ) -> Response:
        self._authorise(http)
        request: CompletionRequest | ChatRequest = parse(kind, await self._body(http))
        if request.model != self.name:
            raise unknown_model(request.model, self.name)
        if self.draining:
            raise ApiError(503, "the server is stopping", code="unavailable")
        if self.open >= self.limits["max_requests"]:
            raise ApiError(503, f"{self.open} requests are open; try again later", code="overloaded")
        self.open += 1
        batches = self.streaming.generate.remote(request.job())
        handed_over = False
        try:
            # The first message comes before any text: a request that cannot be served is an error, not a stream.
            header = await self._next(batches)
            assert header is not None
            answer = answer_kind(request)
            if request.stream:
                handed_over = True
                return EventStream(self._events(answer, batches, header), lambda: self._close(batches))
            deltas: list[Delta] = []
            while (batch := await self._next(batches)) is not None:
                deltas += batch["deltas"]
            return JSONResponse(answer.answer(deltas, header["prompt_tokens"]))
        finally:
            if not handed_over:
                self._close(batches)

    async def _events(self, answer: Completion, batches: Any, header: dict[str, Any]) -> AsyncIterator[bytes]:
        counts: dict[int, int] = {}
        try:
            for tree in answer.first(header["choices"]):
                yield event(tree)
            while (batch := await self._next(batches)) is not None:
                counts.update({d["index"]: d["tokens"] for d in batch["deltas"]})
                yield b"".join(event(answer.part([d])) for d in batch["deltas"])  # clients expect one choice a chunk
            for tree in answer.last(header["prompt_tokens"], sum(counts.values())):
                yield event(tree)
            yield DONE
        except ApiError as error:  # too late for a status
            yield event(error.body())
        except HUNG_UP:
            return
        except Exception as error:
            log.error("a stream failed", exc_info=error)
            yield event(ApiError(500, "the server failed on this request; see its log").body())

    def _close(self, batches: Any) -> None:
        """The end of a request, whatever the end is. A client that hung up leaves a generation to be stopped."""
        self.open -= 1
        batches.cancel()

    @staticmethod
    async def _next(batches: Any) -> dict[str, Any] | None:
        """The model's next message; None after the last. Raises ApiError for one that is an error."""
        try:
            message = await anext(batches)
        except StopAsyncIteration:
            return None
        if "error" in message:
            raise ApiError(**message["error"])
        return message


# ---- the model


@serve.deployment(
    max_ongoing_requests=OUT_OF_REACH,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=DRAIN_S,
    health_check_period_s=5,
)
class LanguageModel:
    """One copy of the model and its engine, which runs in a thread of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import copy
        from concurrent.futures import ThreadPoolExecutor

        import torch

        from pipelines.sample import open_model
        from serving.engine import Engine, EngineThread

        keep_to_the_node()
        torch.set_num_threads(settings["threads"])
        sys.setswitchinterval(0.001)  # the event loop waits this long at most for the engine's thread to yield
        self.settings = settings
        model, tokenizer, folder = open_model(settings["run"], "best", settings["device"], settings["dtype"])
        options = {k: settings[k] for k in ("rows", "context", "chunk", "max_waiting")}
        self.engine = Engine(model, tokenizer, dedicated=True, **options)
        self.thread = EngineThread(self.engine)
        self.thread.start()
        # Prompts are encoded beside the event loop, and by a copy: the engine's thread uses the other for decoding, and
        # a Rust tokenizer refuses to be changed (truncation settings) while it is in use.
        self.encoder = copy.deepcopy(tokenizer)
        self.encoding = ThreadPoolExecutor(1, "encode")
        log.info("serving %s as %r on %s", folder, settings["name"], self.engine.device)

    def __del__(self) -> None:
        if hasattr(self, "thread"):
            self.thread.stop()

    def check_health(self) -> None:
        if not self.thread.is_alive():
            raise RuntimeError("the engine's thread has ended")

    async def state(self) -> dict[str, Any]:
        self.check_health()
        engine = self.engine
        return {
            "context": engine.context,
            "running": len(engine.live),
            "waiting": len(engine.waiting),
            **engine.counts,
        }

    async def generate(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """First {"prompt_tokens", "choices"} or {"error": arguments of ApiError}, then {"deltas"} until all have ended.

        Several tokens go into one message when many streams are open, so that their number stays what Serve can carry.
        """
        loop, news = asyncio.get_running_loop(), News()
        requests: list[EngineRequest] = []
        try:
            try:
                prompts = await loop.run_in_executor(self.encoding, self._prompts, job)
                requests = self._submit(job, prompts, news.tell)
            except ApiError as error:
                yield self._error(error)
                return
            yield {"prompt_tokens": sum(map(len, prompts)), "choices": len(requests)}
            streams = [Stream(self, i, r, job, prompts) for i, r in enumerate(requests)]
            sent = 0.0
            while True:
                if job["stream"]:
                    pause = sent + len(self.engine.live) / EVENTS_PER_S - time.monotonic()
                    if pause > 0.001:
                        await asyncio.sleep(pause)
                await news.wait()
                if job["stream"]:
                    sent = time.monotonic()
                elif not all(r.finished for r in requests):
                    continue
                ended = all(r.finished for r in requests)  # looked at before the texts, which are complete by then
                deltas = [d for s in streams if (d := s.delta()) is not None]
                failed = next((r for r in requests if r.finish_reason in ("error", "cancelled")), None)
                if failed is not None:
                    yield self._error(ApiError(500, failed.error or "the generation was cancelled"))
                    return
                if deltas:
                    yield {"deltas": deltas}
                if ended:
                    return
        finally:  # also when the client has hung up
            for request in requests:
                if not request.finished:
                    self.thread.cancel(request)

    @staticmethod
    def _error(error: ApiError) -> dict[str, Any]:
        names = ("status", "message", "param", "code", "type")
        return {"error": {name: getattr(error, name) for name in names}}

    def _prompts(self, job: Job) -> list[list[int]]:
        """Token ids of every prompt. Raises ApiError (400)."""
        from serving.engine import RequestError, SamplingParams

        try:
            if job["messages"] is None:
                texts: list[Any] = job["prompts"] or []
            else:
                texts = [self._conversation(job)]
            params = SamplingParams(**job["params"])
            prompts = [self.engine.check(t, params, self.encoder) for t in texts]
        except RequestError as error:
            param = "messages" if error.param == "prompt" and job["messages"] is not None else error.param
            raise ApiError(400, str(error), param, error.code or "invalid_value") from None
        wanted, most = params.max_tokens, self.settings["max_tokens"]
        if wanted is not None and wanted > most:
            raise ApiError(400, f"max_tokens={wanted} exceeds this server's limit of {most}", "max_tokens", "too_large")
        what, param = ("prompt", "prompt") if job["messages"] is None else ("conversation", "messages")
        for ids in prompts:
            room = self.engine.room(len(ids))
            if wanted is not None and wanted > room:
                raise ApiError(
                    400,
                    f"the {what} has {len(ids)} tokens and max_tokens is {wanted}, but this model's context is "
                    f"{self.engine.context}; ask for at most {room} tokens or shorten the {what}",
                    param,
                    "context_length_exceeded",
                )
        return prompts

    def _conversation(self, job: Job) -> str | list[int]:
        """A conversation as the tokenizer's template has it, or as `plain_chat`, whose stop strings are then added."""
        from serving.engine import ids_of

        messages = job["messages"]
        assert messages is not None
        if not getattr(self.encoder, "chat_template", None):
            job["params"]["stop"] = (*job["params"]["stop"], *PLAIN_STOPS)
            return plain_chat(messages)
        try:
            text = self.encoder.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template raises what it likes about, say, the order of roles
            raise ApiError(400, f"the chat template refuses these messages: {error}", "messages") from None
        return ids_of(self.encoder, text, add_special_tokens=False)

    def _submit(self, job: Job, prompts: list[list[int]], listener: Any) -> "list[EngineRequest]":
        """All sequences of a job, or none. Raises ApiError (400, 429, 503)."""
        from serving.engine import EngineStopped, QueueFull, SamplingParams, seed_of_sample

        n = job["n"]
        if len(prompts) * n > self.settings["max_sequences"]:
            most = self.settings["max_sequences"]
            raise ApiError(400, f"{len(prompts)} prompts times n={n} exceed {most} sequences", "n", "too_large")
        options = dict(job["params"])
        if options["max_tokens"] is None:
            options["max_tokens"] = self.settings["max_tokens"]
        seed, submitted = options.pop("seed"), []
        try:
            for ids in prompts:
                for k in range(n):
                    params = SamplingParams(seed=seed_of_sample(seed, k), **options)
                    submitted.append(self.thread.submit(ids, params, listener))
        except (QueueFull, EngineStopped) as error:
            for request in submitted:
                self.thread.cancel(request)
            if isinstance(error, QueueFull):
                raise ApiError(429, f"{error}; try again later", code="rate_limit_exceeded") from None
            raise ApiError(503, str(error), code="unavailable") from None
        return submitted


class News:
    """Wakes a coroutine from the engine's thread; all that comes while it is busy costs one wake-up."""

    def __init__(self) -> None:
        self.loop, self.event, self.told = asyncio.get_running_loop(), asyncio.Event(), False

    def tell(self) -> None:
        if not self.told:
            self.told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self.loop.call_soon_threadsafe(self.event.set)

    async def wait(self) -> None:
        """Returns when there was news since the last time."""
        await self.event.wait()
        self.event.clear()
        self.told = False  # before the caller looks, so that nothing is missed


class Stream:
    """How much of one sequence was sent."""

    def __init__(self, model: "LanguageModel", index: int, request: "EngineRequest", job: Job, prompts: Any) -> None:
        self.model, self.index, self.request = model, index, request
        self.echo, self.text = job["echo"], job["prompts"][index // job["n"]] if job["prompts"] else ""
        self.wants_table = request.params.logprobs is not None
        self.characters = self.tokens = self.shift = 0
        self.ended = False
        # `plain_chat` ends in "Assistant:", so the answer begins with the space before its first word.
        self.strips = job["messages"] is not None and not getattr(model.encoder, "chat_template", None)

    def delta(self) -> Delta | None:
        """What is new; None if nothing is."""
        r = self.request
        if self.ended or (self.echo and not (r.tokens or r.finished)):
            return None
        finish = r.finish_reason  # before the text: once it is set, the text is complete
        text, upto = r.text, r.shown_tokens() if self.wants_table else 0
        new, self.characters = text[self.characters :], len(text)
        entries: list[Entry] = []
        if self.strips:
            new = new.lstrip()
            self.strips = not new
        if self.echo:
            self.echo = False
            before, entries = self._prompt()
            new, self.shift = before + new, len(before)
        if self.wants_table:
            for i in range(self.tokens, upto):
                entries.append(self._entry(r.logprobs[i], r.tokens[i], r.offsets[i] + self.shift))
            self.tokens = max(self.tokens, upto)
        self.ended = finish is not None
        if not (new or entries or self.ended):
            return None
        return Delta(index=self.index, text=new, entries=entries, finish=finish, tokens=len(r.tokens))

    def _prompt(self) -> tuple[str, list[Entry]]:
        """The prompt's text and table."""
        from serving.text import detokenizer

        r = self.request
        assert self.model.engine.token_bytes is not None
        text_of, at, entries = detokenizer(self.model.engine.token_bytes), 0, []
        pieces = []
        for i, token in enumerate(r.prompt):
            if self.wants_table:
                entries.append(self._entry(r.prompt_logprobs[i], token, at))
            pieces.append(text_of.add(token))
            at += len(pieces[-1])
        return self.text if isinstance(self.text, str) else "".join(pieces), entries

    def _entry(self, found: "TokenLogprob | None", token: int, offset: int) -> Entry:
        names = self.model.engine.token_bytes
        assert names is not None
        top = [(names.name(t), list(names.of(t)), lp) for t, lp in (found.top if found else ())]
        return Entry(
            token=names.name(token),
            bytes=list(names.of(token)),
            logprob=found.logprob if found else None,
            top=top,
            offset=offset,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """`serve run` with an environment in which Ray listens on this machine only; --help shows the settings."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        print("settings and defaults:")
        print("\n".join(describe(ServeConfig, positional="run")))
        return 0
    try:
        if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
            if not Path(words[0]).is_file():
                raise InputError(f"{words[0]}: no such file; a Serve config file is needed, as serving/config.yaml")
            # Else `serve` joins a cluster of someone else on this machine, or waits for one that is gone.
            rest = [*words, *([] if "RAY_ADDRESS" in os.environ else ["--address", "local"])]
        else:
            config = assemble(words, ServeConfig, positional="run")
            resolve(storage_path(config.run), config.which)  # here, as Ray takes seconds to import
            given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
            chosen = {f.name: given[f.name] for f in dataclasses.fields(config) if given[f.name] != f.default}
            rest = ["serving.app:build", *(f"{name}={value}" for name, value in chosen.items())]
    except (ConfigError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start_again(["-m", "ray.serve.scripts", "run", *rest])


if __name__ == "__main__":
    raise SystemExit(main())
