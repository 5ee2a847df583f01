"""The table of every checkpoint below a folder: one trained run, other people's folders, and what is broken."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.families import create, preset
from pipelines.compare import main
from pipelines.lib.inspection import checkpoints, weights
from pipelines.lib.inspection.checkpoints import Row, collect, in_order


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trained):
    """A run of two checkpoints, a Hugging Face folder, a nanoGPT file, and three that are broken."""
    root = tmp_path_factory.mktemp("all")
    shutil.copytree(trained, root / "runs" / "a")
    points = root / "runs" / "a" / "checkpoints"
    bad = root / "runs" / "b" / "checkpoints"
    shutil.copytree(points / "step_20", bad / "step_20")
    file = bad / "step_20" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    shutil.copytree(points / "step_10", bad / "step_30")
    (bad / "step_30" / "manifest.json").unlink()
    (bad / "step_30" / "training_state" / "state.json").unlink()
    (bad / "step_30" / "model.safetensors").unlink()
    hf = root / "other" / "hf"
    hf.mkdir(parents=True)
    (hf / "config.json").write_text("{}")
    state = load_file(points / "step_20" / "model.safetensors")
    first = next(n for n, x in state.items() if x.dim() == 2)
    state[first] = state[first].clone()
    state[first][0, :3] = math.nan
    save_file(state, hf / "model.safetensors")
    torch.save({"model": {"w": torch.ones(2, 3)}, "iter_num": 7, "best_val_loss": torch.tensor(1.5)}, root / "ckpt.pt")
    (root / "deep").mkdir()
    (root / "deep" / "ckpt.pt").write_bytes(b"junk")
    return root


def rows_of(folder, **how):
    return {row.path: row for row in collect(folder, **how)}


def test_every_checkpoint_is_a_row_and_broken_ones_say_why(folder):
    found = rows_of(folder)
    assert set(found) == {
        *(f"runs/a/checkpoints/step_{s}" for s in (10, 20)),
        *(f"runs/b/checkpoints/step_{s}" for s in (20, 30)),
        *("other/hf", "ckpt.pt", "deep/ckpt.pt"),
    }
    good = found["runs/a/checkpoints/step_20"]
    assert good.note == "" and good.step == 20 and good.skipped == 0 and "last" in good.named and good.bad_weights == 0
    logged = [json.loads(line) for line in (folder / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert good.nll == next(r["val/nll"] for r in logged if r["step"] == 20)
    assert good.best_nll == pytest.approx(min(r["val/nll"] for r in logged if "val/nll" in r))
    cut = found["runs/b/checkpoints/step_20"]
    assert "model.safetensors" in cut.note and cut.step == 20 and cut.norm is None
    assert "never finished" in found["runs/b/checkpoints/step_30"].note
    hf = found["other/hf"]
    assert hf.bad_weights == 3 and "3 weights are not finite" in hf.note and math.isfinite(hf.norm)
    nano = found["ckpt.pt"]
    assert (nano.step, nano.best_nll, nano.parameters, nano.note) == (7, 1.5, 6, "")
    assert nano.norm == pytest.approx(math.sqrt(6)) and "plain tensors" in found["deep/ckpt.pt"].note


def test_figures_over_all_weights_are_those_of_the_tensors(folder):
    row = rows_of(folder)["runs/a/checkpoints/step_20"]
    state = load_file(folder / "runs/a/checkpoints/step_20/model.safetensors")
    everything = torch.cat([x.double().flatten() for x in state.values()])
    assert row.parameters == everything.numel() and row.norm == pytest.approx(float(everything.norm()))
    assert row.largest == float(everything.abs().max())
    ks = sorted(weights.moments(x).kurtosis for x in state.values() if x.dim() == 2)
    assert row.kurtosis_max == ks[-1] and row.kurtosis == ks[len(ks) // 2]


def test_fast_reads_no_weights_and_still_knows_what_text_says(folder, monkeypatch):
    def never(*_):
        raise AssertionError("weights were read")

    full = rows_of(folder)
    for name in ("tensors", "moments", "pickled", "pickled_tensors"):
        monkeypatch.setattr(weights, name, never)
    monkeypatch.setattr(checkpoints, "damage", never)
    fast = rows_of(folder, fast=True)
    assert set(fast) == set(full)
    one, two = (r["runs/a/checkpoints/step_20"] for r in (full, fast))
    assert (one.step, one.nll, one.best_nll, one.parameters) == (two.step, two.nll, two.best_nll, two.parameters)
    assert two.norm is None and two.note == "" and "pickles" in fast["ckpt.pt"].note


def test_rows_are_sorted_by_a_column_with_the_unknown_last():
    rows = [Row("step_10", step=10, best_nll=2.0), Row("step_9", step=9), Row("step_100", step=100, best_nll=1.0)]
    paths = lambda *how: [row.path for row in in_order(rows, *how)]
    assert paths("path") == ["step_9", "step_10", "step_100"]
    assert paths("loss") == ["step_100", "step_10", "step_9"] and paths("loss", True) == [
        "step_10",
        "step_100",
        "step_9",
    ]
    assert paths("step", True) == ["step_100", "step_10", "step_9"]
    assert len(paths("kurtosis")) == 3


def test_a_step_that_was_skipped_is_told(tmp_path):
    point = tmp_path / "checkpoints" / "step_4"
    point.mkdir(parents=True)
    (point / "training_state").mkdir()
    (point / "training_state" / "state.json").write_text(json.dumps({"state": {"step": 4, "skipped": 2, "best": None}}))
    lines = [{"step": 1, "train/loss": 2.0, "train/skipped": 0}, {"step": 3, "train/loss": None, "train/skipped": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = rows_of(tmp_path, fast=True)["checkpoints/step_4"]
    assert (row.skipped, row.nan_step, row.best_nll) == (2, 3, None)


def test_the_command_prints_the_table_and_writes_the_csv(folder, tmp_path, capsys):
    out = tmp_path / "made" / "all.csv"
    assert main(["checkpoints", str(folder), "sort=loss", "path_regex=runs|ckpt", f"output={out}"]) == 0
    said = capsys.readouterr().out
    assert "6 checkpoints, 3 with something wrong" in said and "never finished" in said and "kurtosis" in said
    table = list(csv.DictReader(io.StringIO(out.read_text())))
    assert next(r["path"] for r in table) == "ckpt.pt" and len(table) == 6
    full = rows_of(folder)
    for row in table:
        one = full[row["path"]]
        assert row["norm"] == ("" if one.norm is None else repr(one.norm)) and row["note"] == one.note


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["path_regex=nothing_like_it"], "there are 7"),
        (["path_regex=("], "path_regex=("),
        (["sort=lss"], "loss"),
        (["output={folder}"], "output="),
    ],
)
def test_bad_input_is_one_line(folder, capsys, words, says):
    words = [w.format(folder=folder) for w in words]
    assert main(["checkpoints", *([] if words[0] == "nowhere" else [str(folder)]), *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and says in said[0]


def test_a_folder_without_checkpoints_is_named(tmp_path, capsys):
    assert main(["checkpoints", str(tmp_path)]) == 2 and "no checkpoint below it" in capsys.readouterr().err


@pytest.mark.parametrize("fast", [True, False])
def test_a_fixed_radius_is_no_weight(tmp_path, fast):
    """It is saved beside them, and is larger than any of them."""
    spec = dataclasses.replace(preset("hypersphere_tiny"), vocab_size=31, d_model=16, n_layers=1, seq_len=32)
    model = create(spec)
    model.save_pretrained(tmp_path / "hf")
    (row,) = collect(tmp_path, fast=fast)
    assert row.parameters == spec.n_parameters()
    if not fast:
        assert row.largest == pytest.approx(max(p.abs().max().item() for p in model.parameters()))
