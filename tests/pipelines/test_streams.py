"""Streams beside the text: what annotators read, ids joined and taken apart, tokenizers that need no code of ours."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from models.families import load
from models.spec import ConfigError, build
from pipelines import search, tokenize, train
from pipelines.export import main as export
from pipelines.lib import streams, vocab
from pipelines.lib.config import InputError
from pipelines.lib.search.ledger import Ledger
from pipelines.lib.shards import TokenFolder
from pipelines.lib.streams import ANNOTATORS
from pipelines.lib.vocab import END_OF_TEXT, Chars, Encoder, load_tokenizer
from pipelines.sample import main as sample
from serving.engine import Engine, RequestError, SamplingParams
from tests.pipelines.search.small import search_words
from tests.pipelines.tiny import tiny_config
from tests.serving.tiny import gpt

TEXT = "Before we proceed any Further, hear me speak. It's 1623: No. 42 ALL\n\n"
TEXT += "  ſtraße Ǆ ǅ ǆ e\u0301 ٣ ½ 日本 🙂\u2003 internationalised99\t"
SIZES = {"case": 3, "class": 4, "word_position": 12}


def annotated(text, name):
    """The digits of a stream, character by character, by Python's own tables."""
    found, place = [], 0
    for c in text:
        category = unicodedata.category(c)
        place = min(place + 1, 11) if category[0] in "LMN" else 0
        case = {"Ll": 1, "Lu": 2, "Lt": 2}.get(category, 0)
        kind = 3 if c.isspace() else {"L": 1, "M": 1, "N": 2}.get(category[0], 0)
        found.append({"case": case, "class": kind, "word_position": place}[name])
    return found


def written_out(text, chars, names):
    """Ids by the formula, in plain Python."""
    ids, stride = [chars.index(c) for c in text], len(chars)
    for name in names:
        ids = [i + stride * d for i, d in zip(ids, annotated(text, name), strict=True)]
        stride *= SIZES[name]
    return ids


@pytest.mark.parametrize(
    "names", [*((name,) for name in ANNOTATORS), ("case", "word_position"), ("word_position", "class", "case")]
)
def test_a_saved_tokenizer_encodes_every_stream_as_a_loop_over_characters_and_decodes_to_the_text(names, tmp_path):
    from transformers import AutoTokenizer

    made = Chars(beside=names).make(lambda: [TEXT])
    made.save_pretrained(tmp_path)
    chars = sorted(set(TEXT))
    tokenizer, encoder = AutoTokenizer.from_pretrained(tmp_path), Encoder(tmp_path)
    assert encoder.backend == "numpy" and encoder.sizes == [len(chars), *(SIZES[name] for name in names)]
    assert len(tokenizer) == np.prod(encoder.sizes)
    for text in (TEXT, TEXT[::-1], "", "A", " "):
        ids = written_out(text, chars, names)
        assert tokenizer(text).input_ids == ids == encoder(text).tolist()
        assert tokenizer.decode(ids) == text
    assert vocab.token_bytes(made)[written_out(TEXT, chars, names)].sum() == len(TEXT.encode())


def test_every_id_has_the_piece_of_its_streams_also_beside_an_end_of_text_token():
    made = vocab.chars_tokenizer("ab", END_OF_TEXT, ("case",))
    assert (made.eos_token, made.eos_token_id, len(made)) == (END_OF_TEXT, 2, 9)
    assert [made.decode([i]) for i in range(9)] == ["a", "b", END_OF_TEXT] * 3
    assert vocab.token_bytes(made).tolist() == [1, 1, 0] * 3
    assert made.decode([0, 2, 1], skip_special_tokens=True) == "ab"
    assert streams.find(json.loads(made.backend_tokenizer.to_str())) == streams.Found(
        ["a", "b", END_OF_TEXT], (3, 3), ("case",)
    )


def test_characters_without_an_id_are_refused_marks_in_a_text_among_them(tmp_path):
    made = vocab.chars_tokenizer("ab", None, ("case",))
    made.save_pretrained(tmp_path)
    for text in ("c", "a\U00100001"):
        with pytest.raises(Exception, match="Missing"):
            made(text)
        with pytest.raises(InputError, match="no id for the character"):
            Encoder(tmp_path)(text)
    with pytest.raises(InputError, match=r"U\+100000 to U\+10FFFD that mark streams"):
        vocab.chars_tokenizer("a\U00100001", None, ("case",))


