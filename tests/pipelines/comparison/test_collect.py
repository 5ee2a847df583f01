from __future__ import annotations

import json
import math

import pytest

from models.cost import Ops
from models.families import create
from models.spec import build
from pipelines.lib.comparison.collect import collect, read_run
from pipelines.lib.config import InputError
from pipelines.lib.training import TrainConfig
from tests.pipelines.comparison.folders import FINGERPRINT, make_run, make_search, make_sweep


def test_a_run_is_read_as_its_folder_tells_it(tmp_path):
    folder = make_run(tmp_path / "a", 2.0, 3, samples='--- step 20 | "The "\nThe end\n\n', tags={"host": "one"})
    run = read_run(folder)
    assert (run.name, run.seed, run.status, run.data) == ("a", "3", "complete", (FINGERPRINT,))
    assert run.last("val/nll") == 2.0 and run.tokens == 20 * 384
    assert "seed" not in run.settings and "out" not in run.settings
    assert run.settings["data"] == FINGERPRINT[:12] and run.settings["optim.lr"] == 0.003
    assert run.samples == [{"step": 20, "prompt": "The ", "text": "The end"}]
    assert run.machine == {"host": "one"}


def test_a_folder_of_runs_gives_all_of_them_once_however_deep(tmp_path):
    make_sweep(tmp_path / "runs" / "norms", {"rmsnorm": [2.0], "layernorm": [2.1]})
    make_run(tmp_path / "runs" / "other", 2.2)
    (tmp_path / "runs" / "empty").mkdir()
    found = collect([tmp_path / "runs", tmp_path / "runs" / "other"])
    assert sorted(run.name for run in found.runs) == ["norms/layernorm-s0", "norms/rmsnorm-s0", "other"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    found = collect([make_run(tmp_path / "x" / "a", 2.0), make_run(tmp_path / "y" / "a", 2.1)])
    assert [run.name for run in found.runs] == ["x/a", "y/a"]


def test_a_search_gives_its_trials_and_says_what_became_of_the_others(tmp_path):
    found = collect([make_search(tmp_path / "search", {"metric": "val/nll", "mode": "min"})])
    assert [run.status for run in found.runs] == ["complete", "complete", "cut short", "failed"]
    assert "worker was lost" in found.runs[3].note and "step 5 of 20" in found.runs[2].note
    assert [(e.name, e.why) for e in found.left_out] == [
        ("trial 4", "refused: d_model=33 is not divisible by n_heads=2")
    ]
    (story,) = found.searches
    assert (story.rule, story.metric, story.done) == ("random", "val/nll", "all drawn")
    assert story.trials == {"done": 3, "failed": 1, "refused": 1}


def test_runs_that_mlflow_finds_are_collected_and_those_that_are_gone_are_said(tmp_path, monkeypatch):
    from pipelines.lib import tracking

    answers = {("b", "e"): [make_run(tmp_path / "b", 2.1), tmp_path / "gone"], ("z", None): []}
    monkeypatch.setattr(tracking, "find_runs", lambda query, experiment=None: answers[query, experiment])
    found = collect([], "b", "e")
    assert [run.name for run in found.runs] == ["b"] and [e.name for e in found.left_out] == ["gone"]
    with pytest.raises(InputError, match="query='z' finds no run"):
        collect([], "z")


@pytest.mark.parametrize("word", ["NaN", "null", "Infinity"])
def test_a_last_loss_that_is_no_number_is_a_diverged_run(tmp_path, word):
    folder = make_run(tmp_path / "a", 2.0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": 21, "train/nll": {word}, "val/nll": {word}}}\n')
    run = read_run(folder)
    assert run.status == "diverged" and not math.isfinite(run.last("val/nll"))


def test_a_run_that_its_policy_stopped_has_diverged_though_its_last_validation_was_finite(tmp_path):
    folder = make_run(tmp_path / "a", 2.0, upto=10, end="FAILED")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "train/nll": 3.0, "train/skipped": 11}\n')
    assert read_run(folder).status == "diverged"


@pytest.mark.parametrize(
    "how, status",
    [
        ({}, "complete"),
        ({"upto": 10}, "incomplete"),
        ({"upto": 10, "end": "FAILED"}, "failed"),
        ({"upto": 10, "end": "KILLED"}, "incomplete"),
        ({"upto": 10, "end": "FINISHED"}, "complete"),  # patience ended it
    ],
)
def test_how_far_a_run_came(tmp_path, how, status):
    assert read_run(make_run(tmp_path / "a", 2.0, **how)).status == status


def test_costs_are_measured_or_follow_from_the_config_and_nothing_is_made_up(tmp_path):
    measured = read_run(make_run(tmp_path / "a", 2.0, cost={"parameters": 7, "flops": 5.0, "memory_gb": 0.1}))
    assert measured.cost["parameters"] == 7 and measured.cost["memory_gb"] == 0.1
    assert measured.derived == {"tokens", "seconds", "step_time_s", *Ops().counts()}
    derived = read_run(make_run(tmp_path / "b", 2.0))
    spec = build(TrainConfig, derived.config).model
    assert derived.cost["parameters"] == spec.n_parameters()
    assert {name: derived.cost[name] for name in Ops().counts()} == spec.ops(32).counts()
    assert derived.cost["flops"] == create(spec).flops_per_token(32) * 20 * 384
    assert derived.cost["step_time_s"] == 0.25 and derived.cost["memory_gb"] == 0.5 and "energy_j" not in derived.cost
    unknown = make_run(tmp_path / "c", 2.0)
    text = (unknown / "config.yaml").read_text().replace("kind: gpt", "kind: a_family_of_tomorrow")
    (unknown / "config.yaml").write_text(text)
    assert "parameters" not in read_run(unknown).cost


def test_the_fingerprint_is_from_the_run_its_checkpoint_or_the_folder_and_else_not_known(tmp_path):
    folder = make_run(tmp_path / "a", 2.0, data=None)
    assert read_run(folder).data == () and read_run(folder).settings["data"] == "tokens"
    state = folder / "checkpoints" / "step_20" / "training_state" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"state": {"data": ["cd" * 32]}}))
    assert read_run(folder).data == ("cd" * 32,)


def test_what_cannot_be_read_is_left_out_of_a_folder_and_refused_by_name(tmp_path):
    make_run(tmp_path / "runs" / "good", 2.0)
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "config.yaml").write_text("a: [")
    (tmp_path / "runs" / "bad" / "metrics.jsonl").write_text("")
    found = collect([tmp_path / "runs"])
    assert [run.name for run in found.runs] == ["good"] and found.left_out[0].name == "bad"
    with pytest.raises(InputError, match="line"):
        collect([tmp_path / "runs" / "bad"])
    with pytest.raises(InputError, match="did you mean 'good'"):
        collect([tmp_path / "runs" / "goood"])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="no run in it"):
        collect([tmp_path / "nothing"])


def test_half_a_line_of_a_killed_run_does_no_harm(tmp_path):
    folder = make_run(tmp_path / "a", 2.0, upto=10)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "train/n')
    run = read_run(folder)
    assert run.status == "incomplete" and run.last("val/nll") == 2.0
