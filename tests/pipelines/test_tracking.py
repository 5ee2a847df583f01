"""Tracking: MLflow holds what the run folder says, once, whatever is killed, raced or unreachable."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from pipelines.lib import jobs, machine, tracking
from pipelines.lib.config import InputError, read_yaml
from pipelines.lib.jsonl import append, figures, row_at, rows
from pipelines.lib.tracking import Children, Tracker

FAST = {"interval_s": 0.02, "system_s": 0}
CONFIG = {"model": {"kind": "gpt", "d_model": 64, "norm": {"kind": "rmsnorm", "eps": 1e-6}}, "optim": {"lr": 1e-3}}


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported MLflow already: a fork of them starts in milliseconds instead of two seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "tests.pipelines.test_tracking"])
    return context


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A store made once; its file is copied for tests that do not test the making (2 s each)."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracking.make_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch):
    """An MLflow client on a store of this test, which tracking uses, too."""
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("NOVELLA_STORAGE", str(tmp_path))
    return tracking.connect(uri)


def row(step, **more):
    return {"step": step, "time_ms": 1_700_000_000_000 + step, "train/loss": 1 / (step + 1), "train/lr": 1e-3, **more}


def history(client, run_id, key="train/loss"):
    """(step, value, time) of every row that MLflow has of a metric, straight from the store."""
    return sorted((m.step, m.value, m.timestamp) for m in client.get_metric_history(run_id, key))


def expected(path, key="train/loss"):
    return [(r["step"], r[key], r["time_ms"]) for r, _ in rows(path) if r and key in r]


def only_run(client):
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return run


# ---- exactly once


def drive(environment, run_dir, started):
    """A driver that follows metrics.jsonl for ever; the test kills it."""
    os.environ.update(environment)
    tracker = Tracker.start(run_dir, "train", CONFIG, **FAST)
    tracker.mirror(Path(run_dir) / "metrics.jsonl")
    started.set()
    time.sleep(60)


def test_a_driver_killed_again_and_again_logs_every_step_exactly_once(store, tmp_path, processes):
    """kill -9 at random moments, also before the run exists, while 500 rows a second are written."""
    random.seed(1)
    run, stop = tmp_path / "run", threading.Event()
    run.mkdir()

    def write():
        step = 0
        while not stop.is_set():
            for _ in range(5):
                append(run / "metrics.jsonl", row(step, **({"val/nll": 2.0} if step % 100 == 0 else {})))
                step += 1
            time.sleep(0.01)

    writer = threading.Thread(target=write)
    writer.start()
    kills = 0
    for attempt in range(10):
        started = processes.Event()
        driver = processes.Process(target=drive, args=(dict(os.environ), run, started))
        driver.start()
        if attempt % 4:
            started.wait(30)
        time.sleep(random.uniform(0, 0.4))
        os.kill(driver.pid, signal.SIGKILL)
        driver.join()
        kills += driver.exitcode == -signal.SIGKILL
    stop.set()
    writer.join()
    run_id = tracking.sync(run)
    assert kills == 10
    found = only_run(store)
    assert found.info.run_id == run_id and found.info.status == "KILLED"
    for key in ("train/loss", "train/lr", "val/nll"):
        assert history(store, run_id, key) == expected(run / "metrics.jsonl", key)
    assert len(expected(run / "metrics.jsonl")) > 1000


def test_two_drivers_of_one_folder_log_every_step_exactly_once(store, tmp_path, processes):
    run = tmp_path / "run"
    run.mkdir()
    started = processes.Event()
    drivers = [processes.Process(target=drive, args=(dict(os.environ), run, started)) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for step in range(300):
        append(run / "metrics.jsonl", row(step))
        time.sleep(0.005)
    for driver in drivers:
        driver.kill()
        driver.join()
    run_id = tracking.sync(run)
    assert only_run(store).info.run_id == run_id
    assert history(store, run_id) == expected(run / "metrics.jsonl")


def test_two_copies_without_the_lock_still_log_every_step_once(store, tmp_path):
    """A lock can fail on a network disk; the store's key (run, name, step, time, value) holds then."""
    run = tmp_path / "run"
    Tracker.start(run, "train", CONFIG, **FAST).close()
    for step in range(250):
        append(run / "metrics.jsonl", row(step, **{f"m/{i}": float(i) for i in range(10)}))
    copies = [tracking.Copy(run, tracking.tracking_uri()) for _ in range(2)]
    for copy in copies:
        copy._open()  # both see the same cursor
    for copy in copies:
        copy._rows("metrics.jsonl")
    run_id = only_run(store).info.run_id
    assert history(store, run_id) == expected(run / "metrics.jsonl")
    assert len(history(store, run_id, "m/3")) == 250


def begin(environment, run_dir, failures):
    os.environ.update(environment)
    os.environ.pop("MLFLOW_TRACKING_URI")  # the default: mlflow.db under the storage root
    try:
        with Tracker.start(run_dir, "train", CONFIG, wait_s=60, **FAST) as tracker:
            append(Path(run_dir) / "metrics.jsonl", row(0))
            assert tracker.run_id
    except BaseException as error:
        failures.put(repr(error))
        raise


