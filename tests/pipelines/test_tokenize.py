"""The tokenize stage: every document once, in its split, whatever kills it; nanoGPT's ids; bad input in one line."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from filelock import FileLock

from pipelines import tokenize
from pipelines.lib import shards
from pipelines.lib.config import InputError
from pipelines.lib.shards import TokenFolder
from pipelines.lib.vocab import END_OF_TEXT, load_tokenizer
from pipelines.tokenize import TokenizeConfig, document_hash, main

REPO = Path(__file__).resolve().parents[2]
WORDS = "the of and to a in that is was he for it with as his on be at by I this had not are but from or have".split()


def texts(n, seed=0, words=400):
    rng = np.random.default_rng(seed)
    return [f"document {i}: " + " ".join(rng.choice(WORDS, rng.integers(1, words))) for i in range(n)]


@pytest.fixture
def corpus(tmp_path):
    """Six jsonl files of 40 documents; the documents."""
    rows = texts(240)
    rows[7] += END_OF_TEXT + " goes on"
    (tmp_path / "corpus").mkdir()
    for i in range(6):
        lines = [json.dumps({"text": t}) for t in rows[40 * i : 40 * i + 40]]
        (tmp_path / f"corpus/{i}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "corpus", rows


def config(source, out, **more):
    base = {"tokenizer": tokenize.BPE(vocab_size=300), "workers": 0, "track": "none", "shard_mb": 0.01}
    return TokenizeConfig(source=str(source), out=str(out), **{**base, **more})


def files_of(out):
    """{file: sha256} of what the stage promises to repeat bitwise."""
    skip = {"config.yaml", ".lock"}
    found = [p for p in sorted(Path(out).rglob("*")) if p.is_file() and p.name not in skip]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def documents_of(out, split):
    folder = TokenFolder.open(out, verify="sha256")
    tokenizer, tokens, eot = load_tokenizer(folder.tokenizer_dir), folder.split(split), folder.manifest["eot_id"]
    found = []
    for i in range(tokens.n_documents):
        ids = tokens.document(i)
        assert ids[-1] == eot and eot not in ids[:-1]
        found.append(tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False))
    return found


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_every_document_is_there_once_in_the_split_of_its_hash(corpus, tmp_path, capsys):
    path, rows = corpus
    tokenize.run(config(path, tmp_path / "out", val_fraction=0.2, seed=3))
    train, val = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(rows)
    names = []
    for i in range(6):
        at = 0
        for line in (path / f"{i}.jsonl").read_bytes().splitlines(keepends=True):
            names.append(f"{i}.jsonl:{at}")
            at += len(line)
    expected = [t for name, t in zip(names, rows, strict=True) if document_hash(3, name) < 0.2 * 2**64]
    assert val == expected and 20 < len(val) < 80
    folder = TokenFolder.open(tmp_path / "out")
    assert folder.manifest["documents"] == 240
    assert folder.manifest["counts"] == {"documents_with_end_of_text_letters": 1}
    assert folder.split("train").n_bytes + folder.split("val").n_bytes == sum(len(t.encode()) for t in rows)
    ids = folder.split("train").window(0, folder.split("train").n_tokens)
    assert folder.token_bytes()[ids].sum() == folder.split("train").n_bytes
    assert not (tmp_path / "out/records").exists()
    said = capsys.readouterr().out
    assert "tokens/s" in said and "bytes/token" in said and "next: python -m pipelines.train gpt_debug data=" in said


def test_ray_writes_the_bytes_that_one_process_writes(corpus, tmp_path, ray_session):
    path, _ = corpus
    tokenize.run(config(path, tmp_path / "one"))
    tokenize.run(config(path, tmp_path / "ray", workers=2))
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "one")


def test_a_number_of_validation_documents_is_met(corpus, tmp_path):
    path, rows = corpus
    tokenize.run(config(path, tmp_path / "out", val_documents=13))
    assert len(documents_of(tmp_path / "out", "val")) == 13
    assert len(documents_of(tmp_path / "out", "train")) == len(rows) - 13
    tokenize.run(config(path, tmp_path / "none", val_fraction=0))
    assert list(TokenFolder.open(tmp_path / "none").splits) == ["train"]


def as_nanogpt(text):
    """nanoGPT's shakespeare_char: ids by sorted characters, the last tenth of the characters for validation."""
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([stoi[c] for c in text], np.uint16)
    return ids[: int(len(text) * 0.9)], ids[int(len(text) * 0.9) :]


