"""The bundle: what is read, the draws of examples, and one line for what is not usable."""

from __future__ import annotations

import json
import random

import pytest

from pipelines.lib.config import InputError
from pipelines.lib.core.tasks import examples_of, open_bundle, read_items
from tests.pipelines.core.bundle import write_bundle


@pytest.fixture
def folder(tmp_path):
    return write_bundle(tmp_path / "bundle")


def test_a_bundle_s_tasks_have_its_settings_and_chance_as_a_fraction(folder):
    tasks = {task.label: task for task in open_bundle(folder)}
    assert list(tasks) == ["letters", "stories", "who", "next", "next_again"]
    assert (tasks["letters"].chance, tasks["letters"].shots, tasks["letters"].delimiter) == (0.25, 2, " ")
    assert tasks["stories"].delimiter == "\nAnswer: " and tasks["who"].delimiter == " "
    assert tasks["who"].kind == "schema" and tasks["next"].path == tasks["next_again"].path
    assert [task.label for task in open_bundle(folder, ["next", "who"])] == ["who", "next"]


def test_items_are_shuffled_by_seed_1337_whatever_their_number_is_asked_for(folder):
    (task,) = open_bundle(folder, ["letters"])
    rows = [json.loads(line) for line in task.path.read_text().splitlines()]
    random.Random(1337).shuffle(rows)
    assert list(read_items(task)) == rows


def test_examples_are_the_public_draws_from_all_other_items(folder):
    (task,) = open_bundle(folder, ["letters"])
    items = read_items(task)
    for i in (0, 7, 19):
        others = [k for k in range(len(items)) if k != i]
        drawn = random.Random(1234 + i).sample(others, 2)
        assert examples_of(task, items, i) == [items[k] for k in drawn]
        assert i not in drawn


BAD = [
    ("core.yaml", "icl_tasks: []\n", "a list `icl_tasks` is needed"),
    ("core.yaml", "icl_tasks: [{label: x}]\n", "needs label, dataset_uri"),
    (
        "core.yaml",
        "icl_tasks: [{label: who, dataset_uri: b/who.jsonl, num_fewshot: [0], icl_task_type: schemas}]\n",
        "did you mean 'schema'",
    ),
    (
        "core.yaml",
        "icl_tasks: [{label: who, dataset_uri: ../core.yaml, num_fewshot: [0], icl_task_type: schema}]\n",
        "leads out of eval_data/",
    ),
    (
        "core.yaml",
        "icl_tasks: [{label: who, dataset_uri: b/none.jsonl, num_fewshot: [0], icl_task_type: schema}]\n",
        "no file",
    ),
    (
        "core.yaml",
        "icl_tasks: [{label: whom, dataset_uri: b/who.jsonl, num_fewshot: [0], icl_task_type: schema}]\n",
        "no `Random baseline` for task whom",
    ),
    ("eval_meta_data.csv", "Eval Task,Random baseline\nletters,100\n", "is not in [0, 100)"),
    ("eval_meta_data.csv", "Eval Task,Baseline\nletters,25\n", "a row without"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD, ids=[m for *_, m in BAD])
def test_a_bundle_that_is_not_one_is_named(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(InputError) as error:
        open_bundle(folder)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not a JSON object"),
        ('{"query": "a", "choices": ["a", "b"]}', "'gold' is missing"),
        ('{"query": "a", "choices": ["a", "b"], "gold": true}', "'gold' is missing or no int"),
        ('{"query": "a", "choices": ["a"], "gold": 0}', "'choices' must be two texts or more"),
        ('{"query": "a", "choices": ["a", "b"], "gold": 2}', "gold 2 is none of the 2 choices"),
    ],
)
def test_an_item_that_cannot_be_asked_is_named_by_its_line(folder, line, message):
    (task,) = open_bundle(folder, ["stories"])
    good = task.path.read_text().splitlines()
    task.path.write_text("\n".join([good[0], line, *good[1:]]))
    read_items.cache_clear()
    with pytest.raises(InputError) as error:
        read_items(task)
    assert message in str(error.value)


def test_fewer_items_than_examples_and_unknown_tasks_are_said(folder, tmp_path):
    with pytest.raises(InputError, match="did you mean 'stories'"):
        open_bundle(folder, ["story"])
    with pytest.raises(InputError, match=r"did you mean .*bundle"):
        open_bundle(tmp_path)
    (task,) = open_bundle(folder, ["letters"])
    task.path.write_text(task.path.read_text().split("\n")[0] + "\n")
    read_items.cache_clear()
    with pytest.raises(InputError, match="1 items; letters needs more than its 2 examples"):
        read_items(task)


def test_the_real_bundle_has_22_tasks_and_all_items_can_be_asked(data_dir):
    tasks = open_bundle(data_dir / "core")
    assert len(tasks) == 22 and {task.kind for task in tasks} == {"multiple_choice", "schema", "language_modeling"}
    shots = {task.label: task.shots for task in tasks}
    assert (shots["hellaswag_zeroshot"], shots["hellaswag"], shots["agi_eval_lsat_ar"]) == (0, 10, 3)
    assert {task.label for task in tasks if task.delimiter == "\nAnswer: "} == {
        *("jeopardy", "arc_easy", "arc_challenge", "piqa", "boolq")
    }
    for task in tasks:
        assert len(read_items(task)) > task.shots
