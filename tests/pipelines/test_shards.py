"""Token shards: what is written is read back whole, damage is named, and Arrow itself reads the same."""

from __future__ import annotations

import itertools
import json
import pickle

import numpy as np
import pyarrow as pa
import pytest

from pipelines.lib.config import InputError
from pipelines.lib.shards import TokenFolder, folder_sha256, write_manifest, write_shard

V = 300


@pytest.fixture
def written(tmp_path):
    """Three train shards (one of a single document, one with an empty row) and one val shard; the flat truth beside."""
    rng = np.random.default_rng(0)
    lengths = [[5, 1, 300], [4096], [7, 0, 9]]
    splits, truth = {"train": {"shards": []}, "val": {"shards": []}}, []
    for n, row in enumerate(lengths):
        tokens = rng.integers(0, V, sum(row)).astype("<u2")
        truth.append(tokens)
        offsets = np.cumsum([0, *row])
        splits["train"]["shards"].append(
            write_shard(tmp_path / f"train-{n:05d}.arrow", tokens, offsets, 2 * len(tokens))
        )
    val = rng.integers(0, V, 50).astype("<u2")
    splits["val"]["shards"].append(write_shard(tmp_path / "val-00000.arrow", val, np.array([0, 20, 50]), 100))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    write_manifest(
        tmp_path,
        {
            "dtype": "uint16",
            "eot_id": 0,
            "tokenizer": {
                "folder": "tokenizer",
                "sha256": folder_sha256(tmp_path / "tokenizer"),
                "vocab_size": V,
                "kind": "bpe",
            },
            "source": {},
            "splits": splits,
        },
    )
    documents = np.repeat(np.arange(7), [5, 1, 300, 4096, 7, 0, 9])
    return tmp_path, np.concatenate(truth), documents


def test_windows_and_batches_equal_the_flat_array_across_shards(written):
    path, truth, _ = written
    train = TokenFolder.open(path, verify="sha256").split("train")
    assert (train.n_tokens, train.n_documents, train.n_bytes) == (len(truth), 7, 2 * len(truth))
    starts = np.random.default_rng(1).integers(0, len(truth) - 64, 500)
    assert np.array_equal(train.batch(starts, 64), truth[starts[:, None] + np.arange(64)])
    assert train.batch(starts, 64).dtype == np.int64
    for start, length in ((0, len(truth)), (300, 10), (306, 4096), (305, 4098), (len(truth), 0), (4, 1)):
        assert np.array_equal(train.window(start, length), truth[start : start + length])
    again = pickle.loads(pickle.dumps(train))  # noqa: S301
    assert np.array_equal(again.batch(starts, 64), train.batch(starts, 64))
    assert len(pickle.dumps(train)) < 2000


@pytest.mark.parametrize("start, length", [(-1, 5), (0, 10**6), (4418, 1)])
def test_a_window_outside_the_split_is_refused(written, start, length):
    train = TokenFolder.open(written[0]).split("train")
    with pytest.raises(IndexError, match="outside 0 to 4418"):
        train.window(start, length)
    with pytest.raises(IndexError, match="outside 0 to 4418"):
        train.batch(np.array([start]), length)


def test_documents_of_a_window_equal_a_count_by_hand(written):
    path, truth, documents = written
    train = TokenFolder.open(path).split("train")
    for start, length in ((0, 64), (3, 400), (0, len(truth)), (4400, 18), (4402, 16), (310, 1)):
        ids, positions = train.documents(start, length)
        expected = documents[start : start + length]
        assert np.array_equal(ids, expected)
        by_hand = [0]
        for a, b in itertools.pairwise(expected):
            by_hand.append(by_hand[-1] + 1 if a == b else 0)
        assert np.array_equal(positions, by_hand)


def test_arrow_reads_a_shard_as_a_table_of_documents(written):
    path, truth, _ = written
    with pa.memory_map(str(path / "train-00000.arrow")) as source:
        rows = pa.ipc.open_file(source).read_all()["tokens"].to_pylist()
    assert [len(r) for r in rows] == [5, 1, 300]
    assert np.array_equal(np.concatenate(rows), truth[:306])
    assert TokenFolder.open(path).split("train").document(2).tolist() == rows[2]


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[:-100]
    elif how == "emptied":
        data = bytearray()
    elif how == "bit flipped":
        data[len(data) // 2] ^= 1
    elif how == "removed":
        path.unlink()
        return
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "emptied", "bit flipped", "removed"])
def test_a_damaged_shard_is_named_with_what_was_expected_and_found(written, how):
    path, _, _ = written
    damage(path / "train-00001.arrow", how)
    with pytest.raises(InputError, match=r"train-00001\.arrow: expected .* found ") as error:
        TokenFolder.open(path, verify="sha256")
    assert "\n" not in str(error.value)
    if how != "bit flipped":
        with pytest.raises(InputError, match=r"train-00001\.arrow"):
            TokenFolder.open(path)  # the length alone tells


def test_a_swapped_tokenizer_or_an_edited_manifest_is_refused(written):
    path, _, _ = written
    (path / "tokenizer" / "tokenizer.json").write_text("{ }")
    with pytest.raises(InputError, match="tokenizer: expected sha256"):
        TokenFolder.open(path)
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"].reverse()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: expected fingerprint"):
        TokenFolder.open(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="expected a manifest"):
        TokenFolder.open(path)


def test_an_id_beyond_the_vocabulary_is_refused(written):
    path, _, _ = written
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["tokenizer"]["vocab_size"] = 200
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"token id 299 found, but the tokenizer has only 200 ids"):
        TokenFolder.open(path)


def test_a_missing_split_says_what_there_is(written):
    folder = TokenFolder.open(written[0])
    with pytest.raises(
        InputError, match=r"no tokens in split 'test'; there is train \(4418 tokens\), val \(50 tokens\)"
    ):
        folder.split("test")
    with pytest.raises(InputError, match="no such file or folder"):
        TokenFolder.open(written[0] / "nowhere")


def test_the_fingerprint_follows_content_and_not_place(written, tmp_path_factory):
    import shutil

    path, _, _ = written
    other = tmp_path_factory.mktemp("moved") / "elsewhere"
    shutil.copytree(path, other)
    assert TokenFolder.open(other).fingerprint == TokenFolder.open(path).fingerprint
