"""The search command: what it writes, how it goes on, what it refuses. Tune's part needs the shared Ray session."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pytest

from models.spec import build, plain
from pipelines import search
from pipelines.lib.config import assemble
from pipelines.lib.run import Run, resolve
from pipelines.lib.search.guide import Guide
from pipelines.lib.search.ledger import Ledger
from pipelines.lib.search.study import SearchConfig
from pipelines.lib.search.trials import Ask, Done, Rule
from pipelines.lib.training import TrainConfig
from tests.conftest import REPO
from tests.pipelines.search.small import search_words
from tests.pipelines.tiny import make_tokens


def told(out) -> list[tuple]:
    """What a rule knows of a finished search, without what a clock measured."""
    return [(t.number, t.id, dict(t.ask.settings), t.ask.seed, t.status, dict(t.metrics)) for t in Ledger(out).trials]


def study_of(words):
    return search.prepare(assemble(words, SearchConfig))


# ---- a whole search


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished sweep of four settings with two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    assert search.main([*search_words(folder), "seeds=2"]) == 0
    return folder


def test_every_setting_is_tried_with_every_seed_and_recorded(swept):
    trials = Ledger(swept / "out").trials
    assert len(trials) == 8
    assert {(t.ask.settings["model.norm"], t.ask.settings["optim.lr"], t.ask.seed) for t in trials} == {
        (norm, lr, seed) for norm in ("rmsnorm", "layernorm") for lr in (0.001, 0.01) for seed in (0, 1)
    }
    assert len({t.id for t in trials}) == 4
    for t in trials:
        assert t.status == "done"
        assert math.isfinite(t.metrics["val/nll"])
        assert t.metrics["val/score"] == pytest.approx(math.exp(-t.metrics["val/nll"]))
        assert t.cost["tokens"] == 6 * 384
        assert t.cost["parameters"] > 0


def test_the_winner_alone_keeps_a_checkpoint_and_opens_as_a_model(swept):
    ledger = Ledger(swept / "out")
    winner = (swept / "out/winner").read_text().strip()
    held = [p.parent.parent.name for p in (swept / "out/trials").glob("*/checkpoints/step_*")]
    assert held == [winner.removeprefix("trials/")]
    means = {}
    for t in ledger.trials:
        means.setdefault(t.id, []).append(t.metrics["val/nll"])
    best = min(means, key=lambda i: sum(means[i]))
    assert winner.startswith(f"trials/{best}-s")
    assert resolve(swept / "out" / winner).name == "step_6"


def test_the_printed_command_repeats_a_trial_bit_by_bit(swept, tmp_path):
    from pipelines import train

    row = Ledger(swept / "out").rows[5]
    words = shlex.split(row["command"])
    assert words[:3] == ["python", "-m", "pipelines.train"]
    words = [w for w in words[3:] if not w.startswith("out=")]
    assert train.main([*words, f"out={tmp_path / 'again'}", "track=none"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val/nll"] == row["metrics"]["val/nll"]
    assert (
        rows[-1]["data/crc"]
        == json.loads((swept / "out" / row["run"] / "metrics.jsonl").read_text().split("\n")[-2])["data/crc"]
    )


def test_the_same_command_again_does_no_work_and_a_larger_budget_goes_on(tmp_path, capsys):
    words = search_words(tmp_path)
    assert search.main([*words, "trials=2"]) == 0
    assert "the budget of 2 trials is used up" in capsys.readouterr().out
    assert search.main([*words, "trials=2"]) == 0
    assert len(Ledger(tmp_path / "out").trials) == 2
    assert search.main([*words, "trials=3"]) == 0
    assert len(Ledger(tmp_path / "out").trials) == 3
    assert search.main(words) == 0
    assert [t.status for t in Ledger(tmp_path / "out").trials] == ["done"] * 4


def test_the_token_budget_counts_what_is_trained(tmp_path):
    assert search.main([*search_words(tmp_path), f"tokens={6 * 384 * 2}"]) == 0
    assert len(Ledger(tmp_path / "out").trials) == 2


def test_a_time_budget_ends_it_and_says_so(tmp_path, capsys):
    words = [*search_words(tmp_path), "seconds=0.01"]
    assert search.main(words) == 0
    count = len(Ledger(tmp_path / "out").trials)
    assert count < 2
    assert "the budget of 0.01 seconds is used up" in capsys.readouterr().out
    assert search.main(words) == 0  # the time of all drivers counts
    assert len(Ledger(tmp_path / "out").trials) == count


def test_a_dry_run_prints_the_trials_and_starts_nothing(tmp_path, capsys):
    words = search_words(tmp_path, vary={"model.d_model": [32, 48, 33], "optim.lr": 0.01})
    assert search.main([*words, "dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert "refused" in said and "d_model=33" in said
    assert "d_model=48" in said and "at most 2 trials of full length" in said
    assert not (tmp_path / "out").exists()


def test_a_time_budget_stops_a_trial_that_runs_and_a_larger_one_goes_on_from_there(tmp_path):
    words = search_words(tmp_path, vary={"optim.lr": [0.001]}, fixed={"steps": 1500, "eval_every": 1500})
    assert search.main([*words, "seconds=2"]) == 0
    (row,) = Ledger(tmp_path / "out").rows.values()
    assert row["status"] == "interrupted"
    assert not (tmp_path / "out/winner").exists()
    assert search.main([*words, "seconds=600"]) == 0
    (row,) = Ledger(tmp_path / "out").rows.values()
    assert (row["status"], row["attempt"]) == ("done", 2)
    assert "resumed from" in (tmp_path / "out" / row["run"] / "log.txt").read_text()


# ---- killed and gone on with


KILLED = """
import os, sys
from pipelines.lib.search import worker
from pipelines.lib.search.guide import Guide
left = int(sys.argv.pop(1))
real = Guide.{method}
def counted(self, *args):
    global left
    if {before}:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
    return real(self, *args)
