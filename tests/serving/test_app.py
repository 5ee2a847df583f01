"""The endpoint through the openai client, plain HTTP and lm-eval. One Serve instance for all tests of this file."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
import httpx
import openai
import psutil
import pytest

from models.families import load
from models.spec import ConfigError
from pipelines.lib.config import InputError
from pipelines.lib.vocab import chars_tokenizer
from serving import app
from serving.app import LanguageModel, ServeConfig, build
from serving.engine import Engine, SamplingParams
from serving.protocol import ChatRequest, CompletionRequest, parse
from tests.serving.tiny import byte_level_tokenizer, gpt

KEY = "a secret"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
LONG = {"temperature": 0, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}  # takes many seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "tiny"
    model = gpt(seq_len=8192, d_model=128, n_layers=8, init_std=0.1)
    model.save_pretrained(path)
    byte_level_tokenizer(chat_template=TEMPLATE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(ray_session, folder):
    from ray import serve

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = {"run": str(folder), "api_key": KEY, "rows": "4", "max_waiting": "8", "max_body_bytes": "100000"}
    serve.run(build(args), name="novella")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def engine(folder):
    return Engine(load(folder), byte_level_tokenizer())


def post(server, path="/v1/completions", **options):
    options.setdefault("headers", {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"})
    return httpx.post(server + path, timeout=60, **options)


def state(server):
    return httpx.get(f"{server}/health", timeout=10).json()


def wait_until(condition, timeout_s):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def is_idle(server):
    now = state(server)
    return now["running"] == now["waiting"] == 0


# ---- where it listens


def test_replicas_listen_where_their_node_does_only(server, client):
    """Ray's own code for their gRPC servers says [::]:0. (Its other ports follow the environment, see below.)"""
    import ray

    client.models.list()
    node = ray.util.get_node_ip_address()
    replicas = [p for p in psutil.Process().children(recursive=True) if "ServeReplica" in "".join(p.cmdline())]
    assert len(replicas) == 2
    for replica in replicas:
        ports = [c.laddr.ip for c in replica.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        addresses = {ip.removeprefix("::ffff:") for ip in ports}
        assert node in addresses and (addresses == {node} or node != "127.0.0.1")


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        (["{run}"], ["serving.app:build", "run={run}"]),
        (["run={run}", "port=9000", "rows=2"], ["serving.app:build", "run={run}", "port=9000", "rows=2"]),
        (["{config}"], ["{config}", "--address", "local"]),
    ],
)
def test_the_command_is_serve_run_with_an_environment_that_keeps_ray_on_this_machine(folder, words, runs, monkeypatch):
    began = []

    def execve(program, argv, environment):
        began.append((argv[1:], environment))
        raise SystemExit

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    names = {"run": folder, "config": Path(app.__file__).with_name("config.yaml")}
    with pytest.raises(SystemExit):
        app.main([w.format(**names) for w in words])
    ((words, environment),) = began
    assert words == ["-m", "ray.serve.scripts", "run", *(w.format(**names) for w in runs)]
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["no.yaml"], "no.yaml: no such file"),
        (["{run}", "port=0"], "port=0 is not in"),
        (["{run}", "prot=1"], "did you mean 'port'?"),
    ],
)
def test_the_command_answers_bad_input_in_one_line(folder, words, says, capsys):
    assert app.main([w.format(run=folder) for w in words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and says in line


@pytest.mark.parametrize("track", ["mlflow", "none"])
def test_the_command_shows_its_endpoint_in_mlflow_until_it_ends_and_tells_no_key(folder, track, monkeypatch):
    began, ended = [], []

    class Record:
        def close(self, **options):
            ended.append(options)

    monkeypatch.setattr(app, "endpoint", lambda *what: began.append(what) or Record())
    monkeypatch.setattr(app, "ensure_ray", lambda: False)
    monkeypatch.setattr(app.serve, "start", lambda **options: None)
    monkeypatch.setattr(app, "end_gracefully", lambda name: None)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with click.Context(click.Command("run"), info_name="run"):
        build({"run": str(folder), "port": "8123", "api_key": KEY, "track": track})
        assert not ended
    if track == "none":
        assert not began and not ended
        return
    ((checkpoint, url, settings),) = began
    assert checkpoint == folder and url == "http://127.0.0.1:8123" and settings["port"] == 8123
    assert KEY not in str(settings) and len(ended) == 1


# ---- what clients get


def test_models_are_listed(client, server):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model") and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


@pytest.mark.parametrize("as_ids", [False, True])
def test_completions_equal_the_engines_streamed_and_not(client, engine, as_ids):
    texts = ["the cat", "Once upon a time"]
    prompts = [engine.encode(t) for t in texts] if as_ids else texts
    wanted = engine.complete(texts, SamplingParams(temperature=0, max_tokens=24))
    got = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=24)
    assert [c.text for c in got.choices] == [r.text for r in wanted]
    assert [c.finish_reason for c in got.choices] == [r.finish_reason for r in wanted]
    assert got.usage.prompt_tokens == sum(len(r.prompt) for r in wanted)
    assert got.usage.completion_tokens == sum(len(r.tokens) for r in wanted)
    streamed, usage, chunks = ["", ""], None, 0
    options = {"include_usage": True}
    for chunk in client.completions.create(
        model="tiny", prompt=prompts, temperature=0, max_tokens=24, stream=True, stream_options=options
    ):
        chunks += 1
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [c.text for c in got.choices] and usage == got.usage and chunks > 4


def test_seeds_repeat_and_n_choices_differ(client):
    def ask(**more):
        got = client.completions.create(model="tiny", prompt="the", max_tokens=12, temperature=1.5, **more)
        return [c.text for c in got.choices]

    three = ask(n=3, seed=1)
    assert len(set(three)) == 3 and ask(n=3, seed=1) == three and ask(seed=1) == three[:1] and ask(seed=2) != three[:1]


def test_stop_strings_across_tokens_and_chunks(client, engine):
    whole = engine.generate(["the cat"], SamplingParams(temperature=0, max_tokens=40))[0]
    stop = whole[9:13]
    wanted = whole[: whole.index(stop)]
    options = {"model": "tiny", "prompt": "the cat", "temperature": 0, "max_tokens": 40, "stop": [stop, "never"]}
    got = client.completions.create(**options).choices[0]
    assert (got.text, got.finish_reason) == (wanted, "stop")
    streamed = [c.choices[0] for c in client.completions.create(**options, stream=True)]
    assert "".join(c.text for c in streamed) == wanted and streamed[-1].finish_reason == "stop"


def test_echo_and_logprobs(client, engine):
    ids = engine.encode("the cat sat")
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=3, prompt_logprobs=3)
    (wanted,) = engine.complete([ids], params)
    for prompt in ("the cat sat", ids):
        for stream in (False, True):
            got = client.completions.create(
                model="tiny", prompt=prompt, temperature=0, max_tokens=2, logprobs=3, echo=True, stream=stream
            )
            choices = [c.choices[0] for c in got] if stream else [got.choices[0]]
            assert "".join(c.text for c in choices) == "the cat sat" + wanted.text
            numbers = [lp for c in choices for lp in c.logprobs.token_logprobs]
            tops = [t for c in choices for t in c.logprobs.top_logprobs]
            assert numbers[0] is None and tops[0] is None and len(numbers) == len(ids) + 2
            exact = [e.logprob for e in (*wanted.prompt_logprobs[1:], *wanted.logprobs)]
            assert numbers[1:] == pytest.approx(exact, abs=1e-5)
            assert [max(t.values()) for t in tops[1:]] == pytest.approx(
                [e.top[0][1] for e in (*wanted.prompt_logprobs[1:], *wanted.logprobs)], abs=1e-5
            )
            assert all(max(t.values()) == lp for t, lp in zip(tops[-2:], numbers[-2:], strict=True))
            offsets = [o for c in choices for o in c.logprobs.text_offset]
            assert offsets[: len(ids)] == [len(engine.tokenizer.decode(ids[:i])) for i in range(len(ids))]
    scored = client.completions.create(model="tiny", prompt=ids, max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].text == "the cat sat" and scored.usage.completion_tokens == 0


