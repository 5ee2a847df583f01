"""What a run has cost: memory of this run alone, step times that cover all of it, and all of it after a kill."""

from __future__ import annotations

import json
import math
import signal
import sys

import pytest
import torch

from models.cost import Ops
from models.spec import build
from pipelines.lib.cost import GIB, PACES, Cost, Memory
from pipelines.lib.energy import Counter, Meter
from pipelines.lib.loop import train
from pipelines.lib.run import Run
from pipelines.lib.training import TrainConfig
from pipelines.lib.world import World
from tests.pipelines.test_loop import job, metrics, workers
from tests.pipelines.tiny import make_tokens, tiny_config

KEYS = {"parameters", "macs_per_token", "memory_gb", "step_time_s", "tokens", "flops", "seconds", *Ops().counts()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("tokens"))


def read(run):
    return json.loads(Run(run).cost.read_text())


def test_a_run_writes_what_it_cost_and_its_outcome_holds_the_last_validation(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", steps=12, eval_every=5)
    outcome = train(job(config))
    cost, log = read(tmp_path / "run"), metrics(tmp_path / "run")
    assert KEYS <= cost.keys() <= KEYS | {"energy_j", "how"}
    model = build(TrainConfig, config).model
    # Multiplications of one token's forward pass: every matrix once (the head too), and for each layer's attention
    # over a context of 32 the scores and the weighted sum: 2 x heads x head_dim x T.
    matrices = 2 * (4 * 32 * 32 + sum(math.prod(s) for s in mlp_shapes(config))) + 128 * 32
    assert cost["parameters"] == model.n_parameters()
    assert cost["macs_per_token"] == matrices + 2 * (2 * 32 * 32)
    assert cost["tokens"] == log[12]["train/tokens"] == 12 * 32 * 12
    assert cost["flops"] == 6 * cost["macs_per_token"] * cost["tokens"]
    assert {name: cost[name] for name in Ops().counts()} == model.ops(32).counts()
    assert cost["weight_bits"] >= 16 * matrices, "bfloat16 weights, each read once, and gains and biases"
    assert 0 < cost["step_time_s"] * 6 < cost["seconds"], "half of the updates took as long as the median or longer"
    assert 0 < cost["memory_gb"] < 1
    logged = {k: v for k, v in log[12].items() if k.startswith("val/")}
    assert {k: outcome.metrics[k] for k in logged} == pytest.approx(logged, rel=1e-6)
    for name in ("val/effective_rank", "val/spectrum_slope", "val/score"):
        assert math.isfinite(outcome.metrics[name])
    assert outcome.metrics["val/score"] == pytest.approx(math.exp(-outcome.metrics["val/nll"]))
    again = train(job(config))
    assert again.metrics == pytest.approx(outcome.metrics, rel=1e-6), "a run that has nothing left to do says the same"
    assert read(tmp_path / "run")["tokens"] == cost["tokens"]


def mlp_shapes(config):
    from models.families import create

    model = create(build(TrainConfig, config).model)
    return [p.shape for name, p in model.blocks[0].named_parameters() if "mlp" in name and p.dim() == 2]


def test_a_killed_and_resumed_run_counts_all_of_it_once(data, tmp_path):
    config = tiny_config(data, tmp_path / "killed", steps=20, eval_every=5)
    assert workers(config, 1, tmp_path, {0: "step:17"}) == [-signal.SIGKILL]
    run = Run(config["out"])
    assert not run.cost.exists(), "it had no time to write one"
    before = json.loads((run.checkpoints / "step_15" / "training_state" / "state.json").read_text())["state"]
    assert workers(config, 1, tmp_path) == [0]
    cost = read(run.path)
    after = json.loads((run.checkpoints / "step_20" / "training_state" / "state.json").read_text())["state"]
    assert before["spent"]["seen"] == 15 and after["spent"]["seen"] == 20
    assert after["spent"]["paces"][:15] == before["spent"]["paces"]
    assert cost["tokens"] == 20 * config["batch_tokens"]
    assert cost["seconds"] > before["elapsed_s"] > 0
    assert cost["memory_gb"] >= before["spent"]["memory_gb"]
    assert min(after["spent"]["paces"]) <= cost["step_time_s"] <= max(after["spent"]["paces"])


def test_energy_adds_up_over_attempts_and_is_absent_if_one_could_not_read_it():
    now = 0.0
    counter = Counter("fake", lambda: now)
    first, second = Cost(World()), Cost(World())
    first.meter, second.meter = Meter([counter]), Meter([counter])
    now = 3.0
    second.resume(first.spent())
    now = 5.0
    assert second.figures()["energy_j"] == pytest.approx(3.0 + 5.0)
    blind = Cost(World())
    blind.meter = Meter([])
    third = Cost(World())
    third.meter = Meter([counter])
    third.resume(blind.spent())
    assert "energy_j" not in blind.figures() and "energy_j" not in third.figures()


def test_the_median_is_that_of_the_whole_run_however_long():
    cost = Cost(World())
    for i in range(10 * PACES):
        cost.count(float(i))
    assert len(cost.paces) < PACES
    assert cost.figures()["step_time_s"] == pytest.approx(5 * PACES, rel=0.01)
    gaps = {b - a for a, b in zip(cost.paces, cost.paces[1:], strict=False)}
    assert gaps == {cost.stride}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_memory_is_that_of_the_work_itself_in_a_process_that_has_used_more_before():
    cpu = torch.device("cpu")
    first = Memory(cpu)
    large = torch.ones(200 * 2**20 // 4)
    assert first.gb() * GIB == pytest.approx(200 * 2**20, rel=0.1)
    del large
    second = Memory(cpu)
    small = torch.ones(50 * 2**20 // 4)
    del small
    assert second.gb() * GIB == pytest.approx(50 * 2**20, rel=0.2)
    assert second.how == "resident memory of the process, above its start"


def test_where_the_peak_cannot_be_forgotten_it_is_the_processs(monkeypatch):
    monkeypatch.setattr(Memory, "restart", lambda self: False)
    memory = Memory(torch.device("cpu"))
    assert memory.how == "largest resident size"
    assert memory.gb() > 0.1, "torch alone takes more"
