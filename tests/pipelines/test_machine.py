"""What a run says of its machine and source."""

from __future__ import annotations

import os
import subprocess

import pytest

from pipelines.lib import machine


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout of its own with one commit; returns a function that runs git in it."""
    identity = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **identity, "GIT_CONFIG_GLOBAL": os.devnull}
    git = lambda *words: subprocess.run(
        ["git", "-C", tmp_path, *words], env=environment, check=True, capture_output=True
    )
    git("init")
    (tmp_path / "a.py").write_text("x = 1\n")
    git("add", "a.py")
    git("commit", "-m", "first")
    monkeypatch.setattr(machine, "SOURCE", tmp_path)
    return git


def test_a_clean_checkout_has_its_commit_and_no_diff(checkout):
    assert machine.git_sha() == checkout("rev-parse", "HEAD").stdout.decode().strip()
    assert machine.git_diff() is None


def test_what_differs_from_the_commit_is_kept(checkout, tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 2\n")
    (tmp_path / "new.py").write_text("y = 1\n")
    assert machine.git_sha().endswith("+")
    diff = machine.git_diff()
    assert "-x = 1\n+x = 2\n" in diff and "# new file, not in the diff: new.py" in diff
    monkeypatch.setattr(machine, "DIFF_BYTES", 40)
    assert "# cut here: the whole diff has" in machine.git_diff()


def test_a_copy_without_git_says_nothing_but_what_it_was_told(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "SOURCE", tmp_path)
    monkeypatch.delenv("NOVELLA_GIT_SHA", raising=False)
    assert machine.git_sha() is None and machine.git_diff() is None
    monkeypatch.setenv("NOVELLA_GIT_SHA", "abc123")
    assert machine.git_sha() == "abc123"


def test_load_has_mlflow_names_and_the_gpus_that_the_driver_reports(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '97, 40960, 81920, 512.5'\necho '[N/A], 0, 81920, 60.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = machine.load(tmp_path)
    assert found["system/gpu_0_utilization_percentage"] == 97 and found["system/gpu_0_memory_usage_percentage"] == 50
    assert found["system/gpu_1_utilization_percentage"] == 0 and found["system/gpu_1_power_usage_watts"] == 60.1
    assert 0 < found["system/system_memory_usage_percentage"] < 100 and found["system/disk_available_megabytes"] > 0


def test_a_job_is_named_by_its_submission(monkeypatch):
    assert "ray_job" not in machine.tags()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    assert machine.tags()["ray_job"] == "raysubmit_1"