def test_chat_uses_the_tokenizers_template_streamed_and_not(client, engine):
    messages = [{"role": "system", "content": "Purr."}, {"role": "user", "content": "the cat?"}]
    text = "system: Purr.\nuser: the cat?\nassistant:"
    (wanted,) = engine.complete([text], SamplingParams(temperature=0, max_tokens=16))
    options = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 16}
    got = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert got.choices[0].message.content == wanted.text and got.usage.prompt_tokens == len(wanted.prompt)
    table = got.choices[0].logprobs.content
    assert len(table) == 16 and all(t.logprob == t.top_logprobs[0].logprob for t in table)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == got.usage
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == wanted.text
    assert chunks[-2].choices[0].finish_reason == "length"


def test_many_streams_at_once_get_what_they_would_get_alone(client, engine):
    prompts = [
        f"{word} cat" for word in ("the", "a", "grey", "sat", "hello", "tiny", "on", "model", "x", "y", "z", "0")
    ]
    wanted = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=30))

    def ask(prompt):
        stream = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=30, stream=True)
        return "".join(c.choices[0].text for c in stream)

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == wanted


# ---- what is refused


def test_a_prompt_that_is_too_long_is_a_400_before_the_stream(client):
    for more in ({"prompt": "cat " * 9000}, {"prompt": [5] * 8193}, {"prompt": "the", "max_tokens": 4097}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", stream=True, **more)
        assert caught.value.code in ("context_length_exceeded", "too_large") and caught.value.param
    with pytest.raises(openai.BadRequestError, match="ask for at most 193 tokens") as caught:
        client.completions.create(model="tiny", prompt=[5] * 8000, max_tokens=1000, stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert len(client.completions.create(model="tiny", prompt=[5] * 8192, max_tokens=1).choices) == 1
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "cat " * 9000}])
    assert caught.value.code == "context_length_exceeded"


