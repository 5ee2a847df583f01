"""Sources: every kind of file gives its documents, awkward ones a defined answer, slices what the whole gives."""

from __future__ import annotations

import codecs
import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from models.spec import ConfigError, build, plain
from pipelines.lib import corpus
from pipelines.lib.config import InputError
from pipelines.lib.corpus import Files, Hub, Source, Stdlib, parse_split, sample, source

MB = 2**20


def read(origin, slice_bytes=MB):
    """(documents joined from their pieces, counts) of a source, slice by slice."""
    plan, counts = origin.plan(slice_bytes), Counter()
    counts.update(plan.counts)
    documents: dict[str, str] = {}
    ended = Counter()
    for piece in plan.slices:
        for d in origin.read(piece, counts):
            assert d.n_bytes == len(d.text.encode())
            assert d.begins == (d.id not in documents)
            documents[d.id] = documents.get(d.id, "") + d.text
            ended[d.id] += d.ends
    assert set(ended.values()) <= {1}
    return list(documents.values()), +counts


# ---- awkward text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, text, counted",
    [
        (b"plain\n", "plain\n", {}),
        (codecs.BOM_UTF8 + "é".encode(), "é", {"byte_order_marks": 1}),
        (b"a\r\nb\rc\n", "a\nb\nc\n", {"documents_with_cr": 1}),
        ("café à la crème".encode("latin-1"), "café à la crème", {"latin1_files": 1}),
        ("“quoted” – 5 €".encode("cp1252"), "“quoted” – 5 €", {"latin1_files": 1}),
        (b"caf\xe9 \x81 x", "caf\xe9 \x81 x", {"latin1_files": 1}),
        ("é".encode() * 9 + b"\xff!", "é" * 9 + "\ufffd!", {"replaced_characters": 1}),
        ("z\u00fcrich".encode("utf-16"), "zürich", {"utf16_files": 1}),
        (b"say <|endoftext|> now", "say <|endoftext|> now", {}),
    ],
)
def test_each_kind_of_text_has_a_defined_answer(tmp_path, data, text, counted):
    (tmp_path / "a.txt").write_bytes(data)
    assert read(Files(str(tmp_path / "a.txt"))) == ([text], counted)


def test_what_is_empty_or_no_text_is_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n\t\r\n")
    (tmp_path / "zeros.txt").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    (tmp_path / "controls.txt").write_bytes(bytes(range(1, 9)) * 50)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    documents, counts = read(Files(str(tmp_path)))
    assert documents == ["text"]
    assert counts == {"empty_documents": 2, "not_text_files": 2, "other_files": 1, "documents_with_cr": 1}
    assert Files(str(tmp_path)).plan(MB).left_out == ["picture.png"]


def test_newlines_can_be_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb")
    assert read(Files(str(tmp_path), newlines="keep"))[0] == ["a\r\nb"]


def test_real_latin1_and_marked_books_are_read_whole(data_dir):
    documents, counts = read(Files(str(data_dir / "books")))
    candide = (data_dir / "books/candide-fr-latin1.txt").read_bytes().decode("latin-1").replace("\r\n", "\n")
    assert candide in documents
    assert counts["latin1_files"] == 1
    assert len(documents) == 6
    assert not any("\r" in d or d.startswith("\ufeff") for d in documents)


# ---- large files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slice_bytes", [1000, 4096, 10**5])
def test_slices_of_a_text_give_the_text(tmp_path, monkeypatch, slice_bytes):
    monkeypatch.setattr(corpus, "PIECE", 3000)
    monkeypatch.setattr(corpus, "SEAM_SEARCH", 500)
    text = "Wörter, 日本語 und mehr;\n\n\tdas_ist so. " * 700 + "x" * 3000 + "é" * 2500 + " end"
    (tmp_path / "a.txt").write_text(text)
    origin = Files(str(tmp_path / "a.txt"))
    documents, counts = read(origin, slice_bytes)
    assert documents == [text]
    assert set(counts) <= {"cut_runs"}
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        (tmp_path / f"b.txt{suffix}").write_bytes(pack(text.encode()))
        assert read(Files(str(tmp_path / f"b.txt{suffix}")))[0] == [text]


def test_pieces_of_a_text_get_the_ids_of_the_whole(tmp_path, monkeypatch):
    from pipelines.lib.vocab import BPE, Encoder

    monkeypatch.setattr(corpus, "PIECE", 700)
    text = "It's so: don't stop!  Ever_more  (12 345)\n\nNext line.\r\n And 日本語 more, again; " * 100
    BPE(vocab_size=330).make(lambda: [text]).save_pretrained(str(tmp_path / "t"))
    encoder = Encoder(tmp_path / "t")
    (tmp_path / "a.txt").write_bytes(text.encode())
    origin = Files(str(tmp_path / "a.txt"), newlines="keep")
    pieces = [d for s in origin.plan(2000).slices for d in origin.read(s, Counter())]
    assert len(pieces) > 10
    assert [i for d in pieces for i in encoder(d.text)] == encoder(text).tolist()


