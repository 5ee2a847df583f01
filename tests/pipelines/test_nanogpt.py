"""Tokens in the layouts of others: read where they lie, converted both ways, nothing unpickled that could run."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from pipelines.lib.config import InputError
from pipelines.lib.nanogpt import from_foreign, read_meta, to_nanogpt
from pipelines.lib.shards import TokenFolder
from pipelines.lib.vocab import Vocabulary, load_tokenizer

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n" * 30


def prepare_as_nanogpt(folder, text=TEXT):
    """data/shakespeare_char/prepare.py of nanoGPT, in its own words: 90/10 by characters, sorted characters."""
    folder.mkdir(parents=True, exist_ok=True)
    chars = sorted(set(text))
    stoi = {c: i for i, c in enumerate(chars)}
    n = len(text)
    for name, part in (("train", text[: int(n * 0.9)]), ("val", text[int(n * 0.9) :])):
        np.array([stoi[c] for c in part], dtype=np.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def test_a_nanogpt_folder_opens_as_it_is(tmp_path):
    folder = TokenFolder.open(prepare_as_nanogpt(tmp_path / "n"))
    itos = sorted(set(TEXT))
    train, val = folder.split("train"), folder.split("val")
    assert "".join(itos[i] for i in [*train.window(0, len(train)), *val.window(0, len(val))]) == TEXT
    assert folder.vocab_size == len(itos)
    assert folder.token_bytes().tolist() == [1] * len(itos)
    assert folder.manifest["eot_id"] is None
    ids, positions = train.documents(100, 20)
    assert ids.tolist() == [0] * 20 and positions.tolist() == list(range(20))


def test_without_meta_it_is_gpt2s_and_documents_end_at_its_token(tmp_path):
    tokens = np.array([5, 6, 50256, 7, 8, 9, 50256, 1], np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    folder = TokenFolder.open(tmp_path)
    assert folder.vocab_size == 50257
    ids, positions = folder.split("train").documents(1, 7)
    assert ids.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert positions.tolist() == [0, 1, 0, 1, 2, 3, 0]


def test_both_conversions_give_the_tokens_back(tmp_path):
    source = prepare_as_nanogpt(tmp_path / "n")
    shards = tmp_path / "shards"
    manifest = from_foreign(TokenFolder.open(source), shards, shard_tokens=500)
    assert len(manifest["splits"]["train"]["shards"]) > 3
    assert manifest["splits"]["train"]["bytes"] == int(len(TEXT) * 0.9)
    folder = TokenFolder.open(shards, verify="sha256")
    counts = to_nanogpt(folder, tmp_path / "back")
    assert counts == {"train": int(len(TEXT) * 0.9), "val": len(TEXT) - int(len(TEXT) * 0.9)}
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert read_meta(tmp_path / "back" / "meta.pkl") == read_meta(source / "meta.pkl")


def test_ids_are_not_relabelled_by_another_tokenizer_than_the_one_beside_them(tmp_path):
    foreign = TokenFolder.open(prepare_as_nanogpt(tmp_path / "n"))
    given = Vocabulary.kinds["bytes"]().make(lambda: [])
    with pytest.raises(InputError, match=r"n/meta\.pkl beside the tokens has \d+ ids for other pieces"):
        from_foreign(foreign, tmp_path / "s", tokenizer=given)
    with pytest.raises(InputError, match=r"n/meta\.pkl beside"):  # one file of that folder is no way round it
        from_foreign(TokenFolder.open(tmp_path / "n/train.bin"), tmp_path / "s", tokenizer=given)
    assert not (tmp_path / "s").exists()
    from_foreign(foreign, tmp_path / "s")
    to_nanogpt(TokenFolder.open(tmp_path / "s"), tmp_path / "back")
    with pytest.raises(InputError, match="back/tokenizer beside the tokens"):
        from_foreign(TokenFolder.open(tmp_path / "back"), tmp_path / "again", tokenizer=given)
    same = load_tokenizer(tmp_path / "s")
    assert from_foreign(TokenFolder.open(tmp_path / "back"), tmp_path / "again", tokenizer=same)["eot_id"] is None


def test_shards_are_cut_at_document_ends(tmp_path):
    rng = np.random.default_rng(0)
    ends = np.sort(rng.choice(np.arange(1, 5000), 60, replace=False))
    tokens = rng.integers(0, 9, 5000).astype(np.uint16)
    tokens[ends - 1] = 9
    tokens[:-1][tokens[:-1] == 9] = 9
    np.save(tmp_path / "train.npy", tokens)
    np.save(tmp_path / "offsets_train.npy", np.array([0, *ends, 5000], np.int64))
    from pipelines.lib.vocab import chars_tokenizer

    source = TokenFolder.open(tmp_path)
    assert source.split("train").n_documents == 61
    from_foreign(source, tmp_path / "s", shard_tokens=400, tokenizer=chars_tokenizer(list("abcdefghij")))
    train = TokenFolder.open(tmp_path / "s", verify="sha256").split("train")
    assert np.array_equal(train.window(0, 5000), tokens)
    assert max(s.tokens for s in train.shards) <= 400
    assert set(np.cumsum([s.tokens for s in train.shards])) - {5000} <= set(ends) | set(range(400, 5000, 1))
    assert train.n_documents >= 61
    for start in (0, 1234, 4000):
        ours, theirs = train.documents(start, 300)[1], source.split("train").documents(start, 300)[1]
        assert np.array_equal(ours == 0, theirs == 0) or max(np.diff([0, *ends])) > 400


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_numpy_files_are_read_with_and_without_offsets(tmp_path, compressed, dtype):
    tokens, val = np.arange(100, dtype=dtype), np.arange(7, dtype=dtype)
    offsets = np.array([0, 40, 40, 100], np.int64)
    (tmp_path / "d").mkdir()
    np.save(tmp_path / "d/part1.npy", tokens)
    np.save(tmp_path / "d/part2.npy", tokens)
    np.save(tmp_path / "d/val.npy", val)
    folder = TokenFolder.open(tmp_path / "d")
    assert np.array_equal(folder.split("train").window(90, 20), [*range(90, 100), *range(10)])
    assert folder.split("val").n_tokens == 7
    assert folder.split("train").n_documents == 0
    for name in ("part1", "part2", "val"):
        np.save(tmp_path / f"d/offsets_{name}.npy", offsets if name != "val" else np.array([0, 7]))
    train = TokenFolder.open(tmp_path / "d").split("train")
    assert train.n_documents == 6
    assert train.documents(38, 4)[0].tolist() == [0, 0, 2, 2]
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "a.npz", train=tokens, val=val, offsets_train=offsets)
    archive = TokenFolder.open(tmp_path / "a.npz")
    assert np.array_equal(archive.split("train").batch(np.array([3, 50]), 5), [[3, 4, 5, 6, 7], [50, 51, 52, 53, 54]])
    assert archive.split("val").n_tokens == 7
    assert archive.vocab_size == 100
    if not compressed:
        assert archive.split("train").document(2).tolist() == list(range(40, 100))
    again = pickle.loads(pickle.dumps(archive.split("train")))  # noqa: S301
    assert again.window(0, 3).tolist() == [0, 1, 2]


class Runs:
    """What a hostile pickle does: it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    prepare_as_nanogpt(tmp_path / "n")
    trap = tmp_path / "trap"
    (tmp_path / "n/meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "x": Runs(str(trap))}))
    with pytest.raises(InputError, match=r"meta\.pkl: refused, it asks for posix\.mkdir"):
        TokenFolder.open(tmp_path / "n")
    assert not trap.exists()


def test_damage_and_mistakes_are_named(tmp_path):
    def folder(name, train=b"\1\0\2\0", meta=None):
        path = tmp_path / name
        path.mkdir()
        (path / "train.bin").write_bytes(train)
        if meta is not None:
            (path / "meta.pkl").write_bytes(meta)
        return path

    np.save(tmp_path / "cut.npy", np.arange(100, dtype=np.uint16))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-10])
    np.save(tmp_path / "floats.npy", np.ones(3))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "no.npz").write_bytes(b"PK nothing")
    offsets = tmp_path / "offsets"
    offsets.mkdir()
    np.save(offsets / "train.npy", np.arange(10, dtype=np.uint16))
    np.save(offsets / "offsets_train.npy", np.array([0, 7, 3, 10]))
    (tmp_path / "empty").mkdir()
    small = pickle.dumps({"vocab_size": 2})
    for path, says in (
        (folder("odd", b"\1\0\2"), "found 3 bytes"),
        (folder("none", b""), "found 0 bytes"),
        (folder("ids", meta=small), "token ids 0 to 2 found, but the vocabulary has ids 0 to 1"),
        (folder("list", meta=pickle.dumps([1])), "expected a dict with a whole vocab_size"),
        (folder("cut", meta=small[:-4]), "expected a pickled dict"),
        (tmp_path / "cut.npy", "expected 328 bytes, found 318"),
        (tmp_path / "floats.npy", "expected one row of whole numbers, found float64"),
        (tmp_path / "objects.npy", "found object"),
        (tmp_path / "no.npz", "expected a .npz archive"),
        (offsets, "expected int64 offsets rising from 0 to 10"),
        (tmp_path / "empty", "no manifest.json, train.bin"),
    ):
        with pytest.raises(InputError, match=says) as error:
            TokenFolder.open(path)
        assert "\n" not in str(error.value)