def test_errors_are_openai_error_objects(client, server):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="huge", prompt="x")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.AuthenticationError) as denied:
        client.with_options(api_key="wrong").completions.create(model="tiny", prompt="x")
    assert denied.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt=[300])
    assert bad.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as many:
        client.completions.create(model="tiny", prompt=["x"] * 10, n=100)
    assert many.value.param == "n"
    for status, answer in (
        (401, httpx.get(f"{server}/v1/models")),
        (413, post(server, content=b'{"model": "' + b"x" * 100_000 + b'"}')),
        (413, post(server, content=iter([b"x" * 60_000] * 3))),  # chunked: no length is announced
        (400, post(server, content=b"{")),
        (415, post(server, content=b"{}", headers={"Authorization": f"Bearer {KEY}", "Content-Type": "text/plain"})),
        (404, httpx.get(f"{server}/v1/nothing")),
        (405, httpx.get(f"{server}/v1/completions")),
        (404, httpx.get(f"{server}/../../etc/passwd")),
    ):
        error = answer.json()["error"]
        assert answer.status_code == status and set(error) == {"message", "type", "param", "code"} and error["message"]


def test_a_full_queue_is_answered_with_429_and_drains(client, server):
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tiny", prompt=["the"] * 13, **LONG)
    assert caught.value.code == "rate_limit_exceeded" and caught.value.response.headers["retry-after"]
    assert wait_until(lambda: is_idle(server), 2), "a refused request leaves nothing behind"


# ---- clients that hang up


