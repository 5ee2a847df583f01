"""pipelines.demo: the whole road in one command, safe to run twice."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.demo import main
from tests.conftest import REPO
from tests.pipelines.tiny import WORDS


def texts(folder: Path) -> Path:
    """Fifty files of random sentences."""
    folder.mkdir()
    pick = random.Random(0)
    for i in range(50):
        lines = [" ".join(pick.choice(WORDS) for _ in range(12)) for _ in range(40)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_the_demo_goes_from_text_to_an_answering_endpoint_and_reuses_all_of_it_the_second_time(tmp_path):
    source = texts(tmp_path / "some texts")
    command = [
        sys.executable, "-m", "pipelines.demo", f"source={source}", "vocab_size=300", "steps=20", "num_workers=2",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    environment.pop("MLFLOW_TRACKING_URI")
    spent, said = [], []
    for _ in range(2):
        began = time.monotonic()
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        spent.append(time.monotonic() - began)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout)
    for text in said:
        assert re.search(r"200 \{.*\"completion_tokens\": \d+", text)
        scores = {
            name: float(value) for name, value in re.findall(r"│ (this model|xz|gzip|unigram) +│ +([\d.]+) │", text)
        }
        assert scores.keys() == {"this model", "xz", "gzip", "unigram"} and 0 < scores["this model"] < 8
        assert "serve run serving.app:build run=runs/demo" in text
    assert "step 20: validation" in said[0] and "step 20: validation" not in said[1], "training is not repeated"
    assert len((tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines()) == len(
        {line.split(",")[0] for line in (tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines()}
    )
    assert (tmp_path / "mlflow.db").is_file()


def test_bad_settings_of_the_demo_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["track=tensorboard"]) == 2
    assert capsys.readouterr().err == "error: track='tensorboard'; there is mlflow, none\n"
    assert main([f"source={tmp_path / 'nothing here'}", "track=none"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "nothing here" in error
