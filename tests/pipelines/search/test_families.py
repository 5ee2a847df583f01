"""The same commands search any family: a made-up one, known by NOVELLA_IMPORTS alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipelines.lib.search.ledger import Ledger
from tests.conftest import REPO
from tests.pipelines.search.small import search_words

VARY = {
    "model.loops": [1, 2, 3],
    "model.d_model": [16, 32],
    "model.norm": ["rmsnorm", "layernorm"],
    "optim.lr": [0.001, 0.01],
}


def run(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "NOVELLA_IMPORTS": "tests.made_up"}
    return subprocess.run([sys.executable, "-m", *words], cwd=REPO, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "rule, seeds, trials",
    [
        ("sweep", 1, 3),
        ({"kind": "asha", "eta": 2, "min_share": 0.5, "draws": 4}, 1, 20),
        ({"kind": "greedy", "rounds": 1}, 2, 14),
    ],
    ids=["sweep", "asha", "greedy"],
)
def test_a_made_up_family_is_searched_by_the_same_command(tmp_path, rule, seeds, trials):
    words = search_words(tmp_path, rule=rule, vary=VARY, fixed={"model": "looped", "steps": 4, "eval_every": 4})
    ended = run("pipelines.search", *words, f"seeds={seeds}", f"trials={trials}")
    assert ended.returncode == 0, ended.stderr[-2000:]
    done = [t for t in Ledger(tmp_path / "out").trials if t.status == "done"]
    assert len(done) >= 3
    assert {t.ask.settings.get("model.loops", 2) for t in done} & {1, 3}
    assert "NOVELLA_IMPORTS=tests.made_up python -m pipelines.train" in Ledger(tmp_path / "out").rows[0]["command"]
    assert (tmp_path / "out/winner").is_file()


def test_without_its_module_the_family_is_not_there(tmp_path):
    words = search_words(tmp_path, vary=VARY, fixed={"model": "looped"})
    ended = subprocess.run([sys.executable, "-m", "pipelines.search", *words], cwd=REPO, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "no setting 'loops'" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
