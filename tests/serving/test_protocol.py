"""The OpenAI protocol without a server: what is taken, what is refused and how, what the answers look like."""

from __future__ import annotations

import json

import pytest
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletion as OpenAIChat
from openai.types.chat import ChatCompletionChunk

from serving.engine import SamplingParams
from serving.protocol import (
    ApiError,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Delta,
    Entry,
    event,
    parse,
    plain_chat,
)


def ask(kind, **fields):
    return parse(kind, json.dumps({"model": "m", **fields}).encode())


def chat(**fields):
    return ask(ChatRequest, messages=[{"role": "user", "content": "hi"}], **fields)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("text", ["text"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt, prompts):
    assert ask(CompletionRequest, prompt=prompt).job()["prompts"] == prompts


@pytest.mark.parametrize(
    "prompt", [[], [[]], [[1], []], {"a": 1}, 5, None, [1, "a"], [True], [1.5], [["a"]], [[1], "a"]]
)
def test_other_prompts_are_refused_in_one_sentence(prompt):
    with pytest.raises(ApiError, match="prompt: must be a text, a list of texts, token ids") as caught:
        ask(CompletionRequest, prompt=prompt)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


@pytest.mark.parametrize(
    ("fields", "param", "code", "says"),
    [
        ({"temprature": 1}, "temprature", "unknown_parameter", "did you mean 'temperature'"),
        ({"temperature": -1}, "temperature", "invalid_value", "-1"),
        ({"temperature": "hot"}, "temperature", "invalid_value", "hot"),
        ({"top_p": 2}, "top_p", "invalid_value", "2"),
        ({"n": 0}, "n", "invalid_value", "0"),
        ({"max_tokens": -5}, "max_tokens", "invalid_value", "-5"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "echo"),
        ({"logprobs": 99}, "logprobs", "invalid_value", "99"),
        ({"suffix": "x"}, "suffix", "invalid_value", "not supported"),
        ({"best_of": 3}, "best_of", "invalid_value", "n=1"),
        ({"stop": [""]}, "stop", "invalid_value", "stop.0"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value", "17"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value", "a"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "stream=true"),
        ({"tools": []}, "tools", "unsupported_parameter", "not supported"),
        ({"prompt": "\ud800"}, None, None, "surrogate"),
    ],
)
def test_what_is_wrong_is_named(fields, param, code, says):
    with pytest.raises(ApiError) as caught:
        ask(CompletionRequest, **fields)
    error = caught.value.body()["error"]
    assert caught.value.status == 400 and error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code) and says in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"{}", b'{"model":1}', b"\xff", b'{"model":"m","temperature":NaN}', b"[" * 10**5],
)
def test_a_body_that_is_no_request_is_refused(body):
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "auto"}, "tool_choice"),
    ],
)
def test_what_chat_does_not_support_is_refused_by_name(fields, param):
    with pytest.raises(ApiError) as caught:
        chat(**fields) if "messages" not in fields else ask(ChatRequest, **fields)
    assert caught.value.param == param and "[" not in str(caught.value).split(":")[0]


def test_parameters_reach_the_engine_and_nulls_are_defaults():
    fields = {"temperature": 0.5, "top_k": 3, "stop": "x", "seed": 7, "logit_bias": {"5": -100}, "frequency_penalty": 1}
    params = SamplingParams(**ask(CompletionRequest, **fields, max_tokens=9).job()["params"])
    assert params == SamplingParams(
        temperature=0.5, top_k=3, stop=("x",), seed=7, logit_bias={5: -100}, frequency_penalty=1, max_tokens=9
    )
    nulls = dict.fromkeys(("temperature", "top_p", "stop", "seed", "logit_bias", "user", "tools", "presence_penalty"))
    assert SamplingParams(**ask(CompletionRequest, **nulls).job()["params"]) == SamplingParams(max_tokens=16)
    assert SamplingParams(**chat(max_completion_tokens=5, max_tokens=9).job()["params"]).max_tokens == 5
    echoed = ask(CompletionRequest, echo=True, logprobs=2).job()
    assert echoed["params"]["prompt_logprobs"] == 2 and echoed["echo"]


def test_content_parts_and_the_developer_role_become_plain_messages():
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    job = ask(ChatRequest, messages=messages).job()
    assert job["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}]
    assert plain_chat(job["messages"]) == "Be brief.\n\nUser: ab\nAssistant:"


def entry(token, logprob, top=()):
    return Entry(token=token, bytes=list(token.encode()), logprob=logprob, top=list(top), offset=0)


def delta(index, text, finish=None, entries=(), tokens=1):
    return Delta(index=index, text=text, entries=list(entries), finish=finish, tokens=tokens)


def test_answers_are_what_the_openai_client_expects():
    deltas = [delta(1, "b"), delta(0, "a"), delta(0, "c", "stop", tokens=2), delta(1, "", "length", tokens=3)]
    answer = Completion(ask(CompletionRequest, n=2)).answer(deltas, prompt_tokens=4)
    parsed = OpenAICompletion.model_validate(answer, strict=True)
    assert [(c.text, c.finish_reason) for c in parsed.choices] == [("ac", "stop"), ("b", "length")]
    assert parsed.usage is not None and parsed.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "total_tokens": 9,
    }
    table = [entry("x", -1.0, [("y", [121], -0.5)])]
    answer = ChatCompletion(chat(logprobs=True, top_logprobs=1)).answer([delta(0, "x", "stop", table)], 1)
    chatted = OpenAIChat.model_validate(answer, strict=True).choices[0]
    assert chatted.message.content == "x" and chatted.logprobs is not None and chatted.logprobs.content is not None
    assert chatted.logprobs.content[0].top_logprobs[0].token == "y"


def test_a_stream_has_one_choice_a_chunk_and_usage_only_if_asked_for():
    answer = ChatCompletion(chat(stream=True, stream_options={"include_usage": True}))
    chunks = [*answer.first(1), answer.part([delta(0, "a")]), answer.part([delta(0, "", "stop")]), *answer.last(3, 2)]
    parsed = [ChatCompletionChunk.model_validate(c, strict=True) for c in chunks]
    assert [c.choices[0].delta.content for c in parsed[:3]] == ["", "a", None]
    assert parsed[-1].choices == [] and parsed[-1].usage.total_tokens == 5
    assert all(c["usage"] is None for c in chunks[:-1])
    plain = Completion(ask(CompletionRequest, stream=True))
    assert plain.last(3, 2) == [] and "usage" not in plain.part([delta(0, "a")])
    assert event({"text": "é\n"}) == 'data: {"text":"é\\n"}\n\n'.encode()


def test_tokens_that_read_alike_keep_the_likelier_and_the_token_itself_is_always_there():
    request = ask(CompletionRequest, logprobs=2)
    entries = [entry("p", None), entry("a", -3.0, [(" ", [32], -0.1), (" ", [32], -0.7)])]
    table = Completion(request).answer([delta(0, "pa", "length", entries)], 1)["choices"][0]["logprobs"]
    assert table["top_logprobs"] == [None, {" ": -0.1, "a": -3.0}] and table["token_logprobs"] == [None, -3.0]