def test_six_processes_starting_at_once_on_a_new_store_all_succeed(tmp_path, monkeypatch, processes):
    monkeypatch.setenv("NOVELLA_STORAGE", str(tmp_path))
    failures, environment = processes.SimpleQueue(), dict(os.environ)
    group = [processes.Process(target=begin, args=(environment, tmp_path / f"run{i}", failures)) for i in range(6)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in group] == [0] * 6
    client = tracking.connect(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("novella").experiment_id])
    assert sorted(r.info.run_name for r in runs) == [f"run{i}" for i in range(6)]
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert all(history(client, r.info.run_id) == [(0, 1.0, 1_700_000_000_000)] for r in runs)
    assert not list(tmp_path.glob("*.new"))  # nothing half made lies around


def make_and_die(uri):
    threading.Timer(0.3, os._exit, (9,)).start()
    tracking.make_store(uri)


def test_a_store_whose_making_was_killed_is_made_again(tmp_path, processes):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    process = processes.Process(target=make_and_die, args=(uri,))
    process.start()
    process.join()
    assert process.exitcode == 9 and not (tmp_path / "mlflow.db").exists()
    tracking.make_store(uri)
    assert tracking.connect(uri).search_experiments()


# ---- resume


def test_a_resumed_run_continues_the_same_mlflow_run(store, tmp_path):
    run = tmp_path / "run"
    for first, steps in ((0, 10), (10, 20)):
        with Tracker.start(run, "train", {**CONFIG, "steps": steps}, **FAST) as tracker:
            for step in range(first, steps):
                append(run / "metrics.jsonl", row(step))
    found = only_run(store)
    assert found.info.run_id == tracker.run_id and found.info.status == "FINISHED"
    assert history(store, tracker.run_id) == expected(run / "metrics.jsonl")
    assert found.data.params["steps"] == "10" and found.data.tags["changed.steps"] == "20"


def test_a_folder_without_mlflow_json_continues_the_run_of_its_checkpoint(store, tmp_path):
    with Tracker.start(tmp_path / "run", "train", CONFIG, **FAST) as tracker:
        first = tracker.run_id
    for name in ("mlflow.json", "tracking.jsonl"):
        (tmp_path / "run" / name).unlink()
    with Tracker.start(tmp_path / "run", "train", CONFIG, resume_id=first, **FAST) as tracker:
        assert tracker.run_id == first