def test_a_line_of_fifty_megabytes_is_one_document_in_pieces(tmp_path):
    line = "word " * (10 * MB)
    (tmp_path / "a.txt").write_text(line)
    origin = Files(str(tmp_path / "a.txt"))
    counts = Counter()
    pieces = [d for s in origin.plan(16 * MB).slices for d in origin.read(s, counts)]
    assert "".join(d.text for d in pieces) == line
    assert max(len(d.text) for d in pieces) <= 9 * MB
    assert [d.begins for d in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [d.ends for d in pieces] == [False] * (len(pieces) - 1) + [True]
    assert not counts
    (tmp_path / "b.txt").write_text("x" * (20 * MB))  # no place to part it: cut all the same, and counted
    documents, counts = read(Files(str(tmp_path / "b.txt")), 16 * MB)
    assert documents == ["x" * (20 * MB)]
    assert counts["cut_runs"] >= 1


@pytest.mark.parametrize("slice_bytes", [64, 1 << 20])
@pytest.mark.parametrize("mark", ["\n#\n", "\n\n\n"])
def test_a_line_break_of_a_separator_may_be_cr_lf_in_the_file(tmp_path, monkeypatch, mark, slice_bytes):
    monkeypatch.setattr("pipelines.lib.corpus.PIECE", 16)
    text = mark.join(f"chapter {i}\nof {i} lines" for i in range(40))
    (tmp_path / "a.txt").write_bytes(text.replace("\n", "\r\n").encode())
    documents, _ = read(Files(str(tmp_path / "a.txt"), separator=mark), slice_bytes)
    assert documents == text.split(mark)


@pytest.mark.parametrize("mark", ["<|endoftext|>", "\n\n", "\n", "aba"])
@pytest.mark.parametrize("slice_bytes", [7, 100, 10**6])
def test_a_separator_parts_a_file_as_str_split_does(tmp_path, monkeypatch, mark, slice_bytes):
    monkeypatch.setattr(corpus, "PIECE", 50)
    text = mark.join([f"document {i}\n é {'aba' * (i % 3)} " + "y" * (i % 60) for i in range(60)]) + mark + mark
    (tmp_path / "a.txt").write_text(text)
    documents, counts = read(Files(str(tmp_path / "a.txt"), separator=mark), slice_bytes)
    parts = text.split(mark)[:-1]  # what follows the last separator is nothing
    assert documents == [p for p in parts if p.strip()]
    assert counts["empty_documents"] == sum(1 for p in parts if not p.strip())


# ---- rows ------------------------------------------------------------------------------------------------------------

ROWS = [{"text": f"row {i}\r\n" + "z" * (i % 50), "n": i} for i in range(300)]


def write_rows(path):
    data = b"".join(json.dumps(r).encode() + b"\n" for r in ROWS)
    if path.name.endswith(".gz"):
        data = gzip.compress(data)
    elif path.name.endswith(".zst"):
        data = zstandard.compress(data[:5000]) + zstandard.compress(data[5000:])  # two frames
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=40)
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("slice_bytes", [500, 10**6])
def test_rows_of_every_format_are_read_once_each(tmp_path, name, slice_bytes):
    write_rows(tmp_path / name)
    origin = Files(str(tmp_path / name))
    documents, _ = read(origin, slice_bytes)
    assert documents == [r["text"].replace("\r\n", "\n") for r in ROWS]
    assert len(origin.plan(500).slices) > 1 or name.endswith((".gz", ".zst"))


