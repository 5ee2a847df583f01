"""Estimates: the arithmetic against loops, a probe that leaves nothing, --estimate of every stage, estimate.json."""

from __future__ import annotations

import dataclasses as dc
import json
import tempfile

import pytest
import torch

from models.spec import build
from pipelines import estimate as command
from pipelines.lib import counting
from pipelines.lib import estimate as lib
from pipelines.lib import probe as probing
from pipelines.lib.checkpoint import Checkpoints
from pipelines.lib.counting import count
from pipelines.lib.estimate import Pace, duration, estimate, estimate_many, length
from pipelines.lib.loop import Trainer, open_data, train
from pipelines.lib.probe import Probe, probe
from pipelines.lib.run import Run
from pipelines.lib.runlog import Log
from pipelines.lib.training import TrainConfig
from pipelines.lib.world import World
from tests.pipelines.test_evaluate import save_model
from tests.pipelines.test_loop import job
from tests.pipelines.tiny import make_tokens, tiny_config

KEYS = {"parameters", "macs_per_token", "memory_gb", "disk_gb", "step_time_s", "tokens", "flops", "seconds"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def folders(data):
    return open_data([str(data)], "size")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from pipelines.lib.vocab import Bytes

    folder = save_model(tmp_path_factory.mktemp("model"), 257)
    Bytes().make(lambda: ()).save_pretrained(folder)
    return folder


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """An empty working folder, and an empty place for temporary ones."""
    here, scratch = tmp_path / "here", tmp_path / "scratch"
    here.mkdir()
    scratch.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return tmp_path


def config(data, **changes) -> TrainConfig:
    return build(TrainConfig, tiny_config(data, "out", **changes))


# ---- arithmetic


@pytest.mark.parametrize("steps", [1, 7, 10, 24])
@pytest.mark.parametrize(("eval_every", "save_every"), [(5, None), (4, 6), (10, 1), (100, 3)])
def test_validations_and_checkpoints_are_those_of_the_loop_that_improves_each_time(
    data, folders, steps, eval_every, save_every
):
    c = config(data, steps=steps, eval_every=eval_every, save_every=save_every)
    validations = [s for s in range(1, steps + 1) if s % eval_every == 0 or s == steps]
    saves = {s for s in range(1, steps + 1) if s % (save_every or eval_every) == 0} | set(validations)
    size = length(c, folders)
    assert size.steps == steps
    assert size.validations(c, steps) == len(validations)
    assert size.saves(c, steps) == len(saves)


def test_a_run_of_that_length_makes_so_many_validations_and_leaves_about_so_much_on_the_disk(data, folders, tmp_path):
    tree = tiny_config(data, tmp_path / "run", steps=30, eval_every=5, log_every=2)
    train(job(tree))
    c, run = build(TrainConfig, tree), Run(tree["out"])
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert length(c, folders).validations(c, 30) == sum("val/nll" in row for row in rows)
    left = sum(p.stat().st_size for p in run.path.rglob("*") if p.is_file())
    kept = len(run.steps())
    whole = estimate(dc.replace(c, keep_last=kept - 1), folders)
    assert whole.disk_gb * lib.GIB == pytest.approx(left, rel=0.15)


def test_the_tokens_of_a_validation_are_those_that_the_trainer_computes(data, folders, tmp_path, monkeypatch):
    c = config(data, eval_tokens=600)
    trainer = Trainer(c, Run(tmp_path), World(), Log(None))
    seen = 0

    def forward(ids, targets):
        nonlocal seen
        seen += ids.numel()
        return torch.zeros(()), torch.zeros(())

    trainer.loss = forward
    trainer._score(0)
    assert length(c, folders).val_tokens == seen


def test_seconds_follow_from_a_pace_by_hand(data, folders):
    c = config(data, steps=20, eval_every=10)
    pace = Pace(1000.0, val_tokens_per_s=2000.0, measure_s=0.5, save_s=0.25, start_s=3.0)
    val_s = length(c, folders).val_tokens / 2000 + 0.5
    found = estimate(c, folders, pace)
    assert found.seconds == pytest.approx(20 * 384 / 1000 + 2 * val_s + 2 * 0.25 + 3.0)
    assert found.tokens == 20 * 384 and found.step_time_s == pytest.approx(0.384)
    assert found.flops == pytest.approx(6 * found.macs_per_token * found.tokens)
    assert found.record().keys() == KEYS
    assert estimate(c, folders).seconds is None, "nothing tells the pace"
    short = estimate(config(data, steps=None, seconds=60), folders, dc.replace(pace, measure_s=0, save_s=0, start_s=0))
    each = 0.384 + (val_s - 0.5) / 10
    assert short.tokens == int(60 / each) * 384
    assert short.seconds == pytest.approx(60 + val_s - 0.5)


def test_memory_is_the_counted_tensors_and_what_an_allocator_wastes(data):
    one = config(data, batch_tokens=32 * 4)
    counted = count(one)
    known = lib.memory_bytes(one, counted, gaps=0.5)
    assert sum(known.values()) == 1.5 * counted.peak(False) + lib.BESIDE_BYTES
    several = lib.memory_bytes(config(data), counted, gaps=0.0)
    assert sum(several.values()) == counted.peak(True) + lib.BESIDE_BYTES
    large = dc.replace(counted, activations=10**9, logits=2 * lib.RETURNED_BYTES)
    assert lib.gappy(large, 2 * 10**9) == 2 * 10**9 - large.logits
    assert lib.gappy(counted, 1000) == 1000


def test_a_checkpoint_has_the_size_that_is_foretold(data, folders, tmp_path):
    c = config(data, model={"d_model": 64})
    trainer = Trainer(c, Run(tmp_path), World(), Log(None))
    trainer.update(stop=False, measure=False)
    Checkpoints(Run(tmp_path)).save(trainer.model, trainer.optimizers, trainer.state, best=True, wait=True)
    size = sum(p.stat().st_size for p in (tmp_path / "checkpoints" / "step_1").rglob("*") if p.is_file())
    assert size == pytest.approx(lib.checkpoint_bytes(folders, count(c)), rel=0.03)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.031, "0.031 s"), (3.24, "3.2 s"), (250, "4 min 10 s"), (19200, "5 h 20 min"), (273600, "3 d 4 h")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