def test_a_run_deleted_in_mlflow_or_tracked_elsewhere_is_copied_whole_into_a_new_run(store, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with Tracker.start(run, "train", CONFIG, **FAST) as tracker:
        append(run / "metrics.jsonl", row(0))
        tracker.metrics({"eval/acc": 0.5}, step=0)
    store.delete_run(tracker.run_id)
    with Tracker.start(run, "train", CONFIG, **FAST) as again:
        append(run / "metrics.jsonl", row(1))
    assert again.run_id != tracker.run_id
    assert history(store, again.run_id) == expected(run / "metrics.jsonl")
    assert len(history(store, again.run_id, "eval/acc")) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    other = tracking.connect(f"sqlite:///{tmp_path}/other.db")
    assert history(other, tracking.sync(run)) == expected(run / "metrics.jsonl")


def test_a_run_deleted_while_it_trains_is_left_alone(store, tmp_path, capsys):
    run = tmp_path / "run"
    tracker = Tracker.start(run, "train", CONFIG, **FAST)
    store.delete_run(tracker.run_id)
    append(run / "metrics.jsonl", row(0))
    tracker.close()
    assert "was deleted" in capsys.readouterr().err
    assert not store.search_runs([e.experiment_id for e in store.search_experiments()])


# ---- what a row may be


def test_rows_with_nan_infinity_text_null_and_damage_leave_the_rest_right(store, tmp_path, capsys):
    run = tmp_path / "run"
    with Tracker.start(run, "train", CONFIG, **FAST) as tracker:
        file = run / "metrics.jsonl"
        append(file, row(0, **{"a/nan": math.nan, "a/inf": math.inf, "a/text": "x", "a/null": None, "a/true": True}))
        with open(file, "a") as f:
            f.write('{"step": 1, "train/lo')  # a writer that was killed here
        append(file, row(1))
        append(file, {"no step": 1})
        append(file, row(2, **{"bad name (µ) [0]//x": 1.0}))
    assert [step for step, *_ in history(store, tracker.run_id)] == [0, 1, 2]
    assert math.isnan(history(store, tracker.run_id, "a/nan")[0][1])
    names = set(store.get_run(tracker.run_id).data.metrics)
    assert {"a/inf", "a/null", "a/true", "bad name ___ _0_/x"} <= names and "a/text" not in names
    assert json.loads(file.read_text().splitlines()[0], parse_constant=pytest.fail)["a/inf"] is None
    assert "2 line(s)" in capsys.readouterr().err


def test_a_half_written_line_waits_for_its_end(store, tmp_path):
    run = tmp_path / "run"
    with Tracker.start(run, "train", CONFIG, **FAST) as tracker:
        text = json.dumps(row(0))
        with open(run / "metrics.jsonl", "w") as f:
            f.write(text[:20])
            f.flush()
            time.sleep(0.2)
            assert not history(store, tracker.run_id)
            f.write(text[20:] + "\n")
    assert history(store, tracker.run_id) == expected(run / "metrics.jsonl")


def test_a_row_wider_than_a_batch_and_many_narrow_ones_arrive_whole(store, tmp_path):
    run = tmp_path / "run"
    wide = {f"layer/{i}": float(i) for i in range(2500)}
    with Tracker.start(run, "train", CONFIG, **FAST) as tracker:
        append(run / "metrics.jsonl", row(0, **wide))
        for step in range(1, 700):
            append(run / "metrics.jsonl", row(step))
    metrics = store.get_run(tracker.run_id).data.metrics
    assert {k: metrics[k] for k in wide} == wide
    assert history(store, tracker.run_id) == expected(run / "metrics.jsonl")
    assert metrics["system/logged_step"] == 699


# ---- params, inputs, artifacts, models


def test_params_are_flat_names_and_no_value_is_cut_silently(store, tmp_path):
    long = "x" * 7000
    config = {
        **CONFIG,
        "sizes": [1, 2],
        "none": None,
        "empty": "",
        "many": {f"k{i}": i for i in range(250)},
        "long": long,
    }
    with Tracker.start(tmp_path / "run", "train", config, **FAST) as tracker:
        pass
    params = store.get_run(tracker.run_id).data.params
    assert params["model.norm"] == "rmsnorm" and params["model.norm.eps"] == "1e-06"
    assert params["optim.lr"] == "0.001" and params["sizes"] == "[1, 2]" and params["none"] == "null"
    assert params["empty"] == '""' and params["many.k249"] == "249"
    assert params["long"].startswith("sha256 ") and "7000 characters" in params["long"]
    whole = Path(store.download_artifacts(tracker.run_id, "config.yaml", str(tmp_path)))
    assert read_yaml(whole.read_text()) == config


def test_two_runs_of_a_stage_have_the_same_names(store, tmp_path):
    found = []
    for name, lr in (("a", 1e-3), ("b", 3e-3)):
        run = tmp_path / name
        with Tracker.start(run, "train", {**CONFIG, "optim": {"lr": lr}}, interval_s=0.02, system_s=0.05) as tracker:
            append(run / "metrics.jsonl", row(0))
            time.sleep(0.3)
        found.append(store.get_run(tracker.run_id))
    a, b = (set(run.data.params) | set(run.data.metrics) for run in found)
    assert a == b
    assert {k for k in found[0].data.params if found[0].data.params[k] != found[1].data.params[k]} == {"optim.lr"}
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= a


def test_dataset_git_table_plot_and_samples_stand_on_the_run(store, tmp_path):
    run = tmp_path / "run"
    with Tracker.start(run, "train", CONFIG, datasets=[("stdlib", "f" * 64, "shards")], **FAST) as tracker:
        for step in range(3):
            append(run / "metrics.jsonl", row(step))
        for step in (1, 2, 2):  # a resumed run samples its last steps again
            tracker.table("samples", [{"step": step, "prompt": "def", "text": "def f():\n"}])
        (run / "samples.txt").write_text("hello")
        tracker.artifact(run / "samples.txt")
        tracker.artifact(run / "not there")
        tracker.plot("loss", ["train/loss", "val/nll"])
    found = store.get_run(tracker.run_id)
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("stdlib", "f" * 36)
    assert json.loads(data.dataset.source)["uri"] == str(tmp_path / "shards")
    names = {a.path for a in store.list_artifacts(tracker.run_id)}
    assert {"config.yaml", "samples.json", "samples.txt", "plots"} <= names
    table = json.loads(Path(store.download_artifacts(tracker.run_id, "samples.json", str(tmp_path))).read_text())
    assert table == {
        "columns": ["step", "prompt", "text"],
        "data": [[1, "def", "def f():\n"], [2, "def", "def f():\n"]],
    }
    assert found.data.tags["mlflow.loggedArtifacts"] == '[{"path": "samples.json", "type": "table"}]'
    sha = machine.git_sha()
    assert found.data.tags.get("mlflow.source.git.commit") == sha
    assert found.data.tags["stage"] == "train" and found.data.tags["run_dir"] == str(run)


def test_checkpoints_are_models_of_the_run_with_its_figures_and_data_and_no_second_row(store, tmp_path):
    run = tmp_path / "run"
    for _ in range(2):  # resumed: the same checkpoints are reported again
        with Tracker.start(run, "train", CONFIG, datasets=[("stdlib", "f" * 64, "shards")], **FAST) as tracker:
            for step in (10, 20):
                checkpoint = run / "checkpoints" / f"step_{step}"
                checkpoint.mkdir(parents=True, exist_ok=True)
                tracker.checkpoint(checkpoint, step, {"val/nll": 2.0 - step / 100})
                if not row_at(run / "metrics.jsonl", step):
                    append(run / "metrics.jsonl", row(step, **{"val/nll": 2.0 - step / 100}))
            (run / "best").write_text("step_20")
    experiment = only_run(store).info.experiment_id
    models = sorted(store.search_logged_models([experiment]), key=lambda m: m.name)
    assert [m.name for m in models] == ["step_10", "step_20"]
    assert all(m.source_run_id == tracker.run_id and str(m.status) == "READY" for m in models)
    assert [m.tags["path"] for m in models] == [str(run / "checkpoints" / f"step_{s}") for s in (10, 20)]
    (metric,) = models[1].metrics
    assert (metric.key, metric.value, metric.step, metric.dataset_name) == ("val/nll", 1.8, 20, "stdlib")
    assert sorted(o.step for o in store.get_run(tracker.run_id).outputs.model_outputs) == [10, 20]
    assert history(store, tracker.run_id, "val/nll") == expected(run / "metrics.jsonl", "val/nll")
    assert only_run(store).data.tags["checkpoint.best"] == "step_20"
    assert not list((tmp_path / "mlartifacts").rglob("*.p*kl*"))


def test_a_checkpoint_that_the_keep_policy_deletes_leaves_mlflow_too(store, tmp_path):
    run = tmp_path / "run"
    with Tracker.start(run, "train", CONFIG, **FAST) as tracker:
        for step in (1, 2, 3):
            (run / "checkpoints" / f"step_{step}").mkdir(parents=True)
            append(run / "metrics.jsonl", row(step))
            tracker.checkpoint(run / "checkpoints" / f"step_{step}", step)
            until(lambda step=step: str(step) in json.loads((run / "mlflow.json").read_text())["models"])
            if step == 2:
                (run / "checkpoints" / "step_1").rmdir()
        (run / "checkpoints" / "step_2").rmdir()
    found = only_run(store)
    assert [m.name for m in store.search_logged_models([found.info.experiment_id])] == ["step_3"]


def test_evaluation_results_join_the_finished_run_and_its_model(store, tmp_path):
    run = tmp_path / "run"
    with Tracker.start(run, "train", CONFIG, **FAST) as tracker:
        checkpoint = run / "checkpoints" / "step_10"
        checkpoint.mkdir(parents=True)
        append(run / "metrics.jsonl", row(10))
        tracker.checkpoint(checkpoint, 10)
    with Tracker.attach(run, interval_s=0.02) as attached:
        attached.metrics({"eval/arc/acc": 0.25}, step=10)
    found = only_run(store)
    assert found.data.metrics["eval/arc/acc"] == 0.25 and found.info.status == "FINISHED"
    (model,) = store.search_logged_models([found.info.experiment_id])
    assert {m.key: m.value for m in model.metrics} == {"eval/arc/acc": 0.25}
    with Tracker.start(tmp_path / "evaluation", "evaluate", {}, parent_run_id=found.info.run_id, **FAST) as child:
        child.uses_model(run, 10)
    inputs = store.get_run(child.run_id).inputs.model_inputs
    assert [i.model_id for i in inputs] == [model.model_id]


def test_attaching_while_the_driver_trains_goes_through_the_driver(store, tmp_path):
    run = tmp_path / "run"
    with Tracker.start(run, "train", CONFIG, **FAST) as tracker:
        with Tracker.attach(run, interval_s=0.02) as attached:
            attached.metrics({"eval/acc": 0.5}, step=1)
            assert attached.run_id == tracker.run_id
        assert only_run(store).data.metrics["eval/acc"] == 0.5 and only_run(store).info.status == "RUNNING"


def test_tracking_off_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "connect", lambda uri: pytest.fail("asked for a store"))
    with Tracker.start(tmp_path / "run", "train", CONFIG, kind="none") as tracker:
        assert tracker.run_id is None
        tracker.mirror(tmp_path / "metrics.jsonl")
        tracker.metrics({"a": 1.0})
        tracker.artifact(tmp_path)
        tracker.table("t", [{}])
        tracker.board("t", [{}])
        children = Children(tracker)
        children.add(tmp_path / "trial", name="t", config={}, status="done", metrics={}, step=1)
        children.close()
        tracker.checkpoint(tmp_path, 1)
        tracker.uses_model(tmp_path, 1)
        tracker.plot("loss", ["a"])
    Tracker.attach(tmp_path).close()
    assert not list(tmp_path.iterdir())