@pytest.mark.parametrize("stream", [True, False])
def test_generation_stops_within_a_second_of_a_hang_up(server, stream):
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    with socket.create_connection(("127.0.0.1", int(server.rsplit(":", 1)[1]))) as s:
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        s.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        assert wait_until(lambda: state(server)["running"] == 1, 10)
        time.sleep(0.3)
        assert state(server)["running"] == 1, "the generation should take longer than this test"
    began = time.monotonic()
    assert wait_until(lambda: is_idle(server), 1), state(server)
    assert time.monotonic() - began < 1
    assert state(server)["open_requests"] == 0


def test_a_client_that_closes_its_stream_frees_the_row(client, server):
    stream = client.completions.create(model="tiny", prompt="the cat", stream=True, **LONG)
    next(iter(stream))
    stream.close()
    assert wait_until(lambda: is_idle(server), 1)


# ---- the page, and the rest


def test_the_page_is_served_and_loads_nothing_from_elsewhere(server):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        answer = httpx.get(server + path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in answer.text


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
"""


def test_lm_eval_scores_equal_those_in_process(server, folder, tmp_path, monkeypatch):
    """Per log-likelihood within 1e-4, the same greedy flags, the same generated texts."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    reference = Engine(load(folder), byte_level_tokenizer())
    questions = ["the cat", "Once upon a", "Où est le", "hello, hello,", "def f(x): return", "你好"]
    greedy = reference.generate(questions, SamplingParams(temperature=0, max_tokens=3))
    docs = [
        {"question": q, "choices": [" sat", " mat on the", " 世界", g], "answer": i % 4}
        for i, (q, g) in enumerate(zip(questions, greedy, strict=True))
    ]
    data = tmp_path / "data.json"
    data.write_text("\n".join(json.dumps(d) for d in docs))
    choice = 'doc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: ""'
    generation = 'doc_to_target: ""\ngeneration_kwargs: {until: ["at"], max_gen_toks: 12}'
    for name, kind, more in (("choose", "multiple_choice", choice), ("write", "generate_until", generation)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, more=more))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def responses(model):
        done = lm_eval.simple_evaluate(model, tasks=["choose", "write"], task_manager=manager, bootstrap_iters=0)
        return {t: [s["resps"] for s in done["samples"][t]] for t in ("choose", "write")}

    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    here = responses(HFLM(pretrained=load(folder), tokenizer=tokenizer, batch_size=4, max_length=8192))
    there = responses(
        LocalCompletionsAPI(
            base_url=f"{server}/v1/completions",
            model="tiny",
            tokenizer_backend="huggingface",
            tokenizer=str(folder),
            num_concurrent=2,
            batch_size=3,
            max_length=8192,
        )
    )
    assert len(here["choose"]) == 6
    flags = []
    for ours, theirs in zip(there["choose"], here["choose"], strict=True):
        for ((a, greedy_a),), ((b, greedy_b),) in zip(ours, theirs, strict=True):
            assert abs(a - b) < 1e-4 and greedy_a == greedy_b
            flags.append(greedy_a)
    assert any(flags) and not all(flags)

    def whole(answers):  # an unfinished character at the end is not sent
        return [text.rstrip("\ufffd") for doc in answers for group in doc for text in group]

    assert whole(there["write"]) == whole(here["write"]) and any(whole(here["write"]))


def test_the_gateway_needs_no_torch():
    code = "import sys; sys.modules.update(torch=None, transformers=None, mlflow=None); import serving.app"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