def tail_of(path, out):
    return config(path, out, tokenizer="chars", split="tail", val_fraction=0.1)


def test_a_tail_of_characters_gives_nanogpts_ids(tmp_path):
    text = "".join(f"{t}. Ünïcode wörds — yes\n" for t in texts(40))
    (tmp_path / "input.txt").write_text(text)
    tokenize.run(tail_of(tmp_path / "input.txt", tmp_path / "out"))
    folder = TokenFolder.open(tmp_path / "out")
    assert len(folder.split("train").shards) == 3
    for name, ids in zip(("train", "val"), as_nanogpt(text), strict=True):
        assert np.array_equal(folder.split(name).window(0, folder.split(name).n_tokens), ids)


def test_tinyshakespeare_has_nanogpts_published_counts_and_ids(data_dir, tmp_path):
    text = (data_dir / "tinyshakespeare/input.txt").read_text()
    tokenize.run(tail_of(data_dir / "tinyshakespeare/input.txt", tmp_path / "out"))
    folder = TokenFolder.open(tmp_path / "out", verify="sha256")
    train, val = folder.split("train"), folder.split("val")
    assert (folder.vocab_size, train.n_tokens, val.n_tokens) == (65, 1003854, 111540)  # as nanoGPT's prepare.py prints
    assert main(["convert", str(tmp_path / "out"), f"out={tmp_path / 'nano'}"]) == 0
    for name, ids in zip(("train", "val"), as_nanogpt(text), strict=True):
        assert (tmp_path / f"nano/{name}.bin").read_bytes() == ids.tobytes()