def test_status_tells_how_the_driver_ended(store, tmp_path):
    for name, error, status in (("a", ValueError, "FAILED"), ("b", KeyboardInterrupt, "KILLED")):
        with pytest.raises(error), Tracker.start(tmp_path / name, "train", CONFIG, **FAST) as tracker:
            raise error
        assert store.get_run(tracker.run_id).info.status == status


# ---- a server


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """MLflow's own server application in a process that can be killed and started again on the same port."""

    def __init__(self, folder, processes):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.folder, self.processes, self.uri = folder, processes, f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self.process = self.processes.Process(target=serve, args=(self.folder, self.port))
        self.process.start()
        return tracking.connect(self.uri)

    def __exit__(self, *error):
        self.process.kill()
        self.process.join()


def serve(folder, port):
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/server.db"
    os.environ["_MLFLOW_SERVER_ARTIFACT_DESTINATION"] = str(folder / "artifacts")
    os.environ["_MLFLOW_SERVER_SERVE_ARTIFACTS"] = "true"
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = "mlflow-artifacts:/"
    from mlflow.server import app
    from werkzeug.serving import make_server

    make_server("127.0.0.1", port, app, threaded=True).serve_forever()


def test_a_dead_server_does_not_stop_a_run_and_is_caught_up_later(
    tmp_path, monkeypatch, capsys, empty_store, processes
):
    """The server is dead at the start, comes up, and is gone before the end; `sync` brings the rest."""
    (tmp_path / "server.db").write_bytes(empty_store.read_bytes())
    server = Server(tmp_path, processes)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = tmp_path / "run"
    tracker = Tracker.start(run, "train", CONFIG, interval_s=0.1, system_s=0, datasets=[("a", "b", "c")])
    assert tracker.run_id is None
    append(run / "metrics.jsonl", row(0, **{"a/nan": math.nan, "a/inf": math.inf}))
    with server as client:
        until(lambda: tracker.run_id and not tracker.trouble)
        append(run / "metrics.jsonl", row(1))
        until(lambda: client.get_run(tracker.run_id).data.metrics["system/logged_step"] == 1)
    for step in range(2, 50):
        append(run / "metrics.jsonl", row(step))
    (run / "checkpoints" / "step_49").mkdir(parents=True)
    tracker.checkpoint(run / "checkpoints" / "step_49", 49)
    tracker.close(wait_s=10)
    said = capsys.readouterr().err
    assert 1 <= said.count("does not take metrics") <= 2 and "answers again" in said
    assert f"python -m pipelines.lib.tracking sync {run}" in said
    with server as client:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", server.port)) == 0)
        assert tracking.main(["sync", str(run)]) == 0
        assert history(client, tracker.run_id) == expected(run / "metrics.jsonl")
        found = client.get_run(tracker.run_id)
        assert found.info.status == "FINISHED"
        assert "config.yaml" in {a.path for a in client.list_artifacts(tracker.run_id)}
        assert [m.name for m in client.search_logged_models([found.info.experiment_id])] == ["step_49"]
        assert math.isnan(history(client, tracker.run_id, "a/nan")[0][1])


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- a search and its trials


