"""`python -m pipelines.evaluate core`: figures, resuming, sharding, MLflow and one line for bad input."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest

from pipelines.evaluate import main
from pipelines.lib.core import workers
from pipelines.lib.core.command import CoreConfig, show
from tests.pipelines.core.bundle import CONTEXT, save_llama, save_model, write_bundle


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("core")
    return {"model": save_model(tmp / "model"), "llama": save_llama(tmp / "llama"), "bundle": write_bundle(tmp / "b")}


def ask(places, out, *words, model="model", code=0):
    call = ["core", str(places[model]), f"bundle={places['bundle']}", f"out={out}", "track=none", "device=cpu", *words]
    assert main(call) == code
    return json.loads((out / "results.json").read_text()) if code == 0 else None


def measured(results):
    """What must not depend on how the work was done."""
    drop = {"seconds"}
    return {name: {k: v for k, v in row.items() if k not in drop} for name, row in results["tasks"].items()}


@pytest.fixture(scope="module")
def results(places, tmp_path_factory):
    return ask(places, tmp_path_factory.mktemp("out") / "a")


def test_core_is_the_mean_of_what_its_tasks_are_above_chance(results, places):
    tasks = dict(results["tasks"])
    total = tasks.pop("core")
    assert list(tasks) == [f"core/{n}" for n in ("letters", "stories", "who", "next", "next_again")]
    for row in tasks.values():
        acc, score = row["metrics"]["acc"], row["metrics"]["centred"]
        assert score["value"] == pytest.approx((acc["value"] - row["chance"]) / (1 - row["chance"]))
        usual = math.sqrt(acc["value"] * (1 - acc["value"]) / 19)
        assert acc["stderr"] == pytest.approx(usual if 0 < acc["value"] < 1 else 1 / 21)
        assert row["documents"] == row["documents_in_all"] == 20
    core = total["metrics"]["core"]
    assert core["value"] == pytest.approx(np.mean([t["metrics"]["centred"]["value"] for t in tasks.values()]))
    assert 0 < core["stderr"] < 0.2
    assert results["core"]["items"] == 100 and results["core"]["items_per_second"] > 0
    assert len(results["core"]["files"]["who"]) == 64 and results["model"]["sha256"]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_the_table_says_which_error_stands_where_all_or_none_are_right(results, value, capsys):
    told = copy.deepcopy(results)
    for row in told["tasks"].values():
        if "acc" in row["metrics"]:
            row["metrics"]["acc"]["value"] = value
    show(told)
    assert ("1 / (items + 1)" in capsys.readouterr().out) == (value != 0.5)


def test_prompts_longer_than_the_context_are_counted_beside_the_score(results, places, tmp_path, capsys):
    rows = [json.loads(line) for line in (places["bundle"] / "eval_data" / "b" / "next.jsonl").open()]
    long = sum(len(f" {r['context'].strip()} {r['continuation']}".encode()) > CONTEXT for r in rows)
    assert results["tasks"]["core/next"]["cut"] == long == 0
    few = ask(places, tmp_path / "few", "context=20", "tasks=next")
    expected = sum(len(f" {r['context'].strip()} {r['continuation']}".encode()) > 20 for r in rows)
    assert few["tasks"]["core/next"]["cut"] == few["cut_prompts"] == expected > 0
    said = capsys.readouterr().out
    assert "longer than the 20 tokens of the context" in said and "no CORE: only some tasks" in said


def test_figures_do_not_depend_on_batches_blocks_or_another_order(results, places, tmp_path, monkeypatch):
    assert measured(ask(places, tmp_path / "a", "batch_tokens=150")) == measured(results)
    monkeypatch.setattr(workers, "BLOCK_ITEMS", 7)
    assert measured(ask(places, tmp_path / "b")) == measured(results)


def test_ray_workers_give_the_same_figures(results, places, tmp_path, ray_session, monkeypatch):
    monkeypatch.setattr(workers, "BLOCK_ITEMS", 6)  # in this process: blocks are made here, asked there
    assert measured(ask(places, tmp_path / "a", "workers=2")) == measured(results)


def test_a_limit_takes_the_same_first_items_and_draws_examples_from_all(results, places, tmp_path):
    ask(places, tmp_path / "a", "limit=7")
    few = json.loads((tmp_path / "a" / "core" / "letters.json").read_text())["correct"]
    ask(places, tmp_path / "b", "tasks=letters")
    assert json.loads((tmp_path / "b" / "core" / "letters.json").read_text())["correct"][:7] == few and len(few) == 7


def test_killed_in_between_it_goes_on_with_finished_tasks(results, places, tmp_path, monkeypatch, capsys):
    real, asked = workers.ask, []

    def ask_until(job, block, *more):
        asked.append(block.task.label)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(job, block, *more)

    monkeypatch.setattr(workers, "ask", ask_until)
    ask(places, tmp_path / "a", code=130)
    assert asked == ["letters", "stories", "who"] and not (tmp_path / "a" / "results.json").exists()
    again = ask(places, tmp_path / "a")
    assert asked[3:] == ["who", "next", "next_again"] and "2 of 5 tasks are finished" in capsys.readouterr().out
    assert measured(again) == measured(results) and again["core"]["items_this_time"] == 60
    ask(places, tmp_path / "a")
    assert len(asked) == 6 and "has these figures since" in capsys.readouterr().out
    ask(places, tmp_path / "a", "limit=3", code=2)
    ask(places, tmp_path / "a", "overwrite=true")
    assert len(asked) == 11


def test_an_unmodified_model_of_transformers_is_asked_alike(places, tmp_path):
    row = ask(places, tmp_path / "a", model="llama")["tasks"]["core"]
    assert row["documents"] == 100


def test_figures_reach_mlflow_under_their_names(places, tmp_path):
    from mlflow import MlflowClient

    from pipelines.lib.tracking import tracking_uri

    out = tmp_path / "out"
    assert main(["core", str(places["model"]), f"bundle={places['bundle']}", f"out={out}", "device=cpu"]) == 0
    results = json.loads((out / "results.json").read_text())
    run = MlflowClient(tracking_uri()).get_run(json.loads((out / "mlflow.json").read_text())["run_id"])
    assert run.data.metrics["eval/core/core"] == pytest.approx(results["tasks"]["core"]["metrics"]["core"]["value"])
    assert run.data.metrics["eval/core/who/acc"] == results["tasks"]["core/who"]["metrics"]["acc"]["value"]
    assert "eval/core/who/centred_stderr" in run.data.metrics


def test_the_card_of_a_run_shows_its_core(results, tmp_path):
    from types import SimpleNamespace

    from pipelines.lib.comparison.card import evaluations_of

    folder = tmp_path / "evaluation" / "step_1-core"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    rows = {row.name: row.cells for row in evaluations_of(SimpleNamespace(path=tmp_path))}
    assert {"core, core", "core/who, acc", "core/who, centred"} <= set(rows)
    value = results["tasks"]["core"]["metrics"]["core"]["value"]
    assert float(rows["core, core"][0].replace("\u2212", "-")) == pytest.approx(value, abs=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "bundle={model}"], "no core.yaml here"),
        (["{model}", "bundle=nowhere"], "bundle=nowhere: no such folder or .zip; bundle=public downloads"),
        (["{model}", "bundle={bundle}", "tasks=lettres"], "did you mean 'letters'"),
        (["{model}", "bundle={bundle}", "context=97"], "context=97 is longer than the 96 tokens"),
        (["{model}", "bundle={bundle}", "context=1"], "2 tokens at least"),
        (["{model}", "bundle={bundle}", "workers=-1"], "workers=-1 is negative"),
        (["{model}", "bundle={bundle}", "limit=0"], "limit=0 is not positive"),
        (["{model}", "bundle={bundle}", "bundel=x"], "did you mean 'bundle'"),
        (["{model}", "bundle={bundle}", f"bundle_sha256={'0' * 64}"], "it belongs to an archive"),
        (["nowhere", "bundle={bundle}"], "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, places, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["core", *(word.format(**places) for word in words), "track=none"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and message in said[-1], said


def test_a_tokenizer_without_some_characters_is_one_line(places, tmp_path, capsys):
    from pipelines.lib.vocab import chars_tokenizer

    folder = save_model(tmp_path / "chars")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    chars_tokenizer("abc").save_pretrained(folder)
    call = ["core", str(folder), f"bundle={places['bundle']}", f"out={tmp_path / 'out'}", "track=none"]
    assert main(call) == 2
    assert "no id for the character" in capsys.readouterr().err


def test_help_says_every_setting(capsys):
    assert main(["core", "--help"]) == 0
    said = capsys.readouterr().out
    assert "python -m pipelines.evaluate core RUN" in said
    for name in CoreConfig.__dataclass_fields__:
        assert f"  {name}=" in said
