"""The interactive mode of pipelines.sample, driven through its standard input."""

from __future__ import annotations

import io

import pytest

from pipelines.lib.vocab import chars_tokenizer
from pipelines.sample import main
from serving.engine import Engine, SamplingParams
from tests.serving.tiny import byte_level_tokenizer, gpt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    gpt().save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    return str(path)


def talk(capsys, monkeypatch, typed, folder, *words):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    code = main([folder, "interactive=true", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_each_turn_goes_on_behind_the_users_line(folder, capsys, monkeypatch):
    engine = Engine(gpt(), byte_level_tokenizer(), rows=1)
    greedy = SamplingParams(temperature=0, max_tokens=5)
    code, out, _ = talk(
        capsys, monkeypatch, "hello\nthe \\\n", folder, "--prompt", "the cat", "temperature=0", "max_tokens=5"
    )
    text, replies = "the cat", []
    for line in ("hello\n", "the ", None):
        replies += engine.generate([text], greedy)
        text += replies[-1] + (line or "")
    assert code == 0 and out == "the cat" + "".join(f"{reply}\n" for reply in replies)


def test_a_stop_string_ends_a_turn_and_belongs_to_the_text(folder, capsys, monkeypatch):
    engine = Engine(gpt(), byte_level_tokenizer(), rows=1)
    first = engine.generate(["the cat"], SamplingParams(temperature=0, max_tokens=30))[0]
    stop = first[6:8]
    head = first[: first.index(stop)] + stop
    code, out, _ = talk(
        capsys, monkeypatch, "A\n", folder, "--prompt", "the cat", "temperature=0", "max_tokens=30", "--stop", stop
    )
    wanted = SamplingParams(temperature=0, max_tokens=30, stop=(stop,))
    (second,) = engine.complete(["the cat" + head + "A\n"], wanted)
    met = stop if second.cut else ""
    assert code == 0 and out == f"the cat{head}\n{second.text}{met}\n"


def test_a_list_of_settings_gives_each_its_own_text(folder, capsys, monkeypatch):
    words = ("--prompt", "the", "top_k=[1,3]", "temperature=1", "seed=4", "max_tokens=6")
    code, out, _ = talk(capsys, monkeypatch, "x\n", folder, *words)
    assert code == 0 and out.count("--- temperature 1, top_k 1\n") == out.count("--- temperature 1, top_k 3\n") == 2
    best = out.split("top_k 1\n")[1].split("\n---")[0]
    engine = Engine(gpt(), byte_level_tokenizer(), rows=1)
    assert best == engine.generate(["the"], SamplingParams(temperature=0, max_tokens=6))[0]


def test_a_text_that_outgrows_the_context_loses_its_beginning(folder, capsys, monkeypatch):
    words = ("--prompt", "the cat", "temperature=0", "max_tokens=20", "ignore_eos=true")
    code, _, said = talk(capsys, monkeypatch, "the cat sat on the mat\n" * 6, folder, *words)
    assert code == 0 and said.count("outgrows the context") == 1


def test_a_line_that_the_tokenizer_cannot_read_is_asked_for_again(capsys, monkeypatch, tmp_path):
    gpt(vocab_size=16).save_pretrained(tmp_path)
    chars_tokenizer(sorted({*"First Citizen", "\n"})).save_pretrained(tmp_path)
    code, out, said = talk(
        capsys, monkeypatch, "é\nFirst\n", str(tmp_path), "--prompt", "First", "max_tokens=4", "seed=1"
    )
    assert code == 0 and "'é'" in said and "another line" in said and out.count("\n") >= 2


def test_tables_and_colours_follow_each_turn(folder, capsys, monkeypatch):
    words = ("--prompt", "the", "max_tokens=4", "seed=1", "colour=probability", "table=true")
    code, out, _ = talk(capsys, monkeypatch, "x\n", folder, *words)
    assert code == 0 and out.count("the 10 most likely") == 2 and out.count("probability: 0") == 2