# ---- probes


def test_a_probe_is_sane_and_leaves_nothing_behind(data, folders, bare):
    threads = torch.get_num_threads()
    c = config(data, threads=threads + 1)
    found = probe(c, folders, seconds=0.1)
    assert 0 < found.pace.tokens_per_s < 1e9 and 0 < found.pace.val_tokens_per_s < 1e9
    for name in ("measure_s", "save_s", "start_s"):
        assert 0 <= getattr(found.pace, name) < 60
    assert found.gaps >= 0 and found.notes == ()
    assert torch.get_num_threads() == threads
    assert not list((bare / "scratch").iterdir()) and not list((bare / "here").iterdir())


def test_workers_share_the_micro_batches_and_it_is_said_what_that_leaves_out(data, monkeypatch):
    monkeypatch.setattr(probing, "usable_cpus", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert probing._workers(config(data, num_workers=1)) == (1, ())
    workers, notes = probing._workers(config(data, num_workers=3, threads=None))
    assert workers == 2, "no more than there are CPUs"
    assert "what they tell each other is not timed" in notes[0] and "2 of them at a time" in notes[1]


def test_many_are_estimated_by_at_most_three_probes_and_the_rest_lies_between(data, folders, monkeypatch):
    rate = 1e9  # FLOPs per second, whatever the model: then every estimate is exact
    probed = []

    def steady(c, folders, seconds):
        flops = 6 * count(c).macs_per_token
        probed.append(flops)
        return Probe(Pace(rate / flops, 3 * rate / flops), 0.5, ())

    monkeypatch.setattr(probing, "probe", steady)
    configs = [config(data, model={"d_model": d, "n_layers": n}) for d in (32, 64, 96) for n in (1, 2, 4)]
    found = estimate_many(configs, folders)
    assert len(probed) == 4 and len(set(probed)) == 3, "the first one warms up"
    assert min(probed) == 6 * min(e.macs_per_token for e in found)
    assert max(probed) == 6 * max(e.macs_per_token for e in found)
    for c, e in zip(configs, found, strict=True):
        assert e.parameters == c.model.n_parameters()
        updates_s = e.flops / rate
        val_s = 2 * length(c, folders).val_tokens * 2 * e.macs_per_token / rate
        assert e.seconds == pytest.approx(updates_s + val_s)
        assert e.memory_gb > 0 and e.disk_gb > 0
    assert estimate_many([]) == []
    assert len(estimate_many([configs[0]])) == 1, "opens its own data"


# ---- beside a run


def test_a_run_foretells_itself_once_and_again_when_it_has_grown(data, tmp_path):
    tree = tiny_config(data, tmp_path / "run", steps=8, eval_every=4)
    train(job(tree))
    run = Run(tree["out"])
    first = json.loads(run.estimate.read_text())
    assert first.keys() == KEYS
    cost = json.loads(run.cost.read_text())
    for name in ("parameters", "macs_per_token", "tokens", "flops"):
        assert first[name] == cost[name]
    run.estimate.write_text(json.dumps({**first, "seconds": 1.0}))
    train(job(tree))
    assert json.loads(run.estimate.read_text())["seconds"] == 1.0
    train(job({**tree, "steps": 16}))
    assert json.loads(run.estimate.read_text())["tokens"] == 16 * 384


def test_what_cannot_be_counted_costs_the_estimate_and_not_the_run(data, tmp_path, monkeypatch):
    def no(*args):
        raise RuntimeError("needs real data")

    monkeypatch.setattr(counting, "count", no)
    tree = tiny_config(data, tmp_path / "run", steps=6)
    assert train(job(tree)).step == 6
    assert "no estimate: RuntimeError: needs real data" in Run(tree["out"]).log.read_text()
    assert not Run(tree["out"]).estimate.exists()


# ---- the commands


def words(data, *more):
    model = "{kind: gpt, d_model: 32, n_layers: 1, seq_len: 32, attention: {kind: causal, n_heads: 2}}"
    return [
        f"data={data}", "out=run", f"model={model}", "batch_tokens=128", "micro_batch=2", "steps=10", "threads=1",
        "num_workers=0", "device=cpu", *more,
    ]  # fmt: skip


def test_estimate_of_train_says_all_and_leaves_nothing(data, bare, capsys):
    assert command.main(["train", *words(data, "price_per_hour=360")]) == 0
    out = capsys.readouterr().out
    for name in ("tokens", "parameters", "memory", "optimizer state", "logits", "disk", "time", "money"):
        assert name in out
    assert "1,280" in out and "USD" in out
    assert not list((bare / "here").iterdir()) and not list((bare / "scratch").iterdir())


@pytest.mark.parametrize("tokenizer", ["{kind: bpe, vocab_size: 300}", "bytes", "chars"])
def test_estimate_of_tokenize_counts_a_small_corpus_exactly(bare, capsys, tokenizer):
    from pipelines.tokenize import main as tokenize

    text = bare / "texts"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.txt").write_text(f"the cat number {i} sat on the mat\n" * 200)
    given = [f"source={text}", f"tokenizer={tokenizer}", "workers=0", "track=none", "out=tokens", "val_documents=1"]
    assert tokenize([*given, "--estimate"]) == 0
    out = capsys.readouterr().out
    assert not list((bare / "here").iterdir()) and not list((bare / "scratch").iterdir())
    assert tokenize(given) == 0
    manifest = json.loads((bare / "here" / "tokens" / "manifest.json").read_text())
    total = sum(split["tokens"] for split in manifest["splits"].values())
    said = int(next(line for line in out.splitlines() if " tokens " in line).split()[-2].replace(",", ""))
    # A tokenizer that is trained leaves the validation documents out, whose number the estimate does not look for.
    assert said == pytest.approx(total, rel=0.05)
    assert "disk" in out and "time" in out


def test_estimate_of_evaluate_and_sample(model, bare, capsys):
    from pipelines.evaluate import main as evaluate
    from pipelines.sample import main as sample

    text = bare / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    assert evaluate([str(model), f"text={text}", "device=cpu", "--estimate"]) == 0
    out = capsys.readouterr().out
    assert "960" in out and "time" in out and "memory" in out
    assert evaluate([str(model), "tasks=arc_easy", "--estimate"]) == 2
    assert "tasks=" in capsys.readouterr().err
    given = [str(model), "--prompt", "the", "num_samples=3", "max_tokens=5", "device=cpu"]
    assert sample([*given, "--estimate"]) == 0
    out = capsys.readouterr().out
    assert "15" in out and "time" in out
    assert not list((bare / "here").iterdir()) and not list((bare / "scratch").iterdir())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["batch_tokenz=1"], "did you mean 'batch_tokens'"),
        (["machine=aws-g5.xlarg"], "did you mean 'aws-g5.xlarge'"),
        (["price_per_hour=-1"], "price_per_hour=-1.0 is negative"),
        (["price_per_hour=dear"], "is no number"),
        (["prices=none.yaml", "machine=a"], "prices=none.yaml: No such file"),
        (["prices=none.yaml"], "give machine= too"),
        (["data=nowhere"], "no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(data, bare, capsys, more, says):
    assert command.main(["train", *words(data, *more)]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_stage_that_is_not_there_or_has_no_estimate_is_said(capsys):
    assert command.main(["trane"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert command.main(["demo"]) == 2
    assert "there is no estimate of a stage 'demo'" in capsys.readouterr().err
    assert command.main(["--help"]) == 0
    assert "pipelines.estimate train" in capsys.readouterr().out