def trial(out, i, steps=4):
    """A trial's folder as its training leaves it, and what a search says of it."""
    folder = out / "trials" / f"t{i}-s0"
    for step in range(1, steps + 1):
        if not row_at(folder / "metrics.jsonl", step):
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            append(folder / "metrics.jsonl", row(step, **({"val/bpb": 2.0 + i} if step == steps else {})))
    return folder, {
        "name": f"t{i}-s0",
        "config": {**CONFIG, "optim": {"lr": 1e-3 * (i + 1)}, "out": str(folder)},
        "status": "done",
        "metrics": {"val/bpb": 2.0 + i, "val/score": 0.5, "cost/parameters": 1000.0 + i},
        "step": steps,
        "tags": {"trial": i},
        "datasets": [("stdlib", "f" * 64, "shards")],
    }


def search(environment, out, n):
    """A driver of a search of n trials, which adds what is not copied yet; the test kills it."""
    os.environ.update(environment)
    with Tracker.start(out, "search", {"rule": "sweep"}, **FAST) as tracker:
        children = Children(tracker, interval_s=0.02)
        for i in range(n):
            folder, what = trial(out, i)
            if not tracking.copied(folder):
                children.add(folder, **what)
        children.close(100)


def children_of(client, run_id):
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{run_id}'")


