from __future__ import annotations

import subprocess
import sys

import pytest

from pipelines.compare import main, named
from tests.pipelines.comparison.folders import make_run, make_search, make_sweep


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_become_a_page_and_a_paper(here, capsys):
    make_sweep(here / "runs", {"rmsnorm": [2.0, 2.1], "layernorm": [2.2, 2.33]})
    assert main(["runs"]) == 0
    said = capsys.readouterr().out
    assert "A norm=rmsnorm has the lowest val/bpb" in said and "compare.html" in said
    assert {p.name for p in (here / "runs" / "comparison").iterdir()} >= {"compare.html", "compare.md", "curves.png"}
    words = ["runs/rmsnorm-s0", "runs/layernorm-s0", "metric=val/nll", "--title", "Two norms", "out=there"]
    assert main(words) == 0
    page = (here / "there" / "compare.html").read_text()
    assert "<h1>Two norms</h1>" in page and "python -m pipelines.compare runs/rmsnorm-s0 runs/layernorm-s0" in page


def test_a_search_becomes_a_page(here, capsys):
    make_search(here / "search", {"metric": "val/nll", "mode": "min"})
    assert main(["search"]) == 0
    assert "1 left out, such as trial 4: refused" in capsys.readouterr().out


def test_a_run_gets_its_card(here, capsys):
    make_run(here / "runs" / "a", 2.0)
    assert main(["card", "runs/a"]) == 0
    assert {"card.html", "card.md"} <= {p.name for p in (here / "runs" / "a" / "card").iterdir()}
    assert main(["runs/a", "out=c"]) == 0, "the card's folder does not disturb the run"


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "nothing to compare"),
        (["nowhere"], "no such folder"),
        (["runs/aa"], "did you mean 'a'"),
        (["runs", "metric=val/bpbb"], "did you mean 'val/bpb'"),
        (["runs", "baseline=z"], "neither a variant nor a run"),
        (["runs", "at=first"], "at='first'"),
        (["runs", "level=2"], "level=2.0"),
        (["runs", "shown=0"], "not positive"),
        (["runs", "experiment=e"], "belongs to query="),
        (["runs", "out=runs/a/config.yaml/x"], "out="),
        (["runs", "colour=red"], "no option 'colour'"),
        (["query=x"], "no such store"),
        (["card"], "run is required"),
        (["card", "nowhere"], "no such folder"),
        (["card", "runs"], "no run folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(here, capsys, words, said):
    make_run(here / "runs" / "a", 2.0)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_bare_words_are_runs_and_values_stay_values():
    words = ["a", "--metric", "val/nll", "b", "out=c", "recipe.yaml", "--debug", "d"]
    assert named(words, "runs") == [
        "runs=a", "--metric", "val/nll", "runs=b", "out=c", "recipe.yaml", "--debug", "runs=d"
    ]  # fmt: skip


@pytest.mark.parametrize("words", [["--help"], ["card", "--help"]])
def test_help_needs_neither_ray_nor_torch(words):
    code = f"""import sys
sys.modules.update(ray=None, torch=None, mlflow=None, plotly=None, sklearn=None, matplotlib=None)
from pipelines.compare import main
sys.exit(main({words!r}))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "out=null" in done.stdout, done.stderr