def test_settings_come_as_text_or_values_and_wrong_ones_are_named(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'rows'"):
        build({"run": "x", "row": 3})
    with pytest.raises(ConfigError, match="rows"):
        build({"run": "x", "rows": "many"})
    with pytest.raises(ConfigError, match="run is required"):
        build({})
    with pytest.raises(InputError, match="no such folder"):
        build({"run": str(tmp_path / "nothing")})
    with pytest.raises(InputError, match="neither a run folder"):
        build({"run": str(tmp_path)})
    (tmp_path / "key").write_text(" k \n")
    assert ServeConfig(run="x", api_key_file=str(tmp_path / "key")).key() == "k"
    with pytest.raises(ConfigError, match="nowhere"):
        ServeConfig(run="x", api_key_file="nowhere").key()


def test_a_character_that_the_tokenizer_lacks_is_a_400(tmp_path):
    """The replica's class without Serve: a prompt, a conversation by template and one in plain text."""
    folder = tmp_path / "chars"
    gpt(vocab_size=64).save_pretrained(folder)
    args = {"device": "cpu", "dtype": "auto", "threads": 1, "rows": 2, "context": None, "chunk": 512, "max_waiting": 1}
    settings = {"run": str(folder), "name": "chars", "max_sequences": 8, "max_tokens": 30, **args}
    chat = {"messages": [{"role": "user", "content": "the é"}]}

    async def ask(model, kind, fields):
        job = parse(kind, json.dumps({"model": "chars", **fields}).encode()).job()
        return [message async for message in model.generate(job)]

    for template in (TEMPLATE, None):
        tokenizer = chars_tokenizer(sorted(set("User: the Assistant user assistant \n")))
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        model = LanguageModel.func_or_class(settings)
        try:
            for kind, fields, param in (
                (CompletionRequest, {"prompt": "the é"}, "prompt"),
                (ChatRequest, chat, "messages"),
            ):
                (answer,) = asyncio.run(ask(model, kind, fields))
                assert (answer["error"]["status"], answer["error"]["param"]) == (400, param)
                assert "'é'" in answer["error"]["message"]
        finally:
            model.thread.stop()


def test_without_a_chat_template_a_conversation_is_plain_text_that_ends_where_the_user_would_speak(tmp_path):
    """The replica's class without Serve: prompt, stop strings, the space before the first word."""
    folder = tmp_path / "plain"
    gpt(seq_len=256).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    args = {"device": "cpu", "dtype": "auto", "threads": 1, "rows": 2, "context": None, "chunk": 512, "max_waiting": 1}
    settings = {"run": str(folder), "name": "plain", "max_sequences": 8, "max_tokens": 30, **args}
    model = LanguageModel.func_or_class(settings)

    async def ask(**fields):
        messages = [{"role": "system", "content": "Purr."}, {"role": "user", "content": "the cat?"}]
        job = parse(ChatRequest, json.dumps({"model": "plain", "messages": messages, **fields}).encode()).job()
        return [message async for message in model.generate(job)]

    engine = model.engine
    try:
        opened, told = asyncio.run(ask(temperature=0))
        text = "Purr.\n\nUser: the cat?\nAssistant:"
        alone = SamplingParams(temperature=0, max_tokens=30)
        assert opened == {"prompt_tokens": len(engine.encode(text)), "choices": 1}
        (wanted,) = Engine(load(folder), byte_level_tokenizer()).generate([text], alone)
        assert told["deltas"][0]["text"] == wanted.lstrip() and told["deltas"][0]["tokens"] <= 30
        (error,) = asyncio.run(ask(n=9))
        assert (error["error"]["status"], error["error"]["param"]) == (400, "n")
        (error,) = asyncio.run(ask(max_tokens=31))
        assert error["error"]["status"] == 400 and "limit of 30" in error["error"]["message"]
        (error,) = asyncio.run(ask(n=8))
        assert error["error"]["status"] == 429

        engine.step = lambda: (_ for _ in ()).throw(RuntimeError("a fault"))
        opened, error = asyncio.run(ask())
        assert error["error"]["status"] == 500 and "a fault" not in error["error"]["message"]
        for _ in range(2):
            asyncio.run(ask())
        model.thread.join(5)
        (error,) = asyncio.run(
            ask()
        )  # three faults in a row end the thread, and the health check asks for a new replica
        assert error["error"]["status"] == 503
        with pytest.raises(RuntimeError):
            model.check_health()
    finally:
        model.thread.stop()
