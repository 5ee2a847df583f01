"""`pipelines.compare statistics`: the command, its page, its figures, what goes to MLflow."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from pipelines.compare import main
from pipelines.lib.inspection.statistics import batches
from pipelines.lib.inspection.statistics_page import role_of, thinned
from pipelines.lib.inspection.svg import WIDTH, Line, grid, lines, number, ticks
from tests.serving.tiny import TEXT, byte_level_tokenizer, foreign, gpt


@pytest.fixture(scope="module")
def page_of_two(trained, tmp_path_factory):
    """Both checkpoints of the run, on one page: the folder of results."""
    out = tmp_path_factory.mktemp("statistics")
    words = [
        str(trained),
        str(trained),
        "which=[step_10,step_20]",
        "tokens=400",
        f"out={out}",
        "device=cpu",
        "track=none",
    ]
    assert main(["statistics", *words]) == 0
    return out


def test_rows_lie_side_by_side_until_there_are_enough_tokens():
    def rows(sequences, *how):
        return [row.tolist() for batch in batches(sequences, *how) for row in batch]

    assert sorted(rows([list(range(10))], 4, 100)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert sorted(rows([list(range(10))], 4, 7)) == [[0, 1, 2, 3], [4, 5, 6]]
    assert sorted(rows([[1, 2], [3], [4, 5, 6]], 4, 100)) == [[1, 2], [4, 5, 6]]
    assert rows([list(range(9000))], 3, 9000)[-1] == [8997, 8998, 8999]


def test_the_page_stands_alone_and_has_both_models(page_of_two):
    page = (page_of_two / "statistics.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", page) and len(page) < 400_000
    for what in ("step_10", "step_20", "Residual stream", "Attention", "RankMe", "Angle", "Stable rank", "mixer.qkv"):
        assert what in page, what
    assert (
        page.count("<svg") > 20
        and "NaN" not in page
        and "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    )


def test_figures_are_those_of_the_validation_split_and_the_weights(page_of_two, trained):
    from safetensors.torch import load_file

    from pipelines.lib.model_folder import open_folder
    from pipelines.lib.shards import TokenFolder

    tree = json.loads((page_of_two / "statistics.json").read_text())
    stream = TokenFolder.open(trained.parent / "data").split("val").window(0, 400).astype("int64")
    rows = [torch.from_numpy(stream[i : i + 32])[None] for i in range(0, 400, 32)]
    for data, step in zip(tree["models"], (10, 20), strict=True):
        folder = trained / "checkpoints" / f"step_{step}"
        model = open_folder(folder)
        nats = count = 0.0
        for ids in rows:
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            nats -= float(logits.gather(-1, ids[0, 1:, None]).sum())
            count += ids.numel() - 1
        assert data["tokens"] == 400 and data["figures"]["nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
        assert data["step"] == step and data["context"] == 32 and len(data["heads"]["0"]) == 2
        weights = load_file(folder / "model.safetensors")
        assert {t["name"] for t in data["tensors"]} == set(weights)
        one = next(t for t in data["tensors"] if len(t["shape"]) == 2)
        assert one["singular"] == pytest.approx(torch.linalg.svdvals(weights[one["name"]].double()).tolist(), abs=1e-9)
    a, b = (load_file(trained / "checkpoints" / f"step_{s}" / "model.safetensors") for s in (10, 20))
    for change in tree["changes"]:
        x, y = (w[change["name"]].double().flatten() for w in (a, b))
        assert change["relative"] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-6)
        cosine = float(x @ y / x.norm() / y.norm())
        assert change["angle"] == pytest.approx(math.degrees(math.acos(min(1.0, cosine))), abs=1e-3)


def test_a_pattern_chooses_tensors_and_the_csv_has_them(trained, tmp_path):
    words = ["tokens=64", "track=none", "device=cpu", "tensors=mlp.*weight", f"out={tmp_path}"]
    assert main(["statistics", str(trained), *words]) == 0
    tree = json.loads((tmp_path / "statistics.json").read_text())
    names = [t["name"] for t in tree["models"][0]["tensors"]]
    table = list(csv.DictReader((tmp_path / "tensors.csv").open()))
    assert names and all("mlp" in name for name in names) and [row["tensor"] for row in table] == names
    for row, t in zip(table, tree["models"][0]["tensors"], strict=True):
        assert float(row["std"]) == t["moments"]["std"] and float(row["quantile_0.5"]) == t["quantiles"][3]


def test_the_same_model_twice_has_not_changed_and_another_shape_has_no_namesake(trained, tmp_path, capsys):
    gpt(vocab_size=128).save_pretrained(tmp_path / "other")
    words = ["tokens=64", "track=none", "device=cpu"]
    data = f"data={trained.parent / 'data'}"
    assert main(["statistics", str(trained), str(trained), *words, f"out={tmp_path / 'same'}"]) == 0
    same = json.loads((tmp_path / "same" / "statistics.json").read_text())
    assert same["changes"] and all(c["angle"] == 0 and c["relative"] == 0 for c in same["changes"])
    assert main(["statistics", str(trained), str(tmp_path / "other"), data, *words, f"out={tmp_path / 'two'}"]) == 0
    assert "Without a namesake" in (tmp_path / "two" / "statistics.html").read_text()


@pytest.mark.parametrize("kind", ["ours", "gpt2"])
def test_any_folder_on_any_text(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = gpt() if kind == "ours" else foreign("gpt2")
    model.save_pretrained(tmp_path / "hf")
    byte_level_tokenizer().save_pretrained(tmp_path / "hf")
    (tmp_path / "book.txt").write_text(TEXT * 20)
    assert main(["statistics", "hf", "text=book.txt", "tokens=200", "context=40", "device=cpu"]) == 0
    assert "rankme" in capsys.readouterr().out
    tree = json.loads((tmp_path / "statistics" / "statistics.json").read_text())
    assert tree["models"][0]["tokens"] == 200 and tree["models"][0]["heads"]["0"][0]["entropy"] > 0


def test_a_broken_model_still_has_a_page_that_says_so(tmp_path, capsys):
    model = gpt()
    with torch.no_grad():
        next(iter(model.applications())).mlp.up.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path / "hf")
    byte_level_tokenizer().save_pretrained(tmp_path / "hf")
    (tmp_path / "book.txt").write_text(TEXT * 5)
    words = [
        str(tmp_path / "hf"),
        f"text={tmp_path / 'book.txt'}",
        "tokens=60",
        f"out={tmp_path / 'out'}",
        "device=cpu",
    ]
    assert main(["statistics", *words]) == 0
    page = (tmp_path / "out" / "statistics.html").read_text()
    assert "numbers that are not finite" in page
    assert json.loads((tmp_path / "out" / "statistics.json").read_text())["models"][0]["states"]["rankme"] is None


def test_page_and_figures_go_to_the_runs_mlflow_run(trained, tmp_path):
    import shutil

    from mlflow import MlflowClient

    from pipelines.lib.tracking import Tracker

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    Tracker.start(run, "train", {}, system_s=0).close()  # as if it had been tracked
    assert main(["statistics", str(run), "tokens=64", "device=cpu"]) == 0
    id_ = json.loads((run / "mlflow.json").read_text())["run_id"]
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    assert {f.path for f in client.list_artifacts(id_, "statistics")} == {
        "statistics/statistics.html",
        "statistics/statistics.json",
        "statistics/tensors.csv",
    }
    tree = json.loads((run / "statistics" / "statistics.json").read_text())
    (metric,) = client.get_metric_history(id_, "statistics/rankme")
    assert metric.value == pytest.approx(tree["models"][0]["figures"]["rankme"]) and metric.step == 20


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "runs"),
        (["a", "b", "c"], "3 are given"),
        (["{run}", "which=[best,last]"], "which"),
        (["{run}", "text=x.txt", "data=y"], "text= and data="),
        (["{run}", "tokens=1"], "tokens=1"),
        (["{run}", "context=33"], "context=33"),
        (["{run}", "which=step_7"], "step_7"),
        (["nowhere"], "nowhere"),
        (["{run}", "tensors=("], "tensors=("),
        (["{run}", "out={run}/config.yaml"], "out="),
    ],
)
def test_bad_input_is_one_line(trained, capsys, words, says):
    code = main(["statistics", *(w.format(run=trained) for w in words), "track=none", "device=cpu"])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(said) == 1 and said[0].startswith("error: ") and says in said[0], said


def test_charts_leave_gaps_and_mark_round_numbers():
    chart = lines("x", [Line("a", [0, 1, 2, 3], [1, 10, math.nan, 0], "red")], "n", log_y=True)
    assert chart.count("<circle") == 2 and "nan" not in chart and "inf" not in chart
    assert ticks(0, 10, False) == [0, 2, 4, 6, 8, 10] and ticks(-3, 7, False) == [-2, 0, 2, 4, 6]
    assert ticks(-1.1, 0.6, True) == [0.1, 0.2, 0.5, 1, 2] and ticks(-3.1, 3.1, True) == [0.01, 1, 100]
    assert ticks(0.75, 0.84, True) == [6.0, 6.5]
    assert lines("empty", [], "n") and "&lt;b&gt;" in grid("<b>", ["r"], ["c"], [[(math.nan, ""), (0.5, "w")]])
    assert number(math.nan) == "not finite"


def test_no_name_below_a_chart_is_cut_off():
    """By the widths of DejaVu Sans, the widest of the fonts that a page falls back to, at the style's 12 px."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font = FontProperties("DejaVu Sans", size=12)
    for names in (["embedding", "0", "1", "2", "3", "final norm"], ["embedding", "final norm"]):
        chart = lines("RMS", [Line("a", range(len(names)), range(len(names)))], "after layer", names=names)
        found = re.findall(r'<text x="([\d.]+)" y="\d+" text-anchor="middle">([^<]+)</text>', chart)
        assert {name for _, name in found} >= set(names)
        for x, name in found:
            half = TextToPath().get_text_width_height_descent(name, font, False)[0] / 2
            assert half <= float(x) <= WIDTH - half, (name, x, half)


def test_names_of_tensors_give_role_and_layer():
    assert role_of("blocks.11.mixer.qkv.weight") == ("mixer.qkv", 11)
    assert role_of("transformer.h.0.attn.c_attn.bias") == ("attn.c_attn.bias", 0)
    assert role_of("head.weight") == ("head", None)
    xs, ys = thinned(range(1, 1001), [1 / i for i in range(1, 1001)])
    assert len(xs) <= 120 and (xs[0], xs[-1]) == (1, 1000) and ys[-1] == 1 / 1000


def test_help_of_both_commands_starts_without_torch():
    code = """import sys; sys.modules.update(torch=None, ray=None, mlflow=None, transformers=None)
from pipelines.compare import main; raise SystemExit(main(["checkpoints", "-h"]) + main(["statistics", "--help"]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "path_regex=" in done.stdout and "tokens=8192" in done.stdout, done.stderr