def test_a_packed_file_fills_several_shards(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setattr(tokenize, "SHARD_TOKENS", 2000)
    rows = texts(60)
    data = "\n".join(json.dumps({"text": t}) for t in rows).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    tokenize.run(config(tmp_path / "a.jsonl.gz", tmp_path / "out", tokenizer="bytes", val_documents=2))
    assert (tmp_path / "out/train-00000.001.arrow").is_file()
    assert sorted(documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")) == sorted(rows)


# ---- kills, damage, reuse --------------------------------------------------------------------------------------------


def test_a_stopped_stage_goes_on_and_ends_with_the_same_bytes(corpus, tmp_path, monkeypatch, capsys):
    path, _ = corpus
    tokenize.run(config(path, tmp_path / "whole"))
    real, done = tokenize.tokenize_unit, []

    def stops(job, unit):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(unit)
        return real(job, unit)

    monkeypatch.setattr(tokenize, "tokenize_unit", stops)
    with pytest.raises(SystemExit) as stopped:
        tokenize.run(config(path, tmp_path / "out"))
    assert stopped.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    with pytest.raises(InputError, match="tokenisation did not finish; run the same"):
        TokenFolder.open(tmp_path / "out")
    shard = tmp_path / "out/train-00001.arrow"  # one finished shard is damaged meanwhile: it is made again
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    again = []
    monkeypatch.setattr(tokenize, "tokenize_unit", lambda job, unit: again.append(unit) or real(job, unit))
    tokenize.run(config(path, tmp_path / "out"))
    assert set(done) & set(again) == {1}
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


SLOW_DRIVER = """
import sys, time
from pipelines import tokenize
real = tokenize.tokenize_unit
def slow(job, unit):
    time.sleep(0.2)
    return real(job, unit)
tokenize.tokenize_unit = slow
sys.exit(tokenize.main(sys.argv[1:]))
"""


def test_kill_9_of_the_driver_loses_and_repeats_nothing(corpus, tmp_path):
    path, rows = corpus
    words = [f"source={path}", "tokenizer={kind: bpe, vocab_size: 300}", "shard_mb=0.01", "workers=0", "track=none"]
    tokenize.run(config(path, tmp_path / "whole"))
    driver = subprocess.Popen(
        [sys.executable, "-c", SLOW_DRIVER, *words, f"out={tmp_path / 'out'}"], cwd=REPO, stderr=subprocess.DEVNULL
    )
    records = tmp_path / "out/records"
    deadline = time.monotonic() + 60
    while len(list(records.glob("*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.arrow")}
    assert len(list(records.glob("*.json"))) >= 4 and not (tmp_path / "out/manifest.json").exists()
    assert main([*words, f"out={tmp_path / 'out'}"]) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    untouched = [n for n, t in kept.items() if (tmp_path / "out" / n).stat().st_mtime_ns == t]
    assert len(untouched) >= 4
    assert sorted(documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")) == sorted(rows)


def test_kill_9_of_a_worker_is_made_good_by_ray(tmp_path, ray_session):
    rows = texts(400, words=2000)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in rows))
    tokenize.run(config(tmp_path / "a.jsonl", tmp_path / "one", shard_mb=0.05))
    killed = []

    def kill_one():
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            if list((tmp_path / "ray/records").glob("*.json")):
                for process in psutil.Process().children(recursive=True):
                    with_title = " ".join(process.cmdline()[:1])
                    if with_title.startswith("ray::") and "_tokenize_row" in with_title:
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                        return
            time.sleep(0.005)

    killer = threading.Thread(target=kill_one)
    killer.start()
    tokenize.run(config(tmp_path / "a.jsonl", tmp_path / "ray", shard_mb=0.05, workers=2))
    killer.join()
    assert killed, "no worker was found to kill"
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "one")


@pytest.mark.slow
def test_kill_9_of_a_driver_with_ray_goes_on(tmp_path):
    rows = texts(3000, words=2000)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in rows))
    words = [f"source={tmp_path / 'a.jsonl'}", "tokenizer=bytes", "shard_mb=0.05", "track=none", "workers=2"]
    command = [sys.executable, "-m", "pipelines.tokenize", *words, f"out={tmp_path / 'out'}"]
    driver = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out/records").glob("*.json"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    assert not (tmp_path / "out/manifest.json").exists()
    subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tokenize.run(config(tmp_path / "a.jsonl", tmp_path / "one", shard_mb=0.05, tokenizer="bytes"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


def test_the_same_settings_reuse_and_others_are_refused_with_the_difference(corpus, tmp_path, capsys):
    path, _ = corpus
    tokenize.run(config(path, tmp_path / "out"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.arrow")}
    tokenize.run(config(path, tmp_path / "out"))
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.arrow")}
    assert "made before and reused" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"made with tokenizer\.vocab_size=300 \(now 310\)"):
        tokenize.run(config(path, tmp_path / "out", tokenizer=tokenize.BPE(vocab_size=310)))
    with pytest.raises(InputError, match=r"made with tokenizer=bpe \(now bytes\)"):
        tokenize.run(config(path, tmp_path / "out", tokenizer="bytes"))
    (path / "0.jsonl").write_text('{"text": "changed"}\n')
    with pytest.raises(InputError, match="other files or sizes"):
        tokenize.run(config(path, tmp_path / "out"))


def test_a_path_takes_the_options_of_its_kind(tmp_path):
    (tmp_path / "a.txt").write_text("one--two--three")
    words = [f"source={tmp_path / 'a.txt'}", "source.separator=--", "tokenizer=bytes", "val_fraction=0"]
    assert main([*words, "workers=0", "track=none", f"out={tmp_path / 'out'}"]) == 0
    assert documents_of(tmp_path / "out", "train") == ["one", "two", "three"]


def test_the_next_line_is_a_command_that_training_takes(corpus, tmp_path, monkeypatch, capsys):
    from pipelines.lib.config import assemble
    from pipelines.lib.training import TrainConfig

    monkeypatch.chdir(tmp_path)
    tokenize.run(config(corpus[0], tmp_path / "my data's", tokenizer="bytes"))
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
    assert words[:3] == ["python", "-m", "pipelines.train"]
    train = assemble(words[3:], TrainConfig)
    assert (train.data, train.out) == ("my data's", "runs/my data's")


def test_a_second_driver_in_the_same_folder_is_refused(corpus, tmp_path):
    path, _ = corpus
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"):
        with pytest.raises(InputError, match="another process is tokenizing into it"):
            tokenize.run(config(path, tmp_path / "out"))
    tokenize.run(config(path, tmp_path / "out"))


def test_a_full_disk_names_the_file_and_the_bytes(corpus, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, _ = corpus
    monkeypatch.setattr(shards, "open", Full, raising=False)
    with pytest.raises(InputError, match=r"no space left for the \d+ bytes of .*out/"):
        tokenize.run(config(path, tmp_path / "out", tokenizer="bytes"))
    assert not list((tmp_path / "out").glob("*.tmp"))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        (["sauce=stdlib"], "no option 'sauce'; did you mean 'source'?"),
        (["tokenizer={kind: bep}"], "'bep' does not exist; did you mean 'bpe'?"),
        (["source={kind: fils, path: x}"], "'fils' does not exist; did you mean 'files'?"),
        (["tokenizer.vocab_size=12"], "needs at least 257"),
        (["tokenizer.pattern=("], "nor a regular expression"),
        (["source={kind: files, path: x, seperator: a}"], "did you mean 'separator'?"),
        (["source=missing.txt"], "no such file, folder or pattern"),
        (["source=one.txt"], "is one document, so no document can be set apart for validation; give split=tail"),
        (["source=empty"], "nothing to read"),
        (["source=blank", "val_documents=1"], "the corpus is empty"),
        (["source=blank", "tokenizer=bytes"], "the corpus is empty: no document of"),
        (["source=zeros.bin", "tokenizer=bytes", "val_fraction=0"], "the corpus is empty"),
        (["source=three", "val_fraction=0.001", "tokenizer=bytes"], "no validation documents"),
        (["source=three", "val_fraction=0.999"], "no training documents: the 3 of"),
        (["source=three", "val_fraction=0.999", "tokenizer=bytes"], "no training documents: all 3 of"),
        (["source=three", "val_documents=3", "tokenizer=bytes"], "leaves nothing to train on"),
        (["source=three", "tokenizer=missing.json"], "tokenizer .*missing.json"),
        (["source=three", "val_documents=2", "split=tail"], "has no effect with split=tail"),
        (["source=three", "tokenizer=chars", "end_of_text=true"], "has no end-of-text token"),
        (["source=three", "val_fraction=1.5"], "must be at least 0 and below 1"),
        (["source=three", "out=three"], "holds other files"),
        (["source=three", "out=one.txt"], "is a file"),
        (["compare", "missing.txt", "bytes"], "no such file"),
        (["convert", "missing", "out=y"], "no such file or folder"),
        (["source=three", "tokenizer=bytes", "out=/dev/null/x"], "no folder can be made here"),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capfd, words, says):
    import re

    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("one document\n" * 9)
    (tmp_path / "zeros.bin").write_bytes(bytes(100))
    for name, contents in (("empty", []), ("blank", [" \n", "\n\n"]), ("three", ["a b", "c d", "e f"])):
        (tmp_path / name).mkdir()
        for i, text in enumerate(contents):
            (tmp_path / name / f"{i}.txt").write_text(text)
    extra = [] if words[0] in ("compare", "convert") else ["workers=0", "track=none"]
    out = [] if any(w.startswith("out=") for w in words) or words[0] == "compare" else ["out=made"]
    assert main([*words, *extra, *out]) == 2
    error = capfd.readouterr().err
    assert re.search(says, error), error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "made").exists()  # the corrected command can have the folder


def test_a_failed_start_leaves_the_folder_to_the_corrected_command(corpus, tmp_path):
    path, _ = corpus
    (tmp_path / "without").mkdir()
    (tmp_path / "mine").mkdir()
    for out in ("deep/new", "mine"):
        with pytest.raises(InputError, match=r"no tokenizer\.json"):
            tokenize.run(config(path, tmp_path / out, tokenizer=str(tmp_path / "without")))
    assert not (tmp_path / "deep").exists() and not any((tmp_path / "mine").iterdir())
    tokenize.run(config(path, tmp_path / "mine", tokenizer="bytes"))


def test_a_start_killed_before_any_unit_counts_as_new(corpus, tmp_path, monkeypatch):
    path, _ = corpus
    out = tmp_path / "out"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "_work", killed)
        with pytest.raises(SystemExit):
            tokenize.run(config(path, out))
    assert (out / "tokenizer").is_dir()  # for the same command to go on with
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"made with tokenizer=bpe \(now bytes\)"):
        tokenize.run(config(path, out, tokenizer="bytes"))
    (out / "notes.txt").unlink()
    tokenize.run(config(path, out, tokenizer="bytes"))
    assert TokenFolder.open(out).vocab_size == 257
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "config.yaml").write_text("steps: 5\n")
    with pytest.raises(InputError, match="was made with"):
        tokenize.run(config(path, run_folder))
    assert (run_folder / "config.yaml").read_text() == "steps: 5\n"