def test_bad_lines_and_rows_without_text_are_left_out_and_counted(tmp_path):
    lines = [
        codecs.BOM_UTF8 + b'{"text": "first"}',
        b"{broken",
        b'{"other": 1}',
        b'{"text": null}',
        b'{"text": 7}',
        b"[1, 2]",
        b"",
        b'{"text": ""}',
        b'{"text": "half \\ud800 pair, whole \\ud83d\\ude42"}',
        b'{"text": "no newline at the end"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    documents, counts = read(Files(str(tmp_path / "a.jsonl")), 10**6)
    assert documents == ["first", "half \ufffd pair, whole 🙂", "no newline at the end"]
    assert counts == {
        "byte_order_marks": 1,
        "bad_lines": 1,
        "rows_without_text": 4,
        "empty_documents": 1,
        "replaced_characters": 1,
    }


def test_a_glob_and_a_folder_name_documents_alike(tmp_path):
    (tmp_path / "d/e").mkdir(parents=True)
    for name in ("d/b.txt", "d/a.txt", "d/e/c.txt"):
        (tmp_path / name).write_text(name)
    assert read(Files(str(tmp_path / "d")))[0] == ["d/a.txt", "d/b.txt", "d/e/c.txt"]
    assert read(Files(str(tmp_path / "d/**/*.txt")))[0] == ["d/a.txt", "d/b.txt", "d/e/c.txt"]
    (tmp_path / "odd.log").write_text("a log is text when it is asked for by name")
    assert len(read(source(str(tmp_path / "*.log")))[0]) == 1


# ---- data sets -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset_folder(tmp_path, monkeypatch):
    """A local folder in the form of a Hub data set: two parquet files of train, jsonl validation."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(2):
        rows = [{"content": f"train {100 * i + j}", "id": j} for j in range(100)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{i:05d}-of-00002.parquet")
    val = [{"content": f"val {j}", "id": j} for j in range(10)]
    pq.write_table(pa.Table.from_pylist(val), folder / "validation-00000-of-00001.parquet")
    return folder


def test_a_data_set_is_streamed_shard_by_shard(dataset_folder):
    origin = Hub(str(dataset_folder), text_column="content")
    assert len(origin.plan(MB).slices) == 2
    assert read(origin)[0] == [f"train {i}" for i in range(200)]
    assert read(Hub(str(dataset_folder), split="validation", text_column="content"))[0][:2] == ["val 0", "val 1"]


@pytest.mark.parametrize(
    "split, rows",
    [
        ("train[:10%]", range(20)),
        ("train[:0.5%]", range(1)),
        ("train[150:160]", range(150, 160)),
        ("train[-5:]", range(195, 200)),
        ("train[99%:]", range(198, 200)),
    ],
)
def test_slices_of_a_split_are_those_of_datasets(dataset_folder, split, rows):
    import datasets

    assert read(Hub(str(dataset_folder), split=split, text_column="content"))[0] == [f"train {i}" for i in rows]
    if "." not in split:
        loaded = datasets.load_dataset(str(dataset_folder), split=split)
        assert loaded["content"] == [f"train {i}" for i in rows]


def test_what_a_data_set_lacks_is_named_with_the_nearest(dataset_folder):
    name = str(dataset_folder)
    for origin, says in (
        (Hub(name, split="trian", text_column="content"), "no split 'trian'; did you mean 'train'"),
        (Hub(name, text_column="contents"), "no text_column 'contents'; did you mean 'content'"),
        (Hub(name, split="train[500:600]", text_column="content"), "has no rows"),
        (Hub(str(dataset_folder.parent / "nowhere")), "source .*nowhere"),
    ):
        with pytest.raises(InputError, match=says) as error:
            origin.plan(MB)
        assert "\n" not in str(error.value)


def test_splits_are_parsed_or_refused():
    assert parse_split("train") == ("train", None, None)
    assert parse_split("train[:0.1%]") == ("train", None, (0.1, True))
    assert parse_split("a.b[10:-1]") == ("a.b", (10, False), (-1, False))
    for bad in ("train[", "train[1.5:]", "train[:200%]", "train[a:b]", ""):
        with pytest.raises(ConfigError, match="split="):
            parse_split(bad)


# ---- the standard library, plans, errors -----------------------------------------------------------------------------


def test_the_standard_library_is_real_text():
    documents, counts = read(Stdlib())
    size = sum(len(d) for d in documents)
    assert size > 5e6 and len(documents) > 300
    assert any(d.startswith("itertools\n\nFunctional tools") for d in documents)
    assert not counts.get("replaced_characters")
    limited = Stdlib(max_mb=1).plan(MB)
    assert MB <= limited.size < 2 * MB


def test_units_hold_every_slice_once_in_order():
    plan = Stdlib().plan(MB)
    units = plan.units(MB)
    assert [s for u in units for s in u] == plan.slices
    assert len(units) > 5
    assert all(sum(s.size for s in u) >= MB for u in units[:-1])


def test_a_sample_is_spread_over_the_corpus_and_bounded():
    origin = Stdlib()
    plan = origin.plan(MB)
    texts = [d.text for d in sample(origin, plan, 300_000)]
    names = {d.id[0] for d in sample(origin, plan, 300_000)}
    assert 150_000 < sum(map(len, texts)) < 900_000
    assert len(names) > 8
    assert len(list(sample(origin, plan, 1e9))) == len(read(origin)[0])


def test_sources_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    write_rows(tmp_path / "whole.jsonl.gz")
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "whole.jsonl.gz").read_bytes()[:-20])
    (tmp_path / "cut.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd broken")
    (tmp_path / "not.parquet").write_bytes(b"PAR1 or not")
    (tmp_path / "wrong.jsonl").write_text('{"body": "x", "texts": "y"}\n')
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.txt").write_bytes(b"")
    for name, says in (
        ("missing.txt", "no such file, folder or pattern"),
        ("whole.jsonl.g", "did you mean 'whole.jsonl.gz'"),
        ("*.csv", "no file matches"),
        ("nothing", r"nothing to read \(no files\)"),
        ("empty.txt", r"nothing to read \(1 empty documents\)|nothing to read \(empty documents 1\)"),
        ("cut.jsonl.gz", "expected a whole readable file"),
        ("cut.jsonl.zst", "expected a whole readable file"),
        ("not.parquet", "expected a parquet file"),
        ("numbers.parquet", "holds int64, not text"),
        ("wrong.jsonl", "no text_column 'text'; did you mean 'texts'"),
    ):
        with pytest.raises(InputError, match=says) as error:
            read(source(str(tmp_path / name)))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="name: DATASET"):
        source("hub")


def test_every_kind_is_rebuilt_from_its_plain_form():
    for origin in (Stdlib(2.5), Files("x", separator="a"), Hub("x", split="train[:1%]")):
        assert build(Source, plain(origin)) == origin
