"""pipelines.sample as a command: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from pipelines.lib.vocab import chars_tokenizer
from pipelines.sample import main
from tests.serving.tiny import byte_level_tokenizer, gpt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    gpt().save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    return str(path)


def sample(capsys, *words):
    code = main(list(words))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_greedy_text_is_the_same_with_and_without_cache_batched_and_single_and_in_generate(folder, capsys, tmp_path):
    prompts = ["the cat", "Once upon a time there was", "你好"]
    every = [w for p in prompts for w in ("--prompt", p)]
    out = tmp_path / "samples.json"
    code, text, _ = sample(capsys, folder, *every, "temperature=0", "max_tokens=20", f"output={out}")
    assert code == 0
    results = json.loads(out.read_text())["samples"]
    for options in (("cache=false",), ("batch=1",), ("stream=false", "batch=2")):
        assert sample(capsys, folder, *every, "temperature=0", "max_tokens=20", *options)[1] == text
    for result in results:
        code, alone, _ = sample(capsys, folder, "--prompt", result["prompt"], "temperature=0", "max_tokens=20")
        assert alone == f"{result['prompt']}{result['text']}\n"
        assert f"{result['prompt']}{result['text']}\n" in text
    model, tokenizer = gpt(), byte_level_tokenizer()
    ids = tokenizer(prompts[1], return_tensors="pt").input_ids
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert results[1]["tokens"] == theirs[0, ids.shape[1] :].tolist()


def test_a_seed_repeats_the_samples_and_is_reported(folder, capsys, tmp_path):
    out = tmp_path / "a" / "samples.json"
    words = (folder, "--prompt", "the", "num_samples=3", "max_tokens=12", "top_k=40", "top_p=0.9", "min_p=0.01")
    code, first, said = sample(capsys, *words, "repetition_penalty=1.1", f"output={out}")
    seed = json.loads(out.read_text())["settings"]["seed"]
    assert code == 0 and f"seed {seed}" in said
    assert sample(capsys, *words, "repetition_penalty=1.1", f"seed={seed}")[1] == first
    texts = [s["text"] for s in json.loads(out.read_text())["samples"]]
    assert len(set(texts)) == 3
    assert sample(capsys, *words, "repetition_penalty=1.1", f"seed={seed + 1}")[1] != first


def test_prompts_come_from_a_file_whole_or_by_line(folder, capsys, tmp_path):
    path, out = tmp_path / "prompts.txt", tmp_path / "samples.json"
    path.write_bytes("\ufeffthe cat\n\nhello\n".encode())
    for per, wanted in (("line", ["the cat", "hello"]), ("file", ["the cat\n\nhello\n"])):
        words = (f"prompt_file={path}", f"prompt_per={per}", "max_tokens=2", f"output={out}")
        assert sample(capsys, folder, *words)[0] == 0
        assert [s["prompt"] for s in json.loads(out.read_text())["samples"]] == wanted
    assert sample(capsys, folder, "max_tokens=3", f"output={out}")[0] == 0  # no prompt: the beginning of a document
    assert json.loads(out.read_text())["samples"][0]["prompt_tokens"] == 1


def test_relative_paths_lie_in_the_storage_folder_as_they_do_for_every_stage_in_a_job(
    folder, capsys, tmp_path, monkeypatch
):
    from pathlib import Path

    from serving.app import build

    (tmp_path / "p.txt").write_text("ab")
    monkeypatch.setenv("NOVELLA_STORAGE", str(Path(folder).parent))
    monkeypatch.chdir(tmp_path)
    name = Path(folder).name
    assert sample(capsys, name, "--prompt", "ab", "max_tokens=2")[0] == 0
    build({"run": name})
    monkeypatch.setenv("NOVELLA_STORAGE", str(tmp_path))
    assert sample(capsys, name, "--prompt", "ab", "max_tokens=2")[0] == 2
    assert sample(capsys, folder, "prompt_file=p.txt", "max_tokens=2", "output=o.json")[0] == 0
    assert (tmp_path / "o.json").is_file()


def test_stop_strings_end_the_text(folder, capsys, tmp_path):
    words = (folder, "--prompt", "the cat", "temperature=0", "max_tokens=20")
    text = sample(capsys, *words)[1]
    stop = text[12:15]
    assert sample(capsys, *words, "--stop", stop, "--stop", "never")[1] == text[: text.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["temprature=1"], "temperature"),
        (["temperature=-1"], "temperature=-1"),
        (["top_p=2"], "top_p"),
        (["num_samples=0"], "num_samples=0"),
        (["prompt_file=nowhere.txt"], "nowhere.txt"),
        (["--prompt", "the cat " * 60], "context is 64"),
        (["context=65"], "exceeds the model's own 64"),
        (["device=nonsense"], "device"),
        (["which=newest", "run=."], "run"),
        (["output={folder}/config.json/x"], "output="),
        (["output={folder}"], "Is a directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, words, says):
    code, out, said = sample(capsys, folder, *(w.format(folder=folder) for w in words))
    assert not out
    lines = said.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]


def test_a_folder_without_a_model_or_with_a_binary_prompt_file_is_named(folder, capsys, tmp_path):
    assert "config.json" in sample(capsys, str(tmp_path))[2]
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    code, _, said = sample(capsys, folder, f"prompt_file={tmp_path / 'binary'}")
    assert code == 2 and "not UTF-8" in said


def test_a_character_that_the_tokenizer_lacks_is_named(capsys, tmp_path):
    gpt(vocab_size=16).save_pretrained(tmp_path)
    chars_tokenizer(sorted(set("First Citizen"))).save_pretrained(tmp_path)
    code, _, said = sample(capsys, str(tmp_path), "--prompt", "First é")
    assert code == 2 and len(said.strip().splitlines()) == 1 and "prompt 1 of 1" in said and "'é'" in said


def test_help_starts_without_torch_or_ray():
    code = """import sys; sys.modules.update(torch=None, ray=None, mlflow=None)
