"""Stages as Ray jobs against a local head, started as the README says; and where a job's paths lie."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from pipelines.lib import jobs, tracking
from pipelines.lib.config import InputError
from pipelines.lib.jobs import storage_path
from pipelines.lib.jsonl import rows
from tests.conftest import REPO
from tests.pipelines.tiny import make_tokens

RAY = Path(sys.executable).with_name("ray")
TRAIN = (
    "model.d_model=32 model.n_layers=2 model.seq_len=32 model.attention.n_heads=2 batch_tokens=384 micro_batch=4 "
    "steps=20 log_every=1 eval_every=10 sample_prompts=[] device=cpu threads=1 cpus_per_worker=0.5 data=tokens"
).split()


# ---- where paths lie


def test_relative_paths_lie_under_the_storage_root_and_absolute_ones_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NOVELLA_STORAGE", raising=False)
    assert storage_path("runs/a") == tmp_path / "runs" / "a"
    monkeypatch.setenv("NOVELLA_STORAGE", "/mnt/storage")
    assert storage_path("runs/../data") == Path("/mnt/storage/data")
    assert storage_path("/abs/x") == Path("/abs/x") and storage_path("file:///abs/x") == Path("/abs/x")
    assert storage_path("~/x") == Path.home() / "x"


def test_a_storage_root_that_is_relative_and_a_url_are_refused(monkeypatch):
    with pytest.raises(InputError, match="s3://bucket/run is a URL; give a local or shared folder"):
        storage_path("s3://bucket/run")
    monkeypatch.setenv("NOVELLA_STORAGE", "storage")
    with pytest.raises(InputError, match="NOVELLA_STORAGE=storage is no absolute path"):
        storage_path("runs/a")


def test_a_job_without_a_storage_root_is_refused_before_it_writes_where_ray_deletes(tmp_path, monkeypatch):
    uploaded = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    uploaded.mkdir(parents=True)
    monkeypatch.chdir(uploaded)
    monkeypatch.delenv("NOVELLA_STORAGE", raising=False)
    with pytest.raises(InputError, match="NOVELLA_STORAGE is not set in this Ray job"):
        storage_path("runs/a")


def test_a_job_does_not_upload_more_than_the_source(tmp_path):
    """What Ray packs from a checkout that also holds an environment, runs, data and a store."""
    from ray._private.runtime_env.packaging import _dir_travel

    for name in (".rayignore", ".gitignore"):
        shutil.copy(REPO / name, tmp_path)
    kept = ["pipelines/train.py", "models/gpt/model.py", "pipelines/recipes/gpt.yaml", "cluster.yaml", "pyproject.toml"]
    heavy = [".git/objects/x", ".venv/lib/x.so", "runs/a/checkpoints/x", "data/x.txt", "mlflow.db", "mlartifacts/1/x"]
    heavy += ["pipelines/__pycache__/train.pyc", "novella.egg-info/x", ".mypy_cache/x", "coverage.xml", "shared/x"]
    for name in kept + heavy:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = []
    _dir_travel(tmp_path, [], lambda path: found.append(path.relative_to(tmp_path).as_posix()), include_gitignore=True)
    assert set(kept) <= set(found) and not set(heavy) & set(found)
    assert not {".git", ".venv"} & set(found)  # not even walked through


# ---- a head and its jobs


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Head:
    """A Ray head as `make head` starts it, with a storage root, a token, ports and a temporary folder of its own."""

    def __init__(self, storage: Path):
        self.storage, self.home = storage, Path(tempfile.mkdtemp(prefix="novella-head-"))
        token, self.dashboard = self.home / "token", free_port()
        token.write_text(secrets.token_hex(32))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        self.environment = clean | {"RAY_AUTH_TOKEN_PATH": str(token), "NOVELLA_STORAGE": str(storage)}
        self.client = self.environment | {
            "RAY_AUTH_MODE": "token",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
        }
        command = [sys.executable, "-m", "pipelines.lib.jobs", "head", f"--port={free_port()}"]
        command += [f"--dashboard-port={self.dashboard}", f"--temp-dir={self.home}/ray", "--num-cpus=2"]
        command += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
        command += ["--object-store-memory=100000000"]
        with open(self.home / "log", "w") as log:
            self.process = subprocess.Popen(
                command, cwd=REPO, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while self.ask(self.client).returncode:
            assert time.monotonic() < deadline and self.process.poll() is None, (self.home / "log").read_text()
            time.sleep(0.5)

    def ask(self, environment):
        return subprocess.run([RAY, "job", "list"], env=environment, capture_output=True, text=True)

    def submit(self, *words, wait=True):
        command = [RAY, "job", "submit", *(() if wait else ("--no-wait",)), "--working-dir", ".", "--", *words]
        return subprocess.run(command, cwd=REPO, env=self.client, capture_output=True, text=True, timeout=240)

    def listening(self):
        """Addresses that the head's processes listen on."""
        family = [p for p in psutil.process_iter() if belongs(p, self.process.pid)]
        return {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(8)
        for process in psutil.process_iter():  # Ray's processes stand in the session that this head began
            if belongs(process, self.process.pid):
                process.kill()
        self.process.wait(20)
        shutil.rmtree(self.home, ignore_errors=True)


def belongs(process, session):
    try:
        return os.getsid(process.pid) == session
    except (OSError, psutil.Error):
        return False


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    make_tokens(storage / "tokens")
    head = Head(storage)
    yield head
    head.stop()


def test_the_head_listens_on_loopback_only_and_wants_the_token(head):
    assert head.listening() and head.listening() <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    stranger = {k: v for k, v in head.client.items() if k != "RAY_AUTH_TOKEN_PATH"} | {"RAY_AUTH_MODE": "disabled"}
    refused = head.ask(stranger)
    assert refused.returncode != 0 and "Missing authentication token" in refused.stderr


def test_a_training_job_leaves_the_run_and_the_mlflow_run_that_a_local_training_leaves(head):
    job = head.submit("python", "-m", "pipelines.train", *TRAIN, "out=runs/job", "num_workers=1")
    assert job.returncode == 0, job.stdout + job.stderr
    assert "20 updates" in job.stdout and "succeeded" in job.stdout  # logs follow the job
    local = [sys.executable, "-m", "pipelines.train", *TRAIN, "out=runs/local", "num_workers=0"]
    subprocess.run(local, cwd=REPO, env=head.environment, check=True, capture_output=True)
    a, b = (head.storage / "runs" / name for name in ("job", "local"))
    for name in (".", "checkpoints", "checkpoints/step_20"):
        files = [{p.name for p in (run / name).iterdir()} - {".ray", "git.diff", "system.jsonl"} for run in (a, b)]
        assert files[0] == files[1]
    weights = [load_file(run / "checkpoints" / "step_20" / "model.safetensors") for run in (a, b)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[1])
    client = tracking.connect(f"sqlite:///{head.storage}/mlflow.db")
    runs = [client.get_run(json.loads((run / "mlflow.json").read_text())["run_id"]) for run in (a, b)]
    assert [r.info.status for r in runs] == ["FINISHED", "FINISHED"]
    assert set(runs[0].data.params) == set(runs[1].data.params) and "ray_job" in runs[0].data.tags
    for run, found in zip((a, b), runs, strict=True):
        logged = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "train/loss")]
        assert sorted(logged) == [(r["step"], r["train/loss"]) for r, _ in rows(run / "metrics.jsonl") if r]


