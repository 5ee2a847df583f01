"""pipelines.train as its users run it: on Ray, killed, stopped, refused, resumed, tracked."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipelines.lib.jsonl import rows
from pipelines.lib.run import Run
from pipelines.train import main
from tests.conftest import REPO
from tests.pipelines.tiny import make_tokens

SMALL = (
    "model.d_model=32 model.n_layers=2 model.seq_len=32 model.attention.n_heads=2 model.dropout=0.1 batch_tokens=384 "
    "micro_batch=4 log_every=1 eval_every=20 sample_prompts=[] device=cpu threads=1 cpus_per_worker=0.5"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("tokens"))


def words(data: Path, out: Path, *more: str) -> list[str]:
    return [f"data={data}", f"out={out}", *SMALL, *more]


def steps(out: Path) -> list[int]:
    return [row["step"] for row, _ in rows(out / "metrics.jsonl")]


def column(out: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row, _ in rows(out / "metrics.jsonl") if name in row}


def wait_for(condition, seconds: float = 90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.train", *arguments],
        cwd=REPO, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def mlflow_history(run: Run, name: str) -> list[int]:
    from mlflow import MlflowClient

    found = json.loads((run.path / "mlflow.json").read_text())
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    return sorted(m.step for m in client.get_metric_history(found["run_id"], name))


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """The uninterrupted run, in this process."""
    out = tmp_path_factory.mktemp("reference") / "run"
    assert main(words(data, out, "steps=60", "num_workers=0", "track=none")) == 0
    return out


def test_two_ray_workers_survive_kill_9_and_equal_the_run_without_ray(data, reference, tmp_path, ray_session, capsys):
    """One fit: kill a worker mid-run, Ray Train restarts both, losses and tokens are those of the plain run."""
    import threading

    out, killed = tmp_path / "run", []

    def kill_a_worker():
        wait_for(lambda: (out / "metrics.jsonl").is_file() and len(steps(out)) >= 25)
        workers = [
            p for p in psutil.Process().children(recursive=True) if any("RayTrainWorker" in w for w in p.cmdline())
        ]
        assert len(workers) == 2
        workers[-1].kill()
        killed.append(len(steps(out)))

    thread = threading.Thread(target=kill_a_worker)
    thread.start()
    # Validation and saving every 20 steps, so steps 21 and later are made twice.
    assert main(words(data, out, "steps=60", "num_workers=2")) == 0
    thread.join()
    assert killed and killed[0] < 60, "the kill came too late to mean anything"
    log = (out / "log.txt").read_text()
    assert "resumed from step_" in log
    assert steps(out) == list(range(1, 61))
    a, b = column(reference, "train/loss"), column(out, "train/loss")
    assert max(abs(a[s] - b[s]) for s in a) <= 1e-5
    assert column(reference, "data/crc") == column(out, "data/crc")
    assert mlflow_history(Run(out), "train/loss") == list(range(1, 61))
    assert mlflow_history(Run(out), "val/nll") == [20, 40, 60]
    assert "next: python -m pipelines.sample" in capsys.readouterr().out


def test_kill_9_of_the_driver_then_the_same_command_goes_on(data, reference, tmp_path):
    """In-process the driver is the worker: MLflow has every step once, the weights are bitwise those without a kill."""
    out = tmp_path / "run"
    arguments = words(data, out, "steps=60", "num_workers=0")
    process = start(*arguments)
    wait_for(lambda: (out / "metrics.jsonl").is_file() and len(steps(out)) >= 27)
    process.kill()
    process.communicate()
    reached = steps(out)[-1]
    assert reached < 60, "the kill came too late to mean anything"
    assert main(arguments) == 0
    assert steps(out) == list(range(1, 61))
    assert column(reference, "train/loss") == column(out, "train/loss")
    weights = [load_file(o / "checkpoints/step_60/model.safetensors") for o in (reference, out)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert mlflow_history(Run(out), "train/loss") == list(range(1, 61))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_next_step_and_prints_the_command_that_resumes(data, tmp_path, number):
    out = tmp_path / "run"
    process = start(*words(data, out, "steps=100000", "eval_every=100000", "num_workers=0", "track=none"))
    wait_for(lambda: (out / "metrics.jsonl").is_file() and len(steps(out)) >= 5)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    found = re.search(r"stopped and saved at step ([\d,]+); resume with: python -m pipelines.train (\S+)", text)
    assert found, text
    step = int(found[1].replace(",", ""))
    assert Run(out).newest_valid().name == f"step_{step}"
    assert main([str(out / "config.yaml"), f"steps={10**6}", "seconds=null", "--help"]) == 0
    assert (REPO / found[2]).resolve() == out / "config.yaml"


def test_the_same_command_on_a_finished_run_trains_nothing_and_a_longer_one_goes_on(data, tmp_path, capsys):
    out = tmp_path / "run"
    base = words(data, out, "num_workers=0", "track=none")
    assert main([*base, "steps=10"]) == 0
    before = (out / "metrics.jsonl").read_bytes()
    assert main([*base, "steps=10"]) == 0
    assert (out / "metrics.jsonl").read_bytes() == before
    assert main([*base, "steps=12", "keep_last=5"]) == 0
    assert steps(out) == list(range(1, 13))
    capsys.readouterr()
    assert main([*base, "steps=14", "optim.lr=1e-4", "model.norm=rmsnorm"]) == 2
    error = capsys.readouterr().err
    assert "model.norm: layernorm -> rmsnorm" in error and "optim.lr: 0.001 -> 0.0001" in error
    assert error.count("\n") == 1
    assert main([*base, "steps=8"]) == 2
    assert "steps: 12 -> 8 (a length may only grow)" in capsys.readouterr().err
    assert main([*base, "tokens=4000"]) == 2
    assert "its unit may not change" in capsys.readouterr().err


def test_a_second_driver_is_refused_while_the_first_writes(data, tmp_path, capsys):
    out = tmp_path / "run"
    with Run(out).lock():
        process = start(*words(data, out, "steps=10", "num_workers=0", "track=none"))
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and f"is being written by process {os.getpid()}" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["optim.lrr=3"], "optim=adamw has no option 'lrr'; did you mean 'lr'?"),
        (["data=/no/such/folder"], "data=/no/such/folder: no such folder"),
        (["model.vocab_size=50"], "model.vocab_size=50 is smaller than the 128 ids of"),
        (["micro_batch=5"], "micro_batch=5 does not divide the 12 rows"),
        (["seq_len=64"], "seq_len=64 is longer than the model's context model.seq_len=32"),
        (["model.d_model=33"], "d_model=33"),
        (["num_workers=64", "cpus_per_worker=4"], "num_workers=64 need 256 CPU, the cluster has"),
        (["device=cuda"], "device='cuda' is not on this machine; there is cpu"),
        (["init_from=/no/model"], "/no/model: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(data, tmp_path, capsys, request, change, message):
    if "num_workers" in change[0]:
        request.getfixturevalue("ray_session")
    out = tmp_path / "run"
    more = [] if any("num_workers" in c for c in change) else ["num_workers=0"]
    assert main(words(data, out, "steps=10", "track=none", *more, *change)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (out / "checkpoints").exists()
    # The corrected command is not refused because of what the failed start left behind.
    if "num_workers" not in "".join(change):
        capsys.readouterr()
        assert main(words(data, out, "steps=2", "track=none", "num_workers=0", "optim.lr=1e-4")) == 0


def test_a_folder_without_validation_tokens_is_refused(tmp_path, capsys):
    import json

    from pipelines.lib.shards import write_manifest

    folder = make_tokens(tmp_path / "tokens")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["splits"]["val"], manifest["fingerprint"]
    write_manifest(folder, manifest)
    assert main(words(folder, tmp_path / "run", "steps=10", "num_workers=0", "track=none")) == 2
    assert "no tokens in split 'val'" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["truncate", "empty", "flip"])
def test_a_damaged_token_shard_is_named_and_the_stage_stops_before_doing_harm(tmp_path, capsys, harm):
    folder = make_tokens(tmp_path / "tokens")
    victim = folder / "train-00001.arrow"
    content = bytearray(victim.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    victim.write_bytes({"truncate": content[:-9], "empty": b"", "flip": bytes(content)}[harm])
    assert main(words(folder, tmp_path / "run", "steps=10", "num_workers=0", "track=none")) == 2
    error = capsys.readouterr().err
    assert "train-00001.arrow: expected" in error and "found" in error and error.count("\n") == 1


def test_a_run_starts_from_another_ones_weights_and_from_a_public_layout(data, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    first, second = tmp_path / "first", tmp_path / "second"
    assert main(words(data, first, "steps=40", "num_workers=0", "track=none", "optim.lr=3e-3")) == 0
    assert main(words(data, second, "steps=2", "num_workers=0", "track=none", f"init_from={first}")) == 0
    assert column(second, "train/loss")[1] == pytest.approx(column(first, "val/nll")[40], abs=0.4)
    torch.manual_seed(0)
    assert main(words(data, second, "steps=2", "num_workers=0", f"init_from={first}", "model.n_layers=3")) == 2
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    third = tmp_path / "third"
    small = [w for w in words(data, third, "steps=2", "num_workers=0", "track=none") if not w.startswith("model.")]
    assert main([*small, f"init_from={tmp_path / 'llama'}"]) == 0
    assert "kind: swiglu" in (third / "config.yaml").read_text()


def test_a_run_that_starts_from_another_shows_its_model_as_input(data, tmp_path):
    from mlflow import MlflowClient

    assert main(words(data, tmp_path / "a", "num_workers=0", "steps=4", "eval_every=4", "track=mlflow")) == 0
    more = ["num_workers=0", "steps=4", "track=mlflow", f"init_from={tmp_path / 'a'}"]
    assert main(words(data, tmp_path / "b", *more)) == 0
    first, second = (json.loads((tmp_path / name / "mlflow.json").read_text()) for name in "ab")
    run = MlflowClient(first["tracking_uri"]).get_run(second["run_id"])
    assert [m.model_id for m in run.inputs.model_inputs] == [first["models"]["4"]]