def test_a_search_killed_twice_shows_thirty_trials_once_each_and_every_step_once(store, tmp_path, processes):
    out = tmp_path / "search"
    for copied in (4, 15):
        driver = processes.Process(target=search, args=(dict(os.environ), out, 30))
        driver.start()
        until(lambda copied=copied: len(list(out.glob("trials/*/mlflow.json"))) >= copied)
        os.kill(driver.pid, signal.SIGKILL)
        driver.join()
    assert len(list(out.glob("trials/*/mlflow.json"))) < 30
    search(os.environ, out, 30)
    (parent,) = [r for r in store.search_runs(["1"]) if r.data.tags["stage"] == "search"]
    found = children_of(store, parent.info.run_id)
    assert sorted(r.info.run_name for r in found) == sorted(f"t{i}-s0" for i in range(30))
    assert {r.info.status for r in found} == {"FINISHED"} and {frozenset(r.data.metrics) for r in found} == {
        frozenset(found[0].data.metrics)
    }
    for run in found:
        folder = Path(run.data.tags["run_dir"])
        assert history(store, run.info.run_id) == expected(folder / "metrics.jsonl")
        for key in ("val/bpb", "val/score", "cost/parameters"):
            assert len(history(store, run.info.run_id, key)) == 1
        assert tracking.copied(folder) == run.info.run_id
        assert len([n for n, _ in rows(folder / "tracking.jsonl") if n["do"] == "end"]) == 1
        assert run.info.start_time == 1_700_000_000_001 < run.info.end_time
    parting = {key for run in found for key in run.data.params if run.data.params[key] != found[0].data.params[key]}
    assert parting == {"optim.lr"}


def test_a_trial_that_goes_on_is_one_run_and_saying_the_same_again_writes_nothing(store, tmp_path):
    with Tracker.start(tmp_path / "search", "search", {}, **FAST) as tracker:
        children = Children(tracker)
        for steps in (2, 2, 4):
            folder, what = trial(tmp_path / "search", 0, steps)
            children.git_sha = f"of step {steps}"  # a driver that goes on may be of a later commit
            children.add(folder, **what | {"name": "n" * 300, "tags": {"why": "", "source": None}})
        children.close()
    assert {run_id for _, run_id in children.news()} == {tracking.copied(folder)} and not children.news()
    (run,) = children_of(store, tracker.run_id)
    assert [step for step, *_ in history(store, run.info.run_id, "cost/parameters")] == [2, 4]
    assert history(store, run.info.run_id) == expected(folder / "metrics.jsonl")
    assert [n["do"] for n, _ in rows(folder / "tracking.jsonl")] == ["start", "end", "start", "end"]
    assert run.info.status == "FINISHED" and run.info.run_name == "n" * 250 and run.data.tags["why"] == ""


def test_a_trial_whose_making_was_cut_off_before_it_was_noted_is_not_made_twice(store, tmp_path, monkeypatch):
    save, failures = tracking.Copy._save, [OSError("the disk was full just then")]

    def fail_once(self):
        if "trials" in self.folder.parts and failures:
            raise failures.pop()
        save(self)

    monkeypatch.setattr(tracking.Copy, "_save", fail_once)
    with Tracker.start(tmp_path / "search", "search", {}, **FAST) as tracker:
        children = Children(tracker, interval_s=0.02)
        folder, what = trial(tmp_path / "search", 0)
        children.add(folder, **what)
        until(lambda: tracking.copied(folder))
        children.close()
    assert not failures and [r.info.run_id for r in children_of(store, tracker.run_id)] == [tracking.copied(folder)]


def test_a_search_goes_on_without_its_server_and_its_trials_follow_when_it_answers(
    store, tmp_path, monkeypatch, capsys
):
    connect, out = tracking.connect, tmp_path / "search"

    def refuse(uri):
        raise OSError("connection refused")

    monkeypatch.setattr(tracking, "connect", refuse)
    tracker = Tracker.start(out, "search", {}, **FAST)
    children = Children(tracker, interval_s=0.02)
    folder, what = trial(out, 0)
    children.add(folder, **what)
    until(lambda: tracker.trouble and children.trouble)
    assert tracker.run_id is None and not tracking.copied(folder)
    monkeypatch.setattr(tracking, "connect", connect)
    until(lambda: tracking.copied(folder))
    monkeypatch.setattr(tracking, "connect", refuse)
    late, what = trial(out, 1)
    children.add(late, **what | {"status": "failed"})
    children.close()
    tracker.close()
    assert f"lacks 1 of the trials (connection refused); later: python -m pipelines.lib.tracking sync {out}" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(tracking, "connect", connect)
    assert tracking.main(["sync", str(out)]) == 0
    assert "is up to date with 2 trials" in capsys.readouterr().out
    assert sorted(r.info.status for r in children_of(store, tracker.run_id)) == ["FAILED", "FINISHED"]


def test_a_board_is_replaced_and_of_many_only_the_newest_is_uploaded(store, tmp_path, monkeypatch):
    run, uploads = tmp_path / "search", []
    log_text = type(store).log_text
    monkeypatch.setattr(
        type(store), "log_text", lambda *a: uploads.append(a[3]) if a[3] == "leaderboard.json" else log_text(*a)
    )
    with Tracker.start(run, "search", {}, interval_s=60, system_s=0) as tracker:
        for i in range(50):
            tracker.board(
                "leaderboard", [{"trial": "a", "val/bpb": 2.0 - i / 100}, {"trial": "b", "val/bpb": math.nan}]
            )
        tracker.board("leaderboard", [{"trial": "a", "val/bpb": 1.51}, {"trial": "b", "val/bpb": math.nan}])
    assert len(uploads) == 1
    monkeypatch.setattr(type(store), "log_text", log_text)
    with Tracker.start(run, "search", {}, **FAST) as tracker:
        tracker.board("leaderboard", [{"trial": "a", "val/bpb": 1.51}, {"trial": "b", "val/bpb": math.nan}])
        tracker.table("samples", [{"text": "x"}])
    table = json.loads(Path(store.download_artifacts(tracker.run_id, "leaderboard.json", str(tmp_path))).read_text())
    assert table == {"columns": ["trial", "val/bpb"], "data": [["a", 1.51], ["b", None]]}
    shown = json.loads(store.get_run(tracker.run_id).data.tags["mlflow.loggedArtifacts"])
    assert {entry["path"] for entry in shown} == {"leaderboard.json", "samples.json"}


