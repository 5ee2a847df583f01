"""One piece of a trial: which checkpoints it leaves."""

from __future__ import annotations

import pytest

from pipelines.lib.jsonl import rows
from pipelines.lib.run import Run
from pipelines.lib.search.worker import perform
from tests.pipelines.tiny import make_tokens, tiny_config


@pytest.fixture
def job(tmp_path):
    data = make_tokens(tmp_path / "data")
    config = tiny_config(data, tmp_path / "run", eval_every=2, steps=8, keep_last=1)

    def piece(until, *hold, **fields):
        fields = {"until": until, "keep": False, "below": None, "save_s": 0.0, **fields}  # one at every validation
        return {"config": config, "run": str(tmp_path / "run"), "piece": fields, "source": None, "hold": list(hold)}

    return piece


def test_checkpoints_on_the_way_are_gone_at_the_end_and_are_not_its_own(job, tmp_path):
    done = perform(job(8))
    assert (done["status"], done["checkpoint"]) == ("done", None)
    run = Run(tmp_path / "run")
    assert run.steps() == []
    assert (run.pointed("last"), run.pointed("best")) == (None, None)
    assert [row["step"] for row, _ in rows(run.metrics)] == list(range(1, 9))


def test_a_piece_leaves_its_own_checkpoint_and_holds_an_earlier_ones(job, tmp_path):
    assert perform(job(4, keep=True))["checkpoint"] == "checkpoints/step_4"
    assert perform(job(8, "step_4", keep=True))["checkpoint"] == "checkpoints/step_8"
    assert Run(tmp_path / "run").steps()[0] == 8
    assert set(Run(tmp_path / "run").steps()) <= {4, 8}


@pytest.mark.parametrize("limit, kept", [(0.0, None), (100.0, "checkpoints/step_8")])
def test_a_whole_trial_leaves_one_if_it_is_better_than_the_limit(job, limit, kept):
    assert perform(job(8, below=("val/nll", 1.0, limit)))["checkpoint"] == kept
