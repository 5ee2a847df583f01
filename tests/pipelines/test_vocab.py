"""Tokenizers: known encodings, published merges, and backends that give the ids of the tokenizer they stand for."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.spec import ConfigError, build, plain
from pipelines.lib import hub, vocab
from pipelines.lib.config import InputError
from pipelines.lib.vocab import BPE, END_OF_TEXT, PROBES, Encoder, Vocabulary, load_tokenizer, vocabulary

TEXT = (
    "It was the best of times, it was the worst of times; it was the age of wisdom...\r\n\r\n  It's Ångström's café, "
    "naïve 日本語 и привет! def f(x): return x**2\n\n\n\tdon't we'll 1234 ½ 🙂 <|endoftext|> "
) * 40


def save(tokenizer, path):
    tokenizer.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return save(vocab.BPE(vocab_size=400).make(lambda: [TEXT]), tmp_path_factory.mktemp("bpe") / "t")


def plans(data_dir):
    """{encoding: [(text, ids)]} of test-plans.txt; a text may span lines."""
    out: dict[str, list] = {}
    for entry in (data_dir / "tiktoken/test-plans.txt").read_text(encoding="utf-8").split("EncodingName: ")[1:]:
        name, rest = entry.split("\nSample: ", 1)
        text, ids = rest.rsplit("\nEncoded: ", 1)
        out.setdefault(name, []).append((text, json.loads(ids)))
    return out


# ---- outside truth ---------------------------------------------------------------------------------------------------


def test_gpt2s_files_give_the_known_encodings(data_dir, tmp_path):
    known = plans(data_dir)["r50k_base"]
    assert len(known) >= 30
    for source in (data_dir / "gpt2-bpe", data_dir / "tiktoken/r50k_base.tiktoken"):
        tokenizer = load_tokenizer(source)
        encoder = Encoder(save(tokenizer, tmp_path / source.name))
        assert encoder.backend == "tiktoken"
        assert tokenizer.eos_token_id == 50256 == len(tokenizer) - 1
        for text, ids in known:
            assert tokenizer.encode(text, add_special_tokens=False) == ids, text
            assert encoder(text).tolist() == ids, text
            assert tokenizer.decode(ids) == text


def test_cl100k_ranks_give_the_known_encodings(data_dir, tmp_path):
    tokenizer = load_tokenizer(data_dir / "tiktoken/cl100k_base.tiktoken")
    encoder = Encoder(save(tokenizer, tmp_path / "t"))
    assert encoder.backend in ("tiktoken", "kitoken")
    for text, ids in plans(data_dir)["cl100k_base"]:
        assert encoder(text).tolist() == ids == tokenizer.encode(text, add_special_tokens=False), text


def test_exact_training_repeats_the_published_merges(data_dir):
    text = (data_dir / "bpe-training/corpus.en").read_bytes().decode()
    lines = (data_dir / "bpe-training/train-bpe-reference-merges.txt").read_text(encoding="utf-8").split("\n")
    published = [tuple(line.split(" ")) for line in lines if line]
    pattern = vocab.PATTERNS["gpt2"][0]
    merges = vocab.train_bpe([text], 499, pattern, "exact")
    assert [(vocab.printable(a), vocab.printable(b)) for a, b in merges] == published
    for trainer in ("rustbpe", "tokenizers"):  # they break ties by the order of meeting, so only most are the same
        found = {a + b for a, b in vocab.train_bpe([text], 499, pattern, trainer)}
        assert len(found & {a + b for a, b in merges}) >= 235


def test_exact_training_by_hand():
    """Pairs of 'aab aab ba': ab 2, aa 2, ba 1 and each word apart; the tie goes to the greater pair, (a, b)."""
    assert vocab.exact_bpe(["aab aab ba"], 2, r"\w+") == [(b"a", b"b"), (b"a", b"ab")]
    assert vocab.exact_bpe(["aaaa"], 9, r"\w+") == [(b"a", b"a"), (b"aa", b"aa")]


def test_real_tokenizer_json_is_read_and_encoded_as_its_library_does(data_dir, tmp_path):
    tokenizer = load_tokenizer(data_dir / "tokenizer-json/gpt-neox-olmo-dolma-v1_5.json")
    assert tokenizer.eos_token == END_OF_TEXT
    encoder = Encoder(save(tokenizer, tmp_path / "t"))
    text = (data_dir / "books/alice-in-wonderland.txt").read_bytes().decode()[:20000]
    raw = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert encoder(text).tolist() == raw


# ---- every kind, without any file from outside -----------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["rustbpe", "tokenizers", "exact"])
@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k", r"\w+|\W"])
def test_a_trained_bpe_survives_saving_and_gives_text_back(trainer, pattern, tmp_path):
    spec = build(Vocabulary, {"kind": "bpe", "vocab_size": 340, "trainer": trainer, "pattern": pattern})
    made = spec.make(lambda: [TEXT])
    path = save(made, tmp_path / "t")
    tokenizer, encoder = load_tokenizer(path), Encoder(path)
    assert len(tokenizer) == encoder.vocab_size == 340
    assert tokenizer.eos_token_id == 339
    assert encoder.backend in ("tiktoken", "kitoken")
    for text in (*PROBES, TEXT):
        ids = encoder(text)
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
        assert 339 not in ids  # the end-of-text token's characters in a text are text
    assert np.array_equal(encoder(TEXT), Encoder(path, backend="tokenizers")(TEXT))


def test_bytes_are_their_values_and_chars_are_numbered_as_nanogpt_does(tmp_path):
    bytes_ = Encoder(save(vocab.Bytes().make(lambda: []), tmp_path / "b"))
    assert bytes_.backend == "numpy" and bytes_.vocab_size == 257
    assert bytes_(TEXT).tobytes() == TEXT.encode()
    chars = save(vocab.Chars().make(lambda: [TEXT]), tmp_path / "c")
    encoder, tokenizer = Encoder(chars), load_tokenizer(chars)
    stoi = {c: i for i, c in enumerate(sorted(set(TEXT)))}
    assert encoder.backend == "numpy" and encoder.vocab_size == len(stoi) == len(tokenizer)
    assert encoder(TEXT).tolist() == [stoi[c] for c in TEXT] == tokenizer.encode(TEXT)
    assert tokenizer.decode(encoder(TEXT).tolist()) == TEXT
    assert tokenizer.eos_token_id is None
    with pytest.raises(InputError, match="no id for the character 'ß' \\(U\\+00DF\\)"):
        encoder("caße")
    ended = vocab.Chars(end_of_text=True).make(lambda: ["ab"])
    assert (len(ended), ended.eos_token_id) == (3, 2)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_a_sentencepiece_model_gives_the_ids_of_its_library(model_type, rule, tmp_path):
    import sentencepiece

    out = io.BytesIO()
    words = [w for w in TEXT.replace("\r\n", "\n").split("\n") if w.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=out,
        vocab_size=400,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity",
        minloglevel=2,
        hard_vocab_limit=False,
        num_threads=1,
    )
    (tmp_path / "spm.model").write_bytes(out.getvalue())
    reference = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    tokenizer = vocabulary(str(tmp_path / "spm.model")).make(lambda: [])
    vocab.save_tokenizer(tokenizer, tmp_path / "t")
    encoder, slow = Encoder(tmp_path / "t"), Encoder(tmp_path / "t", backend="tokenizers")
    assert encoder.backend == ("sentencepiece" if rule == "identity" else "tokenizers")
    for text in (*PROBES, TEXT[:500], "unseen words: zygote, Жук"):
        assert encoder(text).tolist() == reference.encode(text) == slow(text).tolist(), text
    assert tokenizer.eos_token == "</s>"
    if rule == "identity":
        assert tokenizer.decode(encoder("best of times, naïve ж").tolist()) == "best of times, naïve ж"


# ---- backends --------------------------------------------------------------------------------------------------------


def test_a_backend_with_other_ids_is_not_used(bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(vocab, "_tiktoken_backend", lambda tree: lambda text: np.zeros(3, np.uint32))
    encoder = Encoder(bpe)
    assert encoder.backend == "tokenizers"
    assert encoder("It was").tolist() == encoder.reference("It was").tolist()
    assert not Encoder(bpe, backend="tiktoken").audit("It was the best")


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k"])
@pytest.mark.parametrize("backend", ["tiktoken", "kitoken"])
def test_each_backend_is_equal_on_random_hard_texts_or_not_chosen(backend, pattern, tmp_path):
    if backend == "kitoken":
        pytest.importorskip("kitoken")
    path = save(vocab.BPE(vocab_size=340, pattern=pattern).make(lambda: [TEXT]), tmp_path / "t")
    encoder = Encoder(path, backend=backend)
    same = all(np.array_equal(encoder(text), encoder.reference(text)) for text in vocab.hard_texts(6000)[2000:])
    assert same or Encoder(path).backend != backend
    assert same or backend == "kitoken"


def test_lower_casing_and_added_words_keep_to_the_tokenizers_library(tmp_path, bpe):
    from tokenizers import AddedToken, Tokenizer, normalizers

    plain_ = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    plain_.normalizer = normalizers.Lowercase()
    plain_.save(str(tmp_path / "lower.json"))
    assert Encoder(tmp_path / "lower.json").backend == "tokenizers"
    added = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    added.add_tokens([AddedToken("times", normalized=False)])
    added.save(str(tmp_path / "added.json"))
    assert Encoder(tmp_path / "added.json").backend == "tokenizers"


def test_long_documents_are_parted_only_where_ids_stay_the_same(bpe):
    encoder, whole = Encoder(bpe), Encoder(bpe)
    book = TEXT * 60  # 600,000 characters, ten parts
    assert np.array_equal(encoder(book), whole._encode(book))
    assert encoder.cuts == 0
    rng = np.random.default_rng(0)
    mixed = "".join(rng.choice(list("ab1 \n\r\t.,'é中_/\u00a0\x1c"), 200_000))
    for pattern in ("gpt2", "cl100k", "o200k"):
        import tiktoken

        ranks = {bytes([b]): b for b in range(256)} | {b"a ": 256, b"a\n": 257, b" a": 258, b"\n\n": 259, b".\n": 260}
        encode = tiktoken.Encoding("t", pat_str=vocab.PATTERNS[pattern][1], mergeable_ranks=ranks, special_tokens={})
        parts = whole._split_at_seams(mixed)
        assert "".join(parts) == mixed and len(parts) > 2
        assert [i for p in parts for i in encode.encode_ordinary(p)] == encode.encode_ordinary(mixed)


def test_a_line_of_a_million_letters_is_cut_and_counted(bpe):
    encoder = Encoder(bpe)
    ids = encoder("x" * 2_500_000)
    assert encoder.cuts == 2
    assert load_tokenizer(bpe).decode(ids.tolist()) == "x" * 2_500_000


def test_token_bytes_add_up_to_the_bytes_of_the_text(bpe, tmp_path):
    chars = save(vocab.Chars().make(lambda: [TEXT, *PROBES]), tmp_path / "c")
    bytes_ = save(vocab.Bytes().make(lambda: []), tmp_path / "b")
    for path in (bpe, chars, bytes_):
        tokenizer, encoder = load_tokenizer(path), Encoder(path)
        table = vocab.token_bytes(tokenizer)
        assert len(table) == encoder.vocab_size
        for text in (*PROBES, TEXT):
            assert table[encoder(text)].sum() == len(text.encode())
        if tokenizer.eos_token_id is not None:
            assert table[tokenizer.eos_token_id] == 0


def test_compare_counts_by_hand(tmp_path):
    encoder = Encoder(save(vocab.Bytes().make(lambda: []), tmp_path / "b"))
    row = vocab.compare_on("aabb" * 25, encoder)
    assert (row["tokens"], row["bytes"], row["tokens_per_byte"], row["ids_used"]) == (100, 100, 1.0, 2)
    assert row["unigram_bits_per_byte"] == pytest.approx(1.0)  # two letters, half each: one bit a letter


# ---- settings and errors ---------------------------------------------------------------------------------------------


def test_every_kind_is_rebuilt_from_its_plain_form():
    for name, cls in Vocabulary.kinds.items():
        options = {"path": "x"} if "path" in cls.__dataclass_fields__ else {}
        spec = build(Vocabulary, {"kind": name, **options})
        assert build(Vocabulary, plain(spec)) == spec


def test_bad_tokenizers_are_refused_in_one_line(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "bad.model").write_bytes(b"nothing of the kind")
    (tmp_path / "bad.tiktoken").write_text("IQ== 0\n")
    (tmp_path / "r50k.tiktoken").write_text("not base64!\n")
    (tmp_path / "empty").mkdir()
    for name, says in (
        ("bad.json", "expected a tokenizer.json"),
        ("bad.model", "expected a SentencePiece model"),
        ("bad.tiktoken", "expected every byte as a token"),
        ("r50k.tiktoken", "expected a base64 token and a rank"),
        ("empty", "no tokenizer.json, vocab.json"),
        ("missing.model", "no such file"),
        ("missing/folder", "no tokenizer.json"),
    ):
        with pytest.raises(InputError, match=says) as error:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="at least 257"):
        build(Vocabulary, {"kind": "bpe", "vocab_size": 100})
    with pytest.raises(ConfigError, match="path is needed"):
        vocabulary("tiktoken")
    with pytest.raises(InputError, match="nor a readable file, folder or Hub name"):
        vocabulary("no-such-kind").make(lambda: [])


def test_a_mistyped_name_is_answered_with_the_nearest_one(tmp_path, monkeypatch):
    (tmp_path / "my_tokenizer").mkdir()
    monkeypatch.chdir(tmp_path)
    for answer, said in (("missing", "the Hub has none of that name"), ("unreachable", "the Hub cannot be reached")):
        monkeypatch.setattr(hub, "ask", lambda *_, answer=answer: answer)
        for name, meant in (("byts", "bytes"), ("gpt22", "gpt2"), ("my_tokeniser", "my_tokenizer")):
            with pytest.raises(InputError, match=f"{said}.*; did you mean '{meant}'") as error:
                vocabulary(name).make(lambda: [])
            assert "\n" not in str(error.value)


def test_without_a_network_the_hub_is_asked_once_and_one_line_is_said(tmp_path):
    """A server that hangs up on every request: the libraries alone ask it 12 times, over 47 s."""
    import socket
    import threading

    asked = []
    server = socket.create_server(("127.0.0.1", 0))

    def hang_up():
        while True:
            connection, _ = server.accept()
            asked.append(connection.recv(65536).split(b" ")[1])
            connection.close()

    threading.Thread(target=hang_up, daemon=True).start()
    (tmp_path / "a.txt").write_text("some text")
    code = (
        "from pipelines.tokenize import main\n"
        "rest = ['split=tail', 'workers=0', 'track=none', 'out=made']\n"
        "assert main(['source=a.txt', 'tokenizer=someone/gpt22', *rest]) == 2\n"
        "assert main(['source={kind: hub, name: someone/text}', 'tokenizer=bytes', *rest]) == 2\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    repo = str(Path(__file__).resolve().parents[2])
    local = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**environment, **local, "PYTHONPATH": repo, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines), done.stderr
    assert "tokenizer someone/gpt22" in lines[0] and "source someone/text" in lines[1]
    assert [path for path in asked if b"someone" in path] == [
        b"/api/models/someone/gpt22",
        b"/api/datasets/someone/text",
    ]


def test_a_pattern_that_is_no_regular_expression_is_refused_when_it_is_given():
    for kind in ({"kind": "bpe", "pattern": "("}, {"kind": "tiktoken", "path": "x", "pattern": "["}):
        with pytest.raises(ConfigError, match="nor a regular expression"):
            build(Vocabulary, kind)
    build(Vocabulary, {"kind": "bpe", "pattern": r"\w+|\W+"})
    with pytest.raises(ConfigError, match="rustbpe says"):  # a look-behind of any length: only tokenizers has it
        BPE(300, r"(?<=a|bc+)\w").make(lambda: ["some text"])