Guide.{method} = counted
from pipelines.search import main
sys.exit(main(sys.argv[1:]))
"""


def test_killed_three_times_it_decides_as_if_it_had_not_been(tmp_path, swept):
    words = [*search_words(tmp_path), "seeds=2"]
    for method, left in (("next", 1), ("end", 0), ("end", 2)):
        code = KILLED.format(method=method, before="True")
        ended = subprocess.run(
            [sys.executable, "-c", code, str(left), *words], cwd=REPO, capture_output=True, text=True
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    with open(tmp_path / "out/ledger.jsonl", "ab") as file:
        file.write(b'{"event": "end", "num')  # a kill in the middle of a line
    assert search.main(words) == 0
    same = [(i, settings, seed, metrics) for _, i, settings, seed, _, metrics in told(tmp_path / "out")]
    expected = [(i, settings, seed, metrics) for _, i, settings, seed, _, metrics in told(swept / "out")]
    assert [x[1:] for x in same] == [x[1:] for x in expected]
    attempts = [row["attempt"] for row in Ledger(tmp_path / "out").rows.values()]
    assert max(attempts) > 1


def test_a_stop_request_saves_says_how_to_go_on_and_loses_nothing(tmp_path, capsys, monkeypatch):
    words = search_words(tmp_path, fixed={"steps": 40, "eval_every": 20})
    real = Guide.end

    def end(self, number, outcome, error=""):
        real(self, number, outcome, error)
        if len(self.ledger.trials) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Guide, "end", end)
    assert search.main(words) == 130
    assert "resume with: python -m pipelines.search" in capsys.readouterr().out
    monkeypatch.undo()
    assert search.main(words) == 0
    assert len(told(tmp_path / "out")) == 4


# ---- pieces


@dataclass(frozen=True)
class Halves(Rule):
    """Every setting to its half, then the better one to its end."""

    def next(self, problem, trials):
        points = problem.space.points()
        if len(trials) < len(points):
            return Ask(points[len(trials)], 0, share=0.5, keep=True)
        if len(trials) == len(points):
            best = min(trials, key=problem.objective.loss)
            return Ask(best.ask.settings, 0, why="promoted")
        return Done("both halves are known")


@pytest.fixture
def halves(monkeypatch):
    monkeypatch.setitem(Rule.kinds, "halves", Halves)


def test_a_promoted_trial_goes_on_from_its_checkpoint_as_if_never_stopped(tmp_path, halves, swept):
    assert search.main(search_words(tmp_path, rule="halves")) == 0
    ledger = Ledger(tmp_path / "out")
    last = ledger.rows[4]
    assert (last["until"], last["piece_tokens"]) == (6, 3 * 384)
    log = (tmp_path / "out" / last["run"] / "log.txt").read_text()
    assert "resumed from step_3" in log
    whole = next(t for t in Ledger(swept / "out").trials if t.id == last["id"] and t.ask.seed == 0)
    assert last["metrics"]["val/nll"] == whole.metrics["val/nll"]
    held = list((tmp_path / "out/trials").glob("*/checkpoints/step_*"))
    assert [p.name for p in held] == ["step_6"]  # what could not be promoted any more is gone


@dataclass(frozen=True)
class Takes(Rule):
    """A trial to its half; then its checkpoint with another learning rate to the end."""

    looks_back = True

    def next(self, problem, trials):
        if not trials:
            return Ask({"optim.lr": 0.001}, 0, share=0.5, keep=True)
        if len(trials) == 1:
            return None if trials[0].status == "running" else Ask({"optim.lr": 0.03}, 0, source=0)
        return Done("taken over")


def test_a_trial_may_take_over_another_ones_weights_and_change_its_learning_rate(tmp_path, monkeypatch):
    monkeypatch.setitem(Rule.kinds, "takes", Takes)
    assert search.main(search_words(tmp_path, rule="takes", vary={"optim.lr": [0.001, 0.03]})) == 0
    rows = Ledger(tmp_path / "out").rows
    assert rows[1]["run"] != rows[0]["run"]
    curve = [json.loads(x) for x in (tmp_path / "out" / rows[1]["run"] / "metrics.jsonl").read_text().splitlines()]
    first = [json.loads(x) for x in (tmp_path / "out" / rows[0]["run"] / "metrics.jsonl").read_text().splitlines()]
    assert curve[:3] == first
    assert curve[3]["train/lr"] > 10 * curve[2]["train/lr"]
    assert rows[1]["piece_tokens"] == 3 * 384
    assert rows[0]["command"] and not rows[1]["command"]  # no command begins where that one did


# ---- what goes wrong


def test_a_trial_that_diverges_is_a_finding_and_never_wins(tmp_path):
    words = search_words(
        tmp_path, vary={"optim.lr": [0.01, 1e30]}, fixed={"steps": 6, "max_skipped": 1, "grad_clip": None}
    )
    assert search.main(words) == 0
    good, bad = Ledger(tmp_path / "out").trials
    assert bad.status == "done"
    assert math.isnan(bad.metrics["val/nll"]) or bad.metrics["val/nll"] > good.metrics["val/nll"]
    assert f"trials/{good.id}" in (tmp_path / "out/winner").read_text()


def test_a_crash_is_tried_again_and_then_given_up(tmp_path, monkeypatch, capsys):
    calls = []

    def broken(job):
        calls.append(job["run"])
        if job["config"]["model"]["norm"]["kind"] == "rmsnorm":
            return {"status": "failed", "metrics": {}, "cost": {}, "checkpoint": None, "error": "RuntimeError: boom"}
        from pipelines.lib.search.worker import perform

        return perform(job)

    monkeypatch.setattr("pipelines.lib.search.guide.perform", broken)
    assert search.main([*search_words(tmp_path), "retries=1"]) == 0
    trials = Ledger(tmp_path / "out").trials
    assert [t.status for t in trials] == ["failed", "failed", "done", "done"]
    assert all("boom" in t.error for t in trials[:2])
    assert len(calls) == 2 * 2 + 2
    assert "tried again" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, words, says",
    [
        ({"vary": {"model.nrom": ["rmsnorm"]}}, [], "did you mean"),
        (
            {"vary": {"model.norm": ["rmsnorm", "layernrom"]}},
            [],
            "'layernrom' does not exist; did you mean 'layernorm'",
        ),
        ({"vary": {"seed": [1, 2]}}, [], "belongs to the search itself; give seeds= and first_seed="),
        ({"fixed": {"data": "elsewhere"}}, [], "fixed: data belongs to the search itself"),
        ({"fixed": {"num_workers": 2}}, [], "give workers= to the search"),
        ({"objective": {"metric": "val/score"}}, [], "of val/score max is meant"),
        ({"rule": "sweap"}, [], "'sweap' does not exist; did you mean 'sweep'"),
        ({"fixed": {"seconds": 5}}, [], "not see equal tokens"),
        ({"vary": {"batch_tokens": [384, 768]}}, [], "give fixed.tokens=2304"),
        ({"fixed": {"modle.d_model": 3}}, [], "no option 'modle'"),
        ({}, ["parallel=-1"], "parallel=-1 is negative"),
        ({}, ["seeds=0"], "seeds=0 must be at least 1"),
        ({}, ["data=nowhere"], "no such folder"),
        ({}, ["also=nowhere"], "no search folder"),
        ({"rule": "random"}, [], "draws without end"),
        ({"objective": {"metric": "val/bbp"}}, [], "did you mean 'val/bpb'"),
        ({"objective": {"metric": "val/bpb"}}, [], "try objective.metric=val/nll"),
        ({"recipe": "no_such"}, [], "no recipe 'no_such'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_left(tmp_path, capsys, changes, words, says):
    assert search.main([*search_words(tmp_path, **changes), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_another_search_in_the_same_folder_is_refused_with_the_difference(tmp_path, capsys, swept):
    words = [w if not w.startswith("out=") else f"out={swept / 'out'}" for w in search_words(tmp_path)]
    words[1] = f"data={swept / 'data'}"
    before = (swept / "out/ledger.jsonl").read_bytes()
    assert search.main([*words, f"recipe={swept / 'small.yaml'}", "seeds=2", "fixed={steps: 9, eval_every: 3}"]) == 2
    assert "fixed.steps: 6 -> 9" in capsys.readouterr().err
    assert (swept / "out/ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", ["data", "recipe"])
def test_what_the_trials_share_may_not_change_behind_equal_words(tmp_path, capsys, change):
    words = search_words(tmp_path)
    assert search.main([*words, "trials=2"]) == 0
    if change == "data":
        shutil.rmtree(tmp_path / "data")
        make_tokens(tmp_path / "data", seed=1)
    else:
        path = tmp_path / "small.yaml"
        path.write_text(path.read_text().replace("warmup_steps: 5", "warmup_steps: 4"))
    before = (tmp_path / "out/ledger.jsonl").read_bytes()
    capsys.readouterr()
    assert search.main(words) == 2
    error = capsys.readouterr().err
    assert ("data: " if change == "data" else "recipe.schedule.warmup_steps: 5 -> 4") in error
    assert (tmp_path / "out/ledger.jsonl").read_bytes() == before


def test_a_moved_recipe_and_moved_data_are_the_same_search(tmp_path):
    words = search_words(tmp_path)
    assert search.main([*words, "trials=2"]) == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "small.yaml").unlink()  # as a job's uploaded copy is, when the job has ended
    assert search.main([*words, f"data={tmp_path / 'moved'}"]) == 0
    assert [t.status for t in Ledger(tmp_path / "out").trials] == ["done"] * 4


def test_a_recipe_may_stand_beside_the_search_file(tmp_path, monkeypatch):
    words = search_words(tmp_path, recipe="small.yaml")
    monkeypatch.chdir("/")
    assert search.main([*words, "trials=1"]) == 0
    words = shlex.split(Ledger(tmp_path / "out").rows[0]["command"])
    assert words[3] == str(tmp_path / "out/recipe.yaml")


def test_the_estimate_of_a_search_in_pieces_is_that_of_its_pieces(tmp_path, capsys):
    words = search_words(tmp_path, rule={"kind": "asha", "draws": 9, "eta": 3, "min_share": 0.1})
    assert search.main([*words, "--estimate"]) == 0
    said = capsys.readouterr().out
    # 9 draws to 1/9, 3 of them on to 1/3, 1 of these to the end: 1 + 3 * 2/9 + 2/3 trials of 2,304 tokens
    assert "5,376" in said and "at most 2.333 trials' worth" in said
    assert not (tmp_path / "out").exists()


def test_a_search_that_is_running_is_not_disturbed(tmp_path, capsys):
    words = search_words(tmp_path)
    with Run(tmp_path / "out").lock():
        assert search.main(words) == 2
    assert "is being written by" in capsys.readouterr().err


def test_a_damaged_ledger_is_named(tmp_path, capsys):
    words = search_words(tmp_path)
    assert search.main([*words, "trials=2"]) == 0
    path = tmp_path / "out/ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"garbage\n", *lines[2:]]))
    assert search.main(words) == 2
    assert "line 2 is damaged" in capsys.readouterr().err


# ---- identity


def test_equal_settings_have_equal_ids_however_they_are_written(tmp_path):
    _, study = study_of(search_words(tmp_path))
    short = study.identity({"model.norm": "rmsnorm"})
    assert short == study.identity({"model.norm": {"kind": "rmsnorm"}}) == study.identity({})
    assert short == study.identity({"optim.lr": 3e-3})  # the recipe's own value
    assert short != study.identity({"model.norm": "layernorm"})
    config = study.train_config({}, 7)
    assert study.id_of(config) == short  # the seed is not part of it
    assert build(TrainConfig, plain(config)) == config


def test_what_another_search_found_is_not_trained_again(tmp_path, swept, monkeypatch):
    before = sorted(str(p) for p in (swept / "out").rglob("*"))
    trained = []
    from pipelines.lib.search.worker import perform

    def counted(job):
        trained.append(job["config"]["optim"]["lr"])
        return perform(job)

    monkeypatch.setattr("pipelines.lib.search.guide.perform", counted)
    vary = {"model.norm": ["rmsnorm", "layernorm"], "optim.lr": [0.001, 0.01, 0.0001]}
    words = search_words(tmp_path, vary=vary)
    words[1] = f"data={swept / 'data'}"
    assert search.main([*words, f"also={swept / 'out'}"]) == 0
    ledger = Ledger(tmp_path / "out")
    taken = [row for row in ledger.rows.values() if row["same_as"]]
    assert len(ledger.trials) == 6 and len(taken) == 4
    expected = {(t[1], t[3]): t[5] for t in told(swept / "out")}
    assert all(row["metrics"]["val/nll"] == expected[row["id"], 0]["val/nll"] for row in taken)
    assert trained.count(0.0001) == 2
    # The other search's winner had seed 1; this one's was trained here once more, for a checkpoint of its own.
    assert len(trained) <= 3
    assert (tmp_path / "out" / (tmp_path / "out/winner").read_text().strip() / "checkpoints").is_dir()
    assert sorted(str(p) for p in (swept / "out").rglob("*")) == before


# ---- on Ray Tune


def test_trials_run_on_tune_and_a_killed_worker_is_replaced(tmp_path, ray_session, swept):
    words = [*search_words(tmp_path, parallel=2), "seeds=2"]
    marker = tmp_path / "killed"

    def kill_one() -> None:
        import psutil

        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not marker.exists():
            for process in psutil.Process().children(recursive=True):
                try:
                    begun = list((tmp_path / "out/trials").glob("*/.driver"))
                    if begun and "ResourceTrainable" in " ".join(process.cmdline()):
                        process.kill()
                        marker.touch()
                        return
                except (psutil.Error, OSError):
                    continue
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    assert search.main(words) == 0
    thread.join()
    assert marker.exists()
    found = {(t[1], t[3]): t[5] for t in told(tmp_path / "out")}
    expected = {(t[1], t[3]): t[5] for t in told(swept / "out")}
    assert {tuple(sorted(m.items())) for m in found.values()} == {tuple(sorted(m.items())) for m in expected.values()}
    assert len(list((tmp_path / "out/trials").glob("*/checkpoints/step_*"))) == 1


def test_more_trials_at_once_than_fit_are_refused(tmp_path, ray_session, capsys):
    assert search.main([*search_words(tmp_path), "parallel=64"]) == 2
    assert "try parallel=" in capsys.readouterr().err