def test_help_needs_no_ray():
    code = "import sys; sys.modules['ray'] = None; from pipelines.tokenize import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    for word in ("source=stdlib", "vocab_size=4096", "val_fraction=0.05", "[stdlib, files, hub]"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "name, shows",
    [
        ("compare", ["Tokenizers on one text", "tokenize compare TEXT TOKENIZER ...", "  max_mb=8"]),
        ("convert", ["Token shards to nanoGPT's layout", "tokenize convert FOLDER out=FOLDER", "  out=(required)"]),
    ],
)
def test_the_further_commands_show_their_own_help(capsys, name, shows):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in shows), shown
    assert "Turn text into token shards" not in shown and "RECIPE" not in shown


# ---- commands, memory ------------------------------------------------------------------------------------------------


def test_compare_prints_a_row_per_tokenizer(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(texts(50)))
    assert main(["compare", str(tmp_path / "a.txt"), "bytes", "chars", "{kind: bpe, vocab_size: 400}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "unigram bits/byte is the entropy of the text's own token frequencies" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["bpe", "bytes", "chars"]
    assert all(" yes " in line for line in lines[2:])


def test_convert_takes_nanogpts_folder_to_shards_and_back(tmp_path, capsys):
    text = "".join(texts(20))
    (tmp_path / "n").mkdir()
    import pickle

    for name, ids in zip(("train", "val"), as_nanogpt(text), strict=True):
        ids.tofile(tmp_path / f"n/{name}.bin")
    chars = sorted(set(text))
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (tmp_path / "n/meta.pkl").write_bytes(pickle.dumps(meta))
    assert main(["convert", str(tmp_path / "n"), f"out={tmp_path / 's'}"]) == 0
    assert main(["convert", str(tmp_path / "s"), f"out={tmp_path / 'back'}"]) == 0
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "n" / name).read_bytes()
    assert main(["convert", str(tmp_path / "s"), f"out={tmp_path / 'back'}"]) == 2


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    code = (
        "import sys; from pipelines.tokenize import main, peak_memory_mb; "
        "code = main(sys.argv[1:]); print('PEAK', peak_memory_mb()); sys.exit(code)"
    )
    peaks = []
    for scale in (1, 12):
        path = tmp_path / f"{scale}.txt"
        path.write_text("\n".join(texts(200)) * 15 * scale)
        words = [f"source={path}", "tokenizer=bytes", "split=tail", "shard_mb=1", "workers=0", "track=none"]
        done = subprocess.run(
            [sys.executable, "-c", code, *words, f"out={tmp_path / f'out{scale}'}"],
            cwd=REPO,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(float(done.stdout.split("PEAK")[1]))
    grown = ((tmp_path / "12.txt").stat().st_size - (tmp_path / "1.txt").stat().st_size) / 2**20
    assert grown > 20 and peaks[1] < peaks[0] + 15, peaks  # what the allocator keeps varies by some megabytes
