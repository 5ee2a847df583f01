"""The engine against transformers' generate and logit processors, and against rules written one character at a time."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.convert import llama2c
from models.parts.position import Learned
from pipelines.lib.vocab import chars_tokenizer
from serving.backends import CachePerRow, Recompute, SharedMemory
from serving.engine import (
    Engine,
    EngineStopped,
    EngineThread,
    QueueFull,
    RequestError,
    SamplingParams,
    TokenBytes,
    seed_of_sample,
)
from serving.sampling import Sampler, choose, distribution, draw
from serving.text import BROKEN, Detokenizer, StopStrings, WindowDetokenizer
from tests.serving.tiny import (
    END,
    TEXT,
    byte_level_tokenizer,
    foreign,
    gpt,
    sentencepiece_tokenizer,
    stories_tokenizer,
    wordpiece_tokenizer,
)

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [4], [30, 31, 32, 33, 34, 35, 36]]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def model():
    return gpt()


def tokens_of(requests):
    return [r.tokens for r in requests]


# ---- the same tokens on every way


@pytest.mark.parametrize(
    ("make", "backend"),
    [
        (lambda: gpt(), SharedMemory),
        (lambda: gpt(window=8, position=Learned()), SharedMemory),
        (lambda: foreign("llama"), SharedMemory),
        (lambda: foreign("gpt2"), SharedMemory),
        (lambda: foreign("gemma3_text"), SharedMemory),
        (lambda: foreign("bloom"), CachePerRow),
        (lambda: foreign("mamba"), Recompute),
    ],
    ids=["gpt", "gpt-window-learned", "llama", "gpt2", "gemma3", "bloom", "mamba"],
)
def test_greedy_is_equal_with_and_without_cache_batched_and_single_and_in_generate(make, backend):
    model = make()
    engine = Engine(model, rows=3, chunk=5)  # fewer rows than prompts, prompts longer than a chunk
    batched = tokens_of(engine.complete(PROMPTS, GREEDY))
    assert batched == tokens_of(Engine(model, rows=3, chunk=5, dedicated=True).complete(PROMPTS, GREEDY))
    assert isinstance(engine._backend, backend)
    assert len({tuple(t) for t in batched}) == len(PROMPTS), "the test's texts should differ"
    assert batched == tokens_of(Engine(model, cache=False).complete(PROMPTS, GREEDY))
    assert batched == [Engine(model, rows=1).complete([p], GREEDY)[0].tokens for p in PROMPTS]
    for prompt, tokens in zip(PROMPTS, batched, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,
        )
        assert out[0].tolist() == prompt + tokens


def test_a_trained_model_tells_the_story_that_is_known(data_dir):
    """stories260K: 200 greedy tokens, byte for byte, through engine and tokenizer; cut by a stop string it contains."""
    folder = data_dir / "stories260K"
    wanted = (folder / "expected_greedy_200.txt").read_bytes().decode()
    model, tokenizer = llama2c.load(folder / "stories260K.bin"), stories_tokenizer(folder / "tok512.bin")
    assert TokenBytes(tokenizer).exact
    story = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    stopped = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, stop=('said, "I want',))
    texts = Engine(model, tokenizer, rows=2).generate(["", [1]], [story, stopped])
    assert texts == [wanted, wanted[: wanted.index('said, "I want')]]
    start = "Once upon a time, there was a little"
    rest = Engine(model, tokenizer).generate([start], story)[0]  # begins with a space, which must stay
    assert (start + rest).startswith(wanted)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "make", [gpt, lambda: foreign("llama"), lambda: foreign("bloom")], ids=["gpt", "llama", "bloom"]
)
def test_a_gpu_gives_the_tokens_that_the_cpu_gives(make):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = make()
    draws = SamplingParams(
        temperature=0.9, top_p=0.9, top_k=40, repetition_penalty=1.2, seed=3, max_tokens=20, logprobs=2
    )
    params = [GREEDY, draws, GREEDY, draws]
    cpu = Engine(model, rows=3, chunk=5).complete(PROMPTS, params)
    gpu = Engine(model.cuda(), rows=3, chunk=5, dedicated=True).complete(PROMPTS, params)
    assert tokens_of(gpu) == tokens_of(cpu)
    pairs = [(a, b) for x, y in zip(cpu, gpu, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)]
    assert max(abs(a.logprob - b.logprob) for a, b in pairs) < 1e-3


def test_a_sampled_result_does_not_depend_on_what_else_is_batched(model):
    params = [SamplingParams(temperature=1.0, top_p=0.9, seed=i, max_tokens=15, ignore_eos=True) for i in range(4)]
    alone = [Engine(model, rows=1).complete([p], s)[0].tokens for p, s in zip(PROMPTS, params, strict=True)]
    for rows in (2, 4):
        assert tokens_of(Engine(model, rows=rows, chunk=4).complete(PROMPTS, params)) == alone
    mixed = [GREEDY, params[1], SamplingParams(top_k=5, repetition_penalty=1.3, max_tokens=9), params[3]]
    assert tokens_of(Engine(model, rows=4).complete(PROMPTS, mixed))[1::2] == alone[1::2]


def test_rows_are_reused_and_moved_without_a_trace(model):
    rng = random.Random(0)
    prompts = [[rng.randrange(300) for _ in range(rng.randrange(1, 20))] for _ in range(25)]
    params = [SamplingParams(temperature=0, max_tokens=rng.randrange(0, 12), ignore_eos=True) for _ in prompts]
    together = Engine(model, rows=4, chunk=7).complete(prompts, params)
    for prompt, p, request in zip(prompts, params, together, strict=True):
        assert request.tokens == Engine(model, rows=1).complete([prompt], p)[0].tokens
        assert len(request.tokens) == p.max_tokens and request.finish_reason == "length"


def test_an_engine_used_in_training_leaves_the_model_as_it_was(tokenizer):
    model = gpt(dropout=0.1).train()
    one, two = (Engine(model, tokenizer).generate(["the cat", ""], GREEDY) for _ in range(2))
    assert one == two and model.training and all(isinstance(t, str) for t in one)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()  # nothing inference-only is left


# ---- sampling rules


@pytest.mark.parametrize("seed", range(8))
def test_distribution_equals_transformers_processors(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    B, V = 5, 50
    params = [
        SamplingParams(
            temperature=rng.choice([0.3, 1.0, 1.7]),
            top_k=rng.choice([0, 1, 7, 200]),
            top_p=rng.choice([1.0, 0.1, 0.8, 0.95]),
            min_p=rng.choice([0.0, 0.05, 0.4]),
        )
        for _ in range(B)
    ]
    logits = torch.randn(B, V) * 3
    ours = distribution(logits, params)
    for i, p in enumerate(params):
        x = TemperatureLogitsWarper(p.temperature)(None, logits[i : i + 1].double())
        x = TopKLogitsWarper(p.top_k)(None, x) if p.top_k else x
        x = TopPLogitsWarper(p.top_p)(None, x) if p.top_p < 1 else x
        x = MinPLogitsWarper(p.min_p)(None, x) if p.min_p else x
        torch.testing.assert_close(ours[i].double() / ours[i].double().sum(), x.softmax(-1)[0], atol=2e-6, rtol=1e-5)


def test_repetition_penalty_equals_transformers_and_the_others_follow_openai():
    torch.manual_seed(0)
    x = torch.randn(40) * 2
    sampler = Sampler(SamplingParams(repetition_penalty=1.4), [3, 5, 5], 40, torch.device("cpu"))
    sampler.saw(7)
    theirs = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([[3, 5, 5, 7]]), x[None].clone())[0]
    torch.testing.assert_close(sampler.penalised(x), theirs)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={2: 3.0, 9: -100.0})
    sampler = Sampler(params, [1, 2], 40, torch.device("cpu"))
    for token in (4, 4, 6):
        sampler.saw(token)
    wanted = x.clone()
    wanted[4] -= 0.5 + 2 * 0.25
    wanted[6] -= 0.5 + 0.25
    wanted[2] += 3
    wanted[9] -= 100
    torch.testing.assert_close(sampler.penalised(x), wanted)  # the prompt's tokens are not penalised


def test_draws_follow_the_probabilities_and_never_take_what_was_cut():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]])
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(n, generator=generator, dtype=torch.float64).tolist()
    counts = torch.bincount(torch.tensor(draw(probs.expand(n, -1), u)), minlength=6)
    wanted = probs[0] * n
    assert counts[[0, 2, 5]].sum() == 0
    chi2 = ((counts - wanted)[[1, 3, 4]] ** 2 / wanted[[1, 3, 4]]).sum()
    assert chi2 < 13.8, f"chi2 {chi2:.1f} with 2 degrees of freedom has p < 0.001"
    assert draw(probs.expand(2, -1), [0.0, 1 - 2**-53]) == [1, 4]


def test_logits_that_are_not_finite_are_survived():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[nan, 1, 2, nan], [nan, nan, nan, nan], [0, inf, 1, 2], [-inf, -inf, 0.5, -inf], [1, 2, 3, 0]]
    )
    for temperature in (0.0, 1e-4, 1.0):
        params = SamplingParams(temperature=temperature, top_p=0.5, seed=0)
        samplers = [Sampler(params, [], 4, torch.device("cpu")) for _ in logits]
        assert choose(logits, samplers) == [2, None, 1, 2, 2]


def test_a_model_of_nan_ends_its_request_with_an_error(tokenizer):
    model = gpt()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    (request,) = Engine(model, tokenizer).complete(["the"], GREEDY)
    assert (request.finish_reason, request.tokens) == ("error", []) and "finite" in request.error


def test_a_seed_repeats_and_samples_of_one_request_differ(model):
    def run(seed):
        return Engine(model).complete([[1, 2]], SamplingParams(seed=seed, max_tokens=12, ignore_eos=True))[0].tokens

    assert run(5) == run(5) and run(seed_of_sample(5, 0)) == run(5)
    assert len({tuple(run(seed_of_sample(5, i))) for i in range(4)}) == 4
    assert len({tuple(run(None)) for _ in range(3)}) > 1


def test_rows_that_only_pad_the_vocabulary_are_never_chosen(tokenizer):
    model = gpt(vocab_size=320)  # 20 more than the tokenizer has
    params = [SamplingParams(temperature=50.0, max_tokens=60, seed=i, ignore_eos=True) for i in range(8)]
    tokens = {t for r in Engine(model, tokenizer).complete([[1]] * 8, params) for t in r.tokens}
    assert max(tokens) < 300 and len(tokens) > 150


# ---- text


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (byte_level_tokenizer, Detokenizer),
        (sentencepiece_tokenizer, Detokenizer),
        (byte_level_tokenizer, WindowDetokenizer),
        (wordpiece_tokenizer, WindowDetokenizer),
    ],
)
@pytest.mark.parametrize("prompt", ["", "the cat", "你"])
def test_pieces_join_to_the_whole_text_and_no_piece_is_broken(make, kind, prompt):
    tokenizer = make()
    tokens = TokenBytes(tokenizer)
    assert tokens.exact == (make is not wordpiece_tokenizer)
    start = tokenizer(prompt, add_special_tokens=False).input_ids
    for text in (TEXT, "🙂🙃🙂", " the cat sat. café 你好", "a\n\n b", "naïve — 100 %"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        text_of = kind(tokens, start)
        pieces = [text_of.add(i) for i in ids]
        assert not any(BROKEN in p for p in pieces)
        before, whole = (tokenizer.decode(i, skip_special_tokens=True) for i in (start, start + ids))
        assert "".join(pieces) + text_of.flush() == whole[len(before) :]


@pytest.mark.parametrize("kind", [Detokenizer, WindowDetokenizer])
def test_random_bytes_are_released_soon_and_an_unfinished_end_is_dropped(tokenizer, kind):
    ids = [i for i in range(len(tokenizer)) if len(tokenizer.convert_ids_to_tokens(i)) == 1]
    rng = random.Random(0)
    sequence = [rng.choice(ids) for _ in range(400)]
    text_of, out = kind(TokenBytes(tokenizer)), ""
    for n, token in enumerate(sequence, 1):
        out += text_of.add(token)
        whole = tokenizer.decode(sequence[:n])
        assert whole.startswith(out) and len(whole) - len(out) <= 3
    assert (out + text_of.flush()).rstrip(BROKEN) == tokenizer.decode(sequence).rstrip(BROKEN)
    smile = tokenizer("🙂").input_ids
    assert len(smile) > 1
    half = kind(TokenBytes(tokenizer))
    assert [half.add(i) for i in smile[:-1]] == [""] * (len(smile) - 1) and half.flush() == ""
    rest = kind(TokenBytes(tokenizer), smile[:-1])  # a prompt that ends within a character
    assert rest.add(smile[-1]) == "🙂"


def stops_by_character(text, stops):
    for end in range(len(text) + 1):
        met = [s for s in stops if text[:end].endswith(s)]
        if met:
            return text[: end - max(map(len, met))], True
    return text, False


def test_stop_strings_are_exact_however_the_text_is_cut():
    rng = random.Random(0)
    met = 0
    for _ in range(3000):
        text = "".join(rng.choice("ab\n") for _ in range(rng.randrange(14)))
        stops = ["".join(rng.choice("ab\n") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        wanted, hit = stops_by_character(text, stops)
        finder, out, left, found = StopStrings(stops), "", text, False
        while left and not found:
            size = rng.randrange(1, 6)
            piece, found = finder.add(left[:size])
            out, left = out + piece, left[size:]
            assert wanted.startswith(out), "held-back text leaked"
        assert (out if found else out + finder.flush(), found) == (wanted, hit)
        met += hit
    assert 500 < met < 2900


def test_a_stop_string_across_tokens_ends_the_text_before_it_and_never_leaks(model, tokenizer):
    whole = Engine(model, tokenizer).complete(["the cat"], GREEDY)[0]
    starts = whole.offsets
    borders = sorted({at for at in starts if 1 <= at < len(whole.text) - 1})
    assert len(borders) > 8
    for at in borders:  # a stop string that begins in one token and ends in another
        stop = whole.text[at - 1 : at + 2]
        wanted, hit = stops_by_character(whole.text, [stop])
        assert hit
        engine = Engine(model, tokenizer)
        request = engine.submit("the cat", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=(stop,)))
        seen = [request.text]
        while engine.step():
            seen.append(request.text)
        assert (request.text, request.finish_reason) == (wanted, "stop")
        assert all(wanted.startswith(s) for s in seen)
    absent = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=(whole.text[-1] + "zzz",))
    last = Engine(model, tokenizer).complete(["the cat"], absent)[0]
    assert (last.text, last.finish_reason) == (whole.text, "length")  # held back until the end, then released


def test_end_and_stop_tokens_end_the_text_and_are_counted(model, tokenizer):
    whole = Engine(model, tokenizer).complete(["the cat"], GREEDY)[0]
    token = whole.tokens[6]
    first = whole.tokens.index(token)
    stopped = Engine(model, tokenizer).complete(
        ["the cat"], SamplingParams(temperature=0, stop_token_ids=(token,), logprobs=1)
    )[0]
    assert stopped.tokens == whole.tokens[: first + 1] and stopped.finish_reason == "stop"
    assert whole.text.startswith(stopped.text) and len(stopped.text) <= whole.offsets[first]
    assert len(stopped.logprobs) == len(stopped.tokens)
    engine = Engine(model, tokenizer)
    assert tokenizer.eos_token_id in engine.ends
    engine.ends = frozenset([token])
    assert engine.complete(["the cat"], SamplingParams(temperature=0))[0].tokens == stopped.tokens


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_token_names_are_unique_and_their_bytes_join_to_the_text(make):
    tokenizer = make()
    names = TokenBytes(tokenizer)
    every = [names.name(i) for i in range(len(tokenizer))]
    text = "the cat 🙂 ate é 你好"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert b"".join(names.of(i) for i in ids).decode().strip() == text
    assert BROKEN not in "".join(every)
    if make is byte_level_tokenizer:
        assert len(set(every)) == len(every) and names.name(tokenizer.eos_token_id) == END


# ---- log-probabilities


@pytest.mark.parametrize("chunk", [3, 512])
def test_logprobs_of_prompt_and_output_equal_a_full_forward_pass(model, chunk):
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    requests = Engine(model, rows=2, chunk=chunk).complete(PROMPTS, params)
    for r in requests:
        table = model(torch.tensor([r.prompt + r.tokens])).logits[0].log_softmax(-1)
        entries = [*r.prompt_logprobs, *r.logprobs]
        assert entries[0] is None and len(entries) == len(r.prompt) + 6 and len(r.prompt_logprobs) == len(r.prompt)
        for i, (entry, token) in enumerate(zip(entries[1:], (r.prompt + r.tokens)[1:], strict=True)):
            assert entry.id == token and abs(entry.logprob - table[i, token].item()) < 5e-5
            n = 2 if i + 1 < len(r.prompt) else 3
            assert [t for t, _ in entry.top] == table[i].topk(n).indices.tolist()


def test_a_greedy_tokens_logprob_is_the_maximum_exactly(model):
    (r,) = Engine(model, chunk=4).complete([PROMPTS[1]], SamplingParams(temperature=0, max_tokens=30, logprobs=1))
    assert all(e.logprob == e.top[0][1] == max(lp for _, lp in e.top) for e in r.logprobs)
    text = r.prompt + r.tokens
    (again,) = Engine(model, chunk=4).complete([text], SamplingParams(max_tokens=0, prompt_logprobs=1))
    greedy = [e.logprob == e.top[0][1] for e in again.prompt_logprobs[len(r.prompt) :]]
    assert all(greedy) and again.tokens == [] and again.finish_reason == "length"


# ---- limits, cancelling, threads


def test_context_is_filled_and_not_exceeded(model):
    (r,) = Engine(model).complete([[1] * 60], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(r.tokens) == 5 and r.finish_reason == "length"  # 64 positions; the last token is not fed back
    engine = Engine(model, context=16)
    assert engine.room(10) == 7
    assert len(engine.complete([[1] * 16], GREEDY)[0].tokens) == 1
    with pytest.raises(RequestError, match=r"17 tokens.*context is 16") as caught:
        engine.submit([1] * 17)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(ValueError, match="exceeds"):
        Engine(model, context=65)


@pytest.mark.parametrize(
    ("prompt", "options", "param"),
    [
        ([300], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([], {}, "prompt"),
        ("text", {}, "prompt"),
        ([1], {"stop": ("x",)}, "stop"),
        ([1], {"logprobs": 301}, "logprobs"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_at_once(model, prompt, options, param):
    with pytest.raises(RequestError) as caught:
        Engine(model).submit(prompt, SamplingParams(**options))
    assert caught.value.param == param


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_tokens": -1},
        {"stop": ("",)},
        {"logit_bias": {1: float("inf")}},
    ],
)
def test_impossible_sampling_parameters_are_refused_by_name(bad):
    with pytest.raises(RequestError, match=next(iter(bad))) as caught:
        SamplingParams(**bad)
    assert caught.value.param == next(iter(bad))


def test_cancelling_frees_the_row_and_leaves_the_others_alone(model):
    engine = Engine(model, rows=2)
    alone = [Engine(model).complete([p], GREEDY)[0].tokens for p in PROMPTS]
    requests = [engine.submit(p, GREEDY) for p in PROMPTS]
    for _ in range(5):
        engine.step()
    engine.cancel(requests[0])  # running
    engine.cancel(requests[2])  # waiting
    engine.step()
    assert requests[0].finish_reason == requests[2].finish_reason == "cancelled"
    while engine.step():
        pass
    assert requests[0].tokens == alone[0][: len(requests[0].tokens)] and requests[2].tokens == []
    assert [requests[1].tokens, requests[3].tokens] == [alone[1], alone[3]]
    assert engine.free_rows == 2 and not engine.busy


def test_the_queue_has_a_limit(model):
    engine = Engine(model, rows=1, max_waiting=2)
    for _ in range(3):
        engine.submit([1], GREEDY)
    with pytest.raises(QueueFull):
        engine.submit([1], GREEDY)


def test_a_thread_serves_many_submitters_and_survives_a_fault(model, tokenizer, monkeypatch):
    wanted = [Engine(model).complete([p], GREEDY)[0].tokens for p in PROMPTS]
    thread = EngineThread(Engine(model, tokenizer, rows=3))
    thread.start()

    def wait(request):
        deadline = time.monotonic() + 20
        while not request.finished and time.monotonic() < deadline:
            time.sleep(0.002)
        return request

    got = {}

    def submitter(k):
        for i, p in enumerate(PROMPTS):
            got[k, i] = wait(thread.submit(p, GREEDY)).tokens

    workers = [threading.Thread(target=submitter, args=(k,)) for k in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert all(got[k, i] == wanted[i] for k in range(4) for i in range(len(PROMPTS)))

    step = thread.engine.step
    monkeypatch.setattr(thread.engine, "step", lambda: (_ for _ in ()).throw(RuntimeError("no memory")))
    assert wait(thread.submit(PROMPTS[0], GREEDY)).finish_reason == "error"
    monkeypatch.setattr(thread.engine, "step", step)
    assert wait(thread.submit(PROMPTS[0], GREEDY)).tokens == wanted[0]
    thread.stop()
    assert not thread.is_alive()
    with pytest.raises(EngineStopped):
        thread.submit([1])


def test_text_that_the_tokenizer_cannot_read_is_a_request_error_that_names_the_character(tokenizer):
    chars = chars_tokenizer(sorted(set("First Citizen")))
    with pytest.raises(RequestError, match=r"no token for the character 'é' \(U\+00E9\)") as caught:
        Engine(gpt(vocab_size=16), chars).submit("First é")
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match="half of a character"):
        Engine(gpt(), tokenizer).submit("a\ud800")