from pipelines.sample import main; raise SystemExit(main(["--help"]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "repetition_penalty=1.0" in done.stdout, done.stderr


def test_lists_of_temperatures_and_top_k_run_in_turn_and_no_pair_twice(folder, capsys, tmp_path):
    out = tmp_path / "samples.json"
    words = (folder, "--prompt", "the", "max_tokens=8", "seed=3", f"output={out}")
    code, text, _ = sample(capsys, *words, "temperature=[0.5,1.2,0.5]", "top_k=[1,20,1]", "num_samples=2")
    got = json.loads(out.read_text())["samples"]
    pairs = [(t, k) for t in (0.5, 1.2) for k in (1, 20)]
    assert code == 0 and [(s["temperature"], s["top_k"]) for s in got] == [pair for pair in pairs for _ in range(2)]
    assert text.count("--- ") == 8 and "--- 3 of 8, temperature 0.5, top_k 20" in text
    assert {s["text"] for s in got if s["top_k"] == 1} == {got[0]["text"]}  # the best token, at any temperature
    for i, (temperature, k) in enumerate(pairs):
        assert sample(capsys, *words, f"temperature={temperature}", f"top_k={k}", "num_samples=2")[0] == 0
        alone = json.loads(out.read_text())["samples"]
        assert [s["tokens"] for s in alone] == [s["tokens"] for s in got[2 * i : 2 * i + 2]]


def test_a_prompt_may_be_a_file(folder, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("the cat", encoding="utf-8")
    words = ("temperature=0", "max_tokens=5")
    given = sample(capsys, folder, "--prompt", f"FILE:{tmp_path / 'p.txt'}", *words)
    assert given[:2] == sample(capsys, folder, "--prompt", "the cat", *words)[:2] and given[0] == 0
    code, _, said = sample(capsys, folder, "--prompt", "FILE:nowhere.txt")
    assert code == 2 and "prompt=FILE:nowhere.txt: No such file" in said


def test_bare_min_p_is_one_half(folder, capsys, tmp_path):
    out = tmp_path / "samples.json"
    words = (folder, "--prompt", "the", "max_tokens=12", "seed=1", "temperature=1", f"output={out}", "colour=top_k")
    for more in (["--min_p"], ["--min_p", "seed=1"], ["min_p=0.5"], ["--min_p", "0.5"]):
        assert sample(capsys, *words, *more)[0] == 0
        tree = json.loads(out.read_text())
        assert tree["settings"]["min_p"] == 0.5
        for draw in tree["samples"][0]["draws"]:
            kept = [p for _, p, q in draw["top"] if q > 0]
            assert len(kept) == min(10, draw["kept"]) and min(kept) >= max(kept) + torch.log(torch.tensor(0.5)) - 1e-4


def test_colours_tables_and_files_show_the_same_samples(folder, capsys, tmp_path):
    words = (folder, "--prompt", "the cat", "max_tokens=6", "seed=1")
    plain = sample(capsys, *words)[1]
    files = {name: tmp_path / "made" / name for name in ("page.html", "picture.png", "samples.json", "samples.txt")}
    more = (f"page={files['page.html']}", f"picture={files['picture.png']}", f"output={files['samples.json']}")
    more += (
        f"charts={tmp_path / 'charts'}",
        "chart_kinds=[heatmap,bars,logits]",
        f"sample_file={files['samples.txt']}",
    )
    code, text, said = sample(capsys, *words, *more, "colour=all", "table=true", "candidates=3")
    assert code == 0, said
    assert text.count(plain.rstrip("\n")) == 6 and "the 3 most likely" in text and "mean cross-entropy" in text
    assert all(path.stat().st_size for path in files.values())
    names = sorted(p.name for p in (tmp_path / "charts").iterdir())
    assert names == ["heatmap.png", "logits.png", *(f"step_{n:04d}.png" for n in range(1, 7))]
    draws = json.loads(files["samples.json"].read_text())["samples"][0]["draws"]
    assert len(draws) == 6 and all(len(d["top"]) == 3 for d in draws)
    assert "max_tokens=6" in files["page.html"].read_text()
    assert sample(capsys, *words, more[-1])[0] == 0  # added, not replaced
    assert files["samples.txt"].read_text().count(plain) == 2
    assert files["samples.txt"].read_text().count("| temperature 0.8, top_k 0, seed 1, sample 1\n") == 2


def test_a_cosine_penalty_says_how_much_it_changed(folder, capsys):
    code, text, _ = sample(capsys, folder, "--prompt", "the", "max_tokens=9", "seed=1", "cosine_penalty=[5, 1.5]")
    kl = float(text.rsplit("kl ", 1)[1].split()[0])
    assert code == 0 and kl > 0
    again = sample(capsys, folder, "--prompt", "the", "max_tokens=9", "seed=1", "cosine_penalty=[5, 0]")[1]
    assert (
        again.splitlines()[0] == sample(capsys, folder, "--prompt", "the", "max_tokens=9", "seed=1")[1].splitlines()[0]
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["temperature=[]"], "temperature"),
        (["temperature=[0.5,-1]"], "temperature=-1"),
        (["colour=entropie"], "entropy"),
        (["candidates=301", "table=true"], "vocabulary's 300"),
        (["chart_kinds=[bars]"], "charts="),
        (["charts=c", "chart_kinds=[pies]"], "bars"),
        (["cosine_penalty=[0, 1]"], "cosine_penalty"),
        (["page={folder}"], "page="),
        (["charts={folder}/config.json"], "charts="),
        (["sample_file={folder}"], "sample_file="),
        (["interactive=true", "output=x.json"], "without output"),
    ],
)
def test_bad_looks_are_one_line_and_exit_code_2(folder, capsys, words, says):
    code, out, said = sample(capsys, folder, *(w.format(folder=folder) for w in words), "max_tokens=2")
    lines = said.strip().splitlines()
    assert code == 2 and not out and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]