def test_a_text_is_tokenized_with_streams_in_one_command(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT * 30)
    words = [f"source={tmp_path / 'a.txt'}", f"out={tmp_path / 'out'}", "workers=0", "track=none"]
    assert tokenize.main(["tokenize_shakespeare_streams", *words]) == 0
    chars = sorted(set(TEXT))
    assert f"model.embedding={{kind: streams, sizes: [{len(chars)}, 3, 12]}}" in capsys.readouterr().out
    folder = TokenFolder.open(tmp_path / "out", verify="sha256")
    cut = int(len(TEXT) * 30 * 0.9)
    for name, text in (("train", (TEXT * 30)[:cut]), ("val", (TEXT * 30)[cut:])):
        ids = folder.split(name).window(0, len(text))
        assert ids.tolist() == written_out(text, chars, ("case", "word_position"))
        assert folder.split(name).n_bytes == len(text.encode())
    assert folder.manifest["tokenizer"]["sizes"] == [len(chars), 3, 12]


@pytest.mark.parametrize(
    "beside, said",
    [("[clas]", "beside=clas: no such stream; did you mean 'class'"), ("[case, case]", "case comes twice")],
)
def test_streams_that_cannot_be_are_refused(beside, said):
    import yaml

    with pytest.raises(ConfigError, match=said):
        build(vocab.Vocabulary, {"kind": "chars", "beside": yaml.safe_load(beside)})


# ---- joined folders