def test_one_tree_goes_from_tokens_and_from_a_search_to_model_evaluation_and_endpoint(store, tmp_path):
    """Walked by MLflow's own API only: who reads this data set, what did it log, who uses that."""
    out = tmp_path / "search"
    with Tracker.start(out, "search", {}, **FAST) as tracker:
        children = Children(tracker)
        for i in (0, 1):
            folder, what = trial(out, i)
            kept = folder / "checkpoints" / "step_4"
            kept.mkdir()
            children.add(folder, **what | ({"checkpoint": kept} if i == 0 else {}))
        children.close()
    served = out / "trials" / "t0-s0"
    with Tracker.attach(served, interval_s=0.02) as attached:
        attached.metrics({"eval/val/bpb": 1.9}, step=4)
    for _ in range(2):  # started again: the same run
        server = tracking.endpoint(served / "checkpoints" / "step_4", "http://127.0.0.1:8000", {"rows": 16})
        server.close()
    experiment = [store.get_experiment_by_name("novella").experiment_id]
    readers = store.search_runs(experiment, f"dataset.digest = '{'f' * 36}'")
    below = store.search_runs(experiment, f"tags.`mlflow.parentRunId` = '{tracker.run_id}'")
    assert {r.info.run_id for r in readers} == {r.info.run_id for r in below} and len(below) == 2
    (run,) = [r for r in below if r.outputs and r.outputs.model_outputs]
    model = store.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert model.source_run_id == run.info.run_id and model.tags["path"] == str(served / "checkpoints" / "step_4")
    figures = {m.key: (m.value, m.dataset_digest) for m in model.metrics}
    assert figures["val/bpb"] == (2.0, "f" * 36) and figures["eval/val/bpb"][0] == 1.9
    assert figures["cost/parameters"][0] == 1000.0
    (user,) = store.search_runs(experiment, f"tags.trained_by = '{run.info.run_id}'")
    serving = store.get_run(user.info.run_id)  # a search tells no model inputs
    assert [m.model_id for m in serving.inputs.model_inputs] == [model.model_id]
    assert serving.data.tags["stage"] == "serve" and serving.data.tags["url"] == "http://127.0.0.1:8000"
    assert serving.data.tags["run_dir"] == str(served) and serving.info.run_name == served.name
    assert serving.data.params["rows"] == "16" and serving.info.status == "FINISHED"


def test_an_endpoint_of_no_tracked_run_or_that_cannot_be_noted_is_a_server_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "connect", lambda uri: pytest.fail("asked for a store"))
    tracking.endpoint(tmp_path, "http://127.0.0.1:8000", {}).close()
    (tmp_path / "run" / "checkpoints" / "step_4").mkdir(parents=True)
    tracking.endpoint(tmp_path / "run" / "checkpoints" / "step_4", "http://127.0.0.1:8000", {}).close()
    assert not (tmp_path / "run" / "endpoints").exists()
    (tmp_path / "run" / "tracking.jsonl").touch()
    (tmp_path / "run" / "endpoints").write_text("in the way")
    tracking.endpoint(tmp_path / "run" / "checkpoints" / "step_4", "http://127.0.0.1:8000", {}).close()
    assert "this endpoint is not shown in MLflow" in capsys.readouterr().err


# ---- queries


