"""Test items in a corpus: planted ones are found, others are not; text, tokens and Ray give the same."""

from __future__ import annotations

import json

import pytest

from pipelines.evaluate import main
from pipelines.lib import contamination
from tests.pipelines.core.bundle import write_bundle

ITEMS = [
    "The quick brown fox jumps over the lazy dog while seven wise owls watch from an old oak tree.",
    "A river runs from the high hills through nine small towns before it meets the grey and windy sea.",
    "Every morning the old baker puts twelve loaves into his oven and reads the news until they are done.",
    "Too short to judge.",
    "In the end it was the youngest of the three sisters who found the key under the blue flower pot.",
]


@pytest.fixture
def places(tmp_path):
    """Items in a .jsonl file; a corpus in which the first one stands, disguised, and ten words of the second."""
    tasks = tmp_path / "items.jsonl"
    tasks.write_text("".join(json.dumps({"q": {"text": text}, "gold": 1}) + "\n" for text in ITEMS))
    corpus = tmp_path / "corpus.jsonl"
    texts = [
        "Once. The QUICK brown fox - jumps over\nthe 'lazy' dog, while seven wise owls watch from an old oak tree!",
        "A river runs from the high hills through nine small cities.",
        "Nothing to see here, but quite a number of words that stand in no item at all, whatever one does.",
    ]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"tmp": tmp_path, "tasks": tasks, "corpus": corpus}


def scan(places, *words, code=0):
    out = places["tmp"] / "found.json"
    call = ["contamination", f"files={places['tasks']}", f"out={out}", *words]
    assert main(call) == code
    return json.loads(out.read_text()) if code == 0 else None


def test_a_planted_item_is_found_whatever_its_punctuation(places, capsys):
    report = scan(places, f"text={places['corpus']}", "workers=0")
    row = report["tasks"]["items"]
    assert (row["n"], row["items"], row["judged"], row["too_short"]) == (8, 5, 4, 1)  # a short item pulls n to 8
    assert row["contaminated_lines"] == [1, 2] and row["share"] == 0.5
    (example, second) = row["examples"]
    assert example["words"] == "the quick brown fox jumps over the lazy" and example["line"] == 1
    assert "corpus.jsonl" in example["document"]
    assert second["words"] == "a river runs from the high hills through" and second["runs"] == 3
    said = capsys.readouterr().out
    assert "items" in said and "50.00 %" in said and "2 of 4 items, runs of 8 words, 1 too short" in said
    assert report["corpus"]["documents"] == 3
    longer = scan(places, f"text={places['corpus']}", "workers=0", "least=13")
    assert longer["tasks"]["items"]["contaminated_lines"] == [1]  # ten words in a row are no thirteen


def test_a_phrase_in_many_documents_is_no_copy(places):
    text = json.loads(places["corpus"].read_text().splitlines()[0])["text"]
    places["corpus"].write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(5)))
    row = scan(places, f"text={places['corpus']}", "workers=0", "common=4")["tasks"]["items"]
    assert row["contaminated"] == 0
    row = scan(places, f"text={places['corpus']}", "workers=0", "common=5")["tasks"]["items"]
    assert row["contaminated_lines"] == [1] and row["examples"][0]["documents"] == 5


def test_token_shards_are_read_as_their_text(places, monkeypatch):
    from pipelines.tokenize import main as tokenize

    data = places["tmp"] / "data"
    call = [f"source={places['corpus']}", "tokenizer=bytes", "workers=0", "val_fraction=0", "track=none"]
    assert tokenize([*call, f"out={data}"]) == 0
    expected = scan(places, f"text={places['corpus']}", "workers=0")["tasks"]["items"]
    for tokens in (1 << 20, 50):  # in one piece, and in pieces shorter than the items
        monkeypatch.setattr(contamination, "UNIT_TOKENS", tokens)
        row = scan(places, f"data={data}", "workers=0")["tasks"]["items"]
        assert row["contaminated_lines"] == expected["contaminated_lines"]