@pytest.fixture
def aligned(tmp_path):
    """Two folders of shards with the same documents: characters, and the same text's vowels as another alphabet."""
    text = [f"The {w} sat on the mat.\n" for w in ("cat", "dog", "owl", "hen", "fox", "emu", "yak", "cod")]
    for name, change in (("text", str), ("vowels", lambda t: "".join("v" if c in "aeiou" else "c" for c in t))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": change(t)}) for t in text))
        config = tokenize.TokenizeConfig(
            source=build(tokenize.Source, {"kind": "files", "path": str(tmp_path / f"{name}.jsonl")}),
            tokenizer=Chars(end_of_text=True), out=str(tmp_path / name), val_documents=2, workers=0, track="none",
        )  # fmt: skip
        tokenize.run(config)
    return tmp_path


def test_joined_tokens_are_those_of_each_folder_and_decode_to_the_first_ones_text(aligned, capsys):
    out = aligned / "joined"
    assert tokenize.main(["streams", str(aligned / "text"), str(aligned / "vowels"), f"out={out}"]) == 0
    folder, text, vowels = (TokenFolder.open(aligned / n, verify="sha256") for n in ("joined", "text", "vowels"))
    sizes = [text.vocab_size, vowels.vocab_size]
    assert f"sizes: {sizes}" in capsys.readouterr().out
    assert folder.manifest["tokenizer"]["sizes"] == sizes and folder.vocab_size == sizes[0] * sizes[1]
    assert [s["fingerprint"] for s in folder.manifest["source"]["streams"]] == [text.fingerprint, vowels.fingerprint]
    tokenizer, first = load_tokenizer(folder.tokenizer_dir), load_tokenizer(text.tokenizer_dir)
    assert folder.manifest["eot_id"] == tokenizer.eos_token_id == text.vocab_size * vowels.vocab_size - 1
    for name in ("train", "val"):
        ours, a, b = (f.split(name) for f in (folder, text, vowels))
        assert (ours.n_documents, ours.n_bytes) == (a.n_documents, a.n_bytes)
        for i in range(a.n_documents):
            ids = ours.document(i).tolist()
            assert [id_ % sizes[0] for id_ in ids] == a.document(i).tolist()
            assert [id_ // sizes[0] for id_ in ids] == b.document(i).tolist()
            assert tokenizer.decode(ids) == first.decode(a.document(i).tolist())
    assert (folder.token_bytes() == np.tile(text.token_bytes(), sizes[1])).all()
    assert (folder.token_bytes() == vocab.token_bytes(tokenizer)).all()


def test_numbers_of_another_program_are_joined_to_bytes(tmp_path):
    text = "A small text, ünïcode and all. " * 8
    (tmp_path / "a.txt").write_text(text)
    words = [f"source={tmp_path / 'a.txt'}", "tokenizer=bytes", "split=tail", "end_of_text=false"]
    assert tokenize.main([*words, f"out={tmp_path / 'bytes'}", "workers=0", "track=none"]) == 0
    (tmp_path / "tags").mkdir()
    given = {}
    for name, split in TokenFolder.open(tmp_path / "bytes").splits.items():
        given[name] = np.random.default_rng(0).integers(0, 7, split.n_tokens).astype(np.uint16)
        given[name][0] = 6  # as many words as the largest number says
        np.save(tmp_path / f"tags/{name}.npy", given[name])
    assert tokenize.main(["streams", str(tmp_path / "bytes"), str(tmp_path / "tags"), f"out={tmp_path / 'out'}"]) == 0
    folder = TokenFolder.open(tmp_path / "out")
    tokenizer, ids = load_tokenizer(folder.tokenizer_dir), {}
    for name, split in folder.splits.items():
        ids[name] = split.window(0, split.n_tokens).tolist()
        assert [i // 257 for i in ids[name]] == given[name].tolist()
    assert tokenizer.decode(ids["train"] + ids["val"]) == text


def test_a_folder_of_streams_is_joined_stream_by_stream(tmp_path):
    (tmp_path / "a.txt").write_text("A Text of several Words. " * 8)
    words = [f"source={tmp_path / 'a.txt'}", "tokenizer={kind: chars, beside: [case]}", "val_fraction=0"]
    assert tokenize.main([*words, f"out={tmp_path / 'chars'}", "workers=0", "track=none"]) == 0
    chars = TokenFolder.open(tmp_path / "chars")
    tags = np.arange(chars.split("train").n_tokens, dtype=np.uint16) % 5
    np.save(tmp_path / "train.npy", tags)
    manifest = streams.join([chars, TokenFolder.open(tmp_path / "train.npy")], tmp_path / "out")
    first = chars.manifest["tokenizer"]["sizes"][0]
    assert manifest["tokenizer"]["sizes"] == [first, 3, 5] and manifest["tokenizer"]["vocab_size"] == first * 15
    folder = TokenFolder.open(tmp_path / "out")
    ids, tokenizer = folder.split("train").window(0, len(tags)), load_tokenizer(folder.tokenizer_dir)
    assert (ids // (first * 3) == tags).all() and tokenizer.decode(ids.tolist()) == "A Text of several Words. " * 8
    assert (ids // first % 3).tolist() == annotated("A Text of several Words. " * 8, "case")
    found = streams.find(json.loads(tokenizer.backend_tokenizer.to_str()))
    assert found is not None and (found.sizes, found.beside) == ((first, 3, 5), ())


def test_text_alone_is_not_enough_for_streams_of_others(aligned):
    tokenize.main(["streams", str(aligned / "text"), str(aligned / "vowels"), f"out={aligned / 'joined'}"])
    folder = aligned / "joined/tokenizer"
    with pytest.raises(InputError, match="text alone does not give these ids"):
        Encoder(folder)
    with pytest.raises(RequestError, match="text alone does not give this model's tokens"):
        Engine(gpt(), load_tokenizer(folder)).encode("The cat")
    with pytest.raises(Exception, match="Missing"):
        load_tokenizer(folder)("The cat")


def test_folders_that_do_not_stand_beside_each_other_are_refused(aligned, tmp_path):
    text, vowels = (TokenFolder.open(aligned / n) for n in ("text", "vowels"))
    split = vowels.splits["val"]
    (short := tmp_path / "short").mkdir()
    (moved := tmp_path / "moved").mkdir()
    for name, tokens in text.splits.items():
        np.save(short / f"{name}.npy", np.zeros(tokens.n_tokens - 1, np.uint16))
        np.save(moved / f"{name}.npy", np.zeros(tokens.n_tokens, np.uint16))
        ends = np.concatenate([[0], np.concatenate([tokens.document_ends(i) for i in range(len(tokens.shards))])])
        ends[1] -= 1
        np.save(moved / f"offsets_{name}.npy", ends.astype(np.int64))
    with pytest.raises(InputError, match=rf"short: {text.splits['train'].n_tokens - 1:,} train tokens, but .*text has"):
        streams.join([text, TokenFolder.open(short)], tmp_path / "x")
    with pytest.raises(InputError, match="moved: train document 0 ends at token"):
        streams.join([text, TokenFolder.open(moved)], tmp_path / "x")
    np.save(moved / "offsets_train.npy", np.array([0, text.splits["train"].n_tokens]))
    with pytest.raises(InputError, match="moved: train document 0 ends at token"):
        streams.join([text, TokenFolder.open(moved)], tmp_path / "x")
    vowels.splits = {"train": vowels.splits["train"]}
    with pytest.raises(InputError, match=r"vowels has the splits train, .*text has train, val"):
        streams.join([text, vowels], tmp_path / "x")
    vowels.splits["val"], vowels.manifest["eot_id"] = split, None
    with pytest.raises(InputError, match="vowels: no end-of-text id"):
        streams.join([text, vowels], tmp_path / "x")
    vowels.vocab_size, vowels.manifest["eot_id"] = 1 << 20, 0
    with pytest.raises(InputError, match="can be handled"):
        streams.join([text, vowels], tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---- the whole way


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three updates on three streams; its data lie beside it."""
    home = tmp_path_factory.mktemp("streams")
    (home / "a.txt").write_text("To be, or not to be: That is the question. " * 60)
    words = [f"source={home / 'a.txt'}", f"out={home / 'data'}", "workers=0", "track=none"]
    assert tokenize.main(["tokenize_shakespeare_streams", *words]) == 0
    train.run(config_of(home, TokenFolder.open(home / "data").manifest["tokenizer"]["sizes"]))
    return home / "run"


def config_of(home, sizes):
    model = {"embedding": {"kind": "streams", "sizes": sizes}, "vocab_size": None}
    return build(train.TrainConfig, tiny_config(home / "data", home / "run", model=model, steps=3, eval_every=3))


def test_validation_names_the_nats_of_each_stream(run):
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert sum(row[f"val/stream_{i}_nll"] for i in (1, 2, 3)) == pytest.approx(row["val/nll"])


def test_sizes_that_are_not_the_datas_are_refused(run):
    first = TokenFolder.open(run.parent / "data").manifest["tokenizer"]["sizes"][0]
    with pytest.raises(InputError, match=rf"give model\.embedding\.sizes=\[{first}, 3, 12\]"):
        train.run(config_of(run.parent, [first, 12, 3]))


def test_a_search_can_have_the_texts_own_nats_as_its_objective(tmp_path, capsys):
    embedding = {"kind": "streams", "sizes": [32, 4]}
    settings = {"steps": 2, "eval_every": 2, "model.embedding": embedding}
    words = search_words(tmp_path, fixed=settings, objective={"metric": "val/stream_1_nll"})
    assert search.main(words) == 0
    trials = Ledger(tmp_path / "out").trials
    assert len(trials) == 4 and all(0 < t.metrics["val/stream_1_nll"] < t.metrics["val/nll"] for t in trials)
    assert search.main(search_words(tmp_path, objective={"metric": "val/stream_1_nll"})) == 2
    assert "val/stream_1_nll is not measured at validation" in capsys.readouterr().err


def test_a_text_is_continued_as_text(run, capsys):
    assert sample([str(run), "--prompt", "To be", "max_tokens=8", "seed=1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("To be") and len(printed) == len("To be\n") + 8
    assert not any(streams.FIRST <= ord(c) <= streams.LAST for c in printed)


@pytest.mark.slow
def test_an_exported_folder_encodes_and_generates_without_this_code(run, tmp_path):
    folder = str(tmp_path / "exported")
    assert export([str(run), folder, "track=none"]) == 0
    code = """import sys
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])  # no code for it is needed
inputs = tokenizer("To be", return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
assert not any(name.split(".")[0] in ("models", "pipelines") for name in sys.modules)
print(out, "|", tokenizer.decode(out))"""
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    ids, text = done.stdout.rstrip("\n").split(" | ", 1)
    engine = Engine(load(folder), load_tokenizer(folder))
    (request,) = engine.complete(["To be"], SamplingParams(max_tokens=8, temperature=0))
    assert json.loads(ids)[5:] == request.tokens and text == "To be" + request.text