def test_a_filter_finds_run_folders_and_says_what_it_cannot_read(store, tmp_path, monkeypatch):
    for name, loss in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        with Tracker.start(tmp_path / name, "train", CONFIG, experiment="e", **FAST) as tracker:
            tracker.metrics({"val/bpb": loss})
    store.create_run(store.get_experiment_by_name("e").experiment_id)  # of another program: it has no folder
    assert tracking.find_runs("") == [tmp_path / name for name in "abc"]
    assert tracking.find_runs('metrics."val/bpb" < 2.5', "e") == [tmp_path / "a", tmp_path / "b"]
    assert tracking.find_runs("tags.stage = 'serve'") == []
    for query, experiment, words in (
        ("val/bpb < 2", None, "MLflow cannot read the filter 'val/bpb < 2': .+"),
        ("", "f", "no experiment 'f' in MLflow at sqlite:.*; there is e, Default"),
    ):
        with pytest.raises(InputError, match=words) as raised:
            tracking.find_runs(query, experiment)
        assert "\n" not in str(raised.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(InputError, match=r"none\.db: no such store"):
        tracking.find_runs("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match="does not answer: "):
        tracking.find_runs("")
    assert not (tmp_path / "none.db").exists()


# ---- the address and the command


def test_the_store_is_the_named_one_or_a_file_under_the_storage_root(tmp_path, monkeypatch):
    monkeypatch.setenv("NOVELLA_STORAGE", str(tmp_path))
    for text, uri in (
        ("", f"sqlite:///{tmp_path}/mlflow.db"),
        ("sqlite:///sub/x.db", f"sqlite:///{tmp_path}/sub/x.db"),
        ("sqlite:////abs/x.db", "sqlite:////abs/x.db"),
        ("http://user:secret@host:5000", "http://user:secret@host:5000"),
        ("postgresql+psycopg2://host/db", "postgresql+psycopg2://host/db"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", text)
        assert tracking.tracking_uri() == uri
    assert tracking.public("http://user:secret@host:5000/x") == "http://host:5000/x"


@pytest.mark.parametrize("text", ["./mlruns", "file:///tmp/mlruns", "mlruns", "ftp://host/x", "sqlite"])
def test_a_store_that_mlflow_has_not_is_refused_before_anything_starts(tmp_path, monkeypatch, text):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", text)
    with pytest.raises(InputError, match="is no store that MLflow 3 has; use sqlite:///mlflow"):
        Tracker.start(tmp_path / "run", "train", CONFIG)


def test_sync_names_what_it_cannot_copy(tmp_path, capsys):
    assert tracking.main(["sync", str(tmp_path)]) == 2
    assert "holds no tracking.jsonl" in capsys.readouterr().err


def test_sync_leaves_a_run_to_its_living_driver(store, tmp_path, capsys):
    with Tracker.start(tmp_path / "run", "train", CONFIG, **FAST):
        assert tracking.main(["sync", str(tmp_path / "run")]) == 2
    assert "is being copied by its driver" in capsys.readouterr().err


@pytest.mark.parametrize("main", [tracking.main, jobs.main], ids=["tracking", "jobs"])
@pytest.mark.parametrize("words", [[], ["snyc"], ["sync"], ["ui", "--port", "x"], ["head", "--port", "x"]])
def test_bad_words_are_answered_in_one_line(main, words, capsys):
    with pytest.raises(SystemExit) as raised:
        main(words)
    said = capsys.readouterr().err
    assert raised.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_ui_says_that_its_port_is_taken(store, capsys):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        assert tracking.main(["ui", "--port", str(s.getsockname()[1])]) == 2
    assert "cannot be used" in capsys.readouterr().err


# ---- the files of lines


def test_a_line_is_strict_json_and_its_null_is_read_as_nan(tmp_path):
    path = tmp_path / "x.jsonl"
    row = {"step": 3, "time_ms": 5, "loss": math.nan, "norm": -math.inf, "metrics": {"a": [math.inf, 1]}, "text": "b"}
    append(path, {**row, "lr": 1, "tied": (1.5, math.nan)})
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["metrics"] == {"a": [None, 1]}
    ((found, _),) = rows(path)
    assert found["tied"] == [1.5, None]
    assert figures(found) == pytest.approx({"loss": math.nan, "norm": math.nan, "lr": 1.0}, nan_ok=True)
    path.write_text('{"step": 1, "loss": NaN}\n')  # as Python alone writes and reads it
    assert math.isnan(figures(next(rows(path))[0])["loss"])


def test_a_line_after_half_a_line_is_whole(tmp_path):
    path = tmp_path / "x.jsonl"
    append(path, {"step": 1})
    with open(path, "a") as f:
        f.write('{"step": 2')
    assert [r for r, _ in rows(path)] == [{"step": 1}]
    append(path, {"step": 2, "path": Path("a")})
    assert [r for r, _ in rows(path)] == [{"step": 1}, None, {"step": 2, "path": "a"}]


def test_rows_go_on_from_an_offset_and_begin_again_in_a_shorter_file(tmp_path):
    path = tmp_path / "x.jsonl"
    assert list(rows(path)) == []
    for step in range(3):
        append(path, {"step": step})
    (_, offset), *_ = rows(path)
    assert [r["step"] for r, _ in rows(path, offset)] == [1, 2]
    path.write_text('{"step": 9}\n')
    assert [r["step"] for r, _ in rows(path, 30)] == [9]


def test_row_at_finds_the_newest_row_of_a_step_in_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.lib.jsonl.READ_BYTES", 64)
    path = tmp_path / "x.jsonl"
    for step in range(0, 300, 3):
        append(path, {"step": step, "value": step})
    assert all((row_at(path, step) or {}).get("value") == (step if step % 3 == 0 else None) for step in range(300))
    assert row_at(tmp_path / "missing", 1) is None