def test_ray_data_finds_the_same(places, ray_session, monkeypatch):
    here = scan(places, f"text={places['corpus']}", "workers=0")
    monkeypatch.setattr(contamination, "UNIT_BYTES", 100)
    there = scan(places, f"text={places['corpus']}", "workers=2")
    assert there["corpus"] == here["corpus"] and there["tasks"] == here["tasks"]


def test_items_of_core_are_questions_with_their_right_answers(places):
    bundle = write_bundle(places["tmp"] / "bundle")
    rows = [json.loads(line) for line in (bundle / "eval_data" / "a" / "letters.jsonl").open()]
    asked = f"{rows[3]['query']} {rows[3]['choices'][rows[3]['gold']]}"
    places["corpus"].write_text(json.dumps({"text": f"so: {asked} - well"}) + "\n")
    words = [f"text={places['corpus']}", "workers=0", "least=10", "n=10", f"bundle={bundle}"]
    report = scan(places, *words)
    assert set(report["tasks"]) == {"letters", "stories", "who", "next/next_again", "items"}
    assert report["tasks"]["letters"]["contaminated_lines"] == [4]
    assert report["tasks"]["stories"]["contaminated"] == 0


def test_an_lm_eval_task_s_local_data_are_looked_for(places):
    folder = places["tmp"] / "tasks"
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps([{"a": ITEMS[2]}, {"a": ITEMS[0], "b": ["x"]}]))
    task = folder / "t.yaml"
    task.write_text("task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.json}}\n")
    report = scan(places, f"text={places['corpus']}", "workers=0", f"files={task}")
    assert report["tasks"]["rows"]["contaminated_lines"] == [2]
    task.write_text("task: t\ndataset_path: squad\n")
    scan(places, f"text={places['corpus']}", "workers=0", f"files={task}", code=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["files={tasks}"], "a corpus is needed"),
        (["{corpus}", "data=x", "files={tasks}"], "a corpus is needed"),
        (["{corpus}"], "nothing to look for"),
        (["{corpus}", "files={tmp}/none.jsonl"], "no such file"),
        (["{corpus}", "files={tasks}", "least=14"], "least=14 must be at least 1 and at most n=13"),
        (["{corpus}", "files={tmp}/bad.jsonl"], "bad.jsonl line 2: not JSON"),
        (["{corpus}", "files={tmp}/void.jsonl"], "no item in it"),
        (["{tmp}/nothing.txt", "files={tasks}"], "no such file"),
        (["data={tmp}", "files={tasks}"], "manifest.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, places, capsys):
    (places["tmp"] / "bad.jsonl").write_text('{"a": 1}\n{\n')
    (places["tmp"] / "void.jsonl").write_text("\n")
    assert main(["contamination", *(word.format(**places) for word in words), "workers=0"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and message in said[-1], said


def test_real_books_have_none_of_the_real_items(data_dir, tmp_path):
    """One book, against the task made from books: LAMBADA's passages are of other ones."""
    out = tmp_path / "found.json"
    text = data_dir / "books" / "alice-in-wonderland.txt"
    lambada = data_dir / "core" / "eval_data" / "language_understanding" / "lambada_openai.jsonl"
    call = ["contamination", f"text={text}", f"files={lambada}", "workers=0", f"out={out}"]
    assert main(call) == 0
    row = json.loads(out.read_text())["tasks"]["lambada_openai"]
    assert row["judged"] == 4653 and row["contaminated"] == 0 and row["n"] == 13
    planted = tmp_path / "planted.txt"
    passage = json.loads(lambada.read_text(encoding="utf-8").splitlines()[6])["context"]
    planted.write_text(text.read_text(encoding="utf-8") + "\n\n" + passage, encoding="utf-8")
    assert main([*call, f"text={planted}"]) == 0
    assert json.loads(out.read_text())["tasks"]["lambada_openai"]["contaminated_lines"] == [7]