def test_bad_input_of_a_job_ends_with_its_one_line_and_exit_code_2(head):
    job = head.submit("python", "-m", "pipelines.train", *TRAIN, "out=runs/bad", "num_worker=1")
    assert job.returncode != 0  # Ray's client has 1 for any failure and names the job's own code
    assert "exit code 2" in job.stdout
    assert any(line.startswith("error: ") and "num_workers" in line for line in job.stdout.splitlines())
    assert not (head.storage / "runs" / "bad").exists()


def test_a_stage_keeps_its_own_sigterm_handler_when_ray_starts():
    """What `ray job stop` sends; ray.init puts a handler of its own in its place."""
    code = (
        "import os, signal, time; got = []; signal.signal(signal.SIGTERM, lambda *a: got.append(a))\n"
        "from pipelines.lib.cluster import ensure_ray; ensure_ray(num_cpus=1)\n"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1); assert len(got) == 1; print('saved')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.stdout.endswith("saved\n"), done.stderr


@pytest.mark.slow
def test_stopping_a_job_saves_first_and_the_same_job_resumes(head):
    words = ["python", "-m", "pipelines.train", *TRAIN, "out=runs/stopped", "steps=400", "num_workers=1"]
    submitted = head.submit(*words, wait=False)
    name = next(word for word in submitted.stdout.split() if word.strip("'").startswith("raysubmit_")).strip("'")
    run = head.storage / "runs" / "stopped"
    deadline = time.monotonic() + 90
    while sum(1 for _ in rows(run / "metrics.jsonl")) < 30:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    subprocess.run([RAY, "job", "stop", name], env=head.client, check=True, capture_output=True, timeout=90)
    log = subprocess.run([RAY, "job", "logs", name], env=head.client, capture_output=True, text=True).stdout
    assert "resume with: python -m pipelines.train" in log, log
    saved = int((run / "last").read_text().strip().removeprefix("step_"))
    assert 30 <= saved < 400 and max(r["step"] for r, _ in rows(run / "metrics.jsonl") if r) - saved <= 1
    again = head.submit(*words)
    assert again.returncode == 0, again.stdout
    assert [r["step"] for r, _ in rows(run / "metrics.jsonl") if r] == list(range(1, 401))


def test_head_makes_a_token_only_where_there_is_none(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(jobs.subprocess, "run", lambda command, **_: asked.append(command))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    jobs.make_token("ray")
    assert asked == [["ray", "get-auth-token", "--generate"]]
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    jobs.make_token("ray")
    assert len(asked) == 1
