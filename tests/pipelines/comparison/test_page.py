from __future__ import annotations

import json
import math
import re

import pytest

from pipelines.lib.comparison.collect import collect
from pipelines.lib.comparison.curves import POINTS, Curve, mean_curve, thinned
from pipelines.lib.comparison.findings import analyse, question_of
from pipelines.lib.comparison.html import document, in_script, tag
from pipelines.lib.comparison.page import comparison_page
from pipelines.lib.comparison.paper import comparison_paper, fenced
from pipelines.lib.comparison.words import chance, cost, figure, si, signed
from tests.pipelines.comparison.folders import make_run, make_sweep

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> | `x` [a](javascript:1)"


def findings(folder, costs=()):
    found = collect([folder])
    return analyse(found, question_of(found, "val/nll", None, "last", 0.95, costs))


def own_part(page):
    """The page without plotly.js, which holds addresses of map services that these figures never ask for."""
    head, rest = page.split("<script>", 1)
    return head + rest[rest.rindex("<script>") :]


def data_of(page):
    return json.loads(re.search(r'id="page-data">(.*?)</script>', page, re.S)[1])


@pytest.fixture
def sweep(tmp_path):
    folder = make_sweep(tmp_path / "r", {"rmsnorm": [2.0, 2.1, 2.05], "layernorm": [2.2, 2.33, 2.24]})
    (folder / "rmsnorm-s0" / "samples.txt").write_text('--- step 20 | "The "\nThe cat sat\n\n')
    return folder


def test_the_page_holds_all_that_was_promised(sweep):
    page = comparison_page(findings(sweep), "Two norms", "python -m pipelines.compare r", 12)
    parts = ["In short", "What differs", "Curves", "Differences", "Loss and cost", "Samples", "Sources"]
    for words in (*parts, "norm=rmsnorm", "A is better than B", "2.050", "cat sat", "ab" * 6):
        assert words in page, words
    plots = data_of(page)["plots"]
    assert {
        "plot-finals",
        "plot-curves",
        "plot-parameters",
        "plot-flops",
        "plot-coordinates",
        "plot-importance",
    } <= set(plots)
    for place in plots:
        assert f'id="{place}"' in page
    lines = plots["plot-curves"]["figures"][0]["lines"]
    assert [len(line["seeds"]) for line in lines] == [3, 3] and lines[0]["mean"]["y"][-1] == 2.05
    assert set(lines[0]["mean"]["x"]) == {"tokens", "flops", "seconds"}


def test_a_cost_that_was_asked_for_is_a_column_and_a_front(sweep, tmp_path):
    found = findings(sweep, ("reductions",))
    page = comparison_page(found, "Two norms", "", 12)
    assert '<th class="n">reductions per token</th>' in page and "plot-reductions" in data_of(page)["plots"]
    paper = comparison_paper(found, "Two norms", "", 12, tmp_path)
    head = next(line for line in paper.splitlines() if line.startswith("|") and "reductions per token" in line)
    row = next(line for line in paper.splitlines() if line.startswith("| A"))
    assert head.count("|") == row.count("|") and (tmp_path / "fronts.png").is_file()


def test_the_page_asks_the_network_for_nothing(sweep):
    page = comparison_page(findings(sweep), "t", "c", 12)
    assert "default-src 'none'" in page and "Plotly" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)|https?://|@import|url\(""", own_part(page))


def test_ids_of_the_page_are_distinct(sweep):
    ids = re.findall(r'\bid="([^"]+)"', own_part(comparison_page(findings(sweep), "t", "c", 12)))
    assert len(ids) == len(set(ids))


def test_text_of_runs_is_text_wherever_it_stands(tmp_path):
    make_run(tmp_path / "a", 2.0, 0, samples=f"--- step 20 | {json.dumps(EVIL)}\n{EVIL} more\n\n")
    make_run(tmp_path / "b", 2.1, 0, {"init_from": EVIL})
    found = findings(tmp_path)
    page = comparison_page(found, EVIL, EVIL, 12)
    assert "<img" not in own_part(page) and "<script>document" not in page and "&lt;img" in page
    assert page.count("<script") == 3 and page.count("</script>") == 3
    paper = comparison_paper(found, EVIL, EVIL, 12, tmp_path)
    outside = re.sub(r"^(`{3,}).*?^\1$", "", paper, flags=re.S | re.M)
    assert "<img" not in outside.replace("\\<", "") and "](javascript" not in outside
    rows = [line for line in outside.splitlines() if line.startswith("| ")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) in (3, 4, 5, 12, 11) for row in rows)


def test_data_in_a_script_is_strict_json_that_cannot_end_it():
    text = in_script({"a": [math.nan, math.inf, 1.0], "b": "</script>\u2028"})
    assert "<" not in text and "\u2028" not in text
    assert json.loads(text) == {"a": [None, None, 1.0], "b": "</script>\u2028"}


def test_attributes_are_escaped():
    assert tag("i", "<b>", title='" onload="x') == '<i title="&quot; onload=&quot;x">&lt;b&gt;</i>'
    assert "<title>&lt;x&gt;</title>" in document("<x>", [], {})


def test_a_diverged_and_a_lonely_run_make_a_page_too(tmp_path):
    make_run(tmp_path / "r" / "a", 2.0)
    page = comparison_page(findings(tmp_path / "r"), "t", "c", 12)
    assert "one seed, so without uncertainty" in page and "Differences</h2>" not in page
    folder = make_run(tmp_path / "r" / "b", 2.1, 0, {"optim.lr": 0.5})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "train/nll": NaN, "val/nll": NaN}\n')
    found = findings(tmp_path / "r")
    page = comparison_page(found, "t", "c", 12)
    assert "diverged" in page and "NaN" not in own_part(page)
    assert "no number (not ranked)" in comparison_paper(found, "t", "c", 12, tmp_path)
    coordinates = data_of(page)["plots"]["plot-coordinates"]
    assert coordinates["dimensions"][-1]["words"][-1] == "diverged"


def test_only_diverged_runs_rank_nothing(tmp_path):
    folder = make_run(tmp_path / "a", 2.0)
    (folder / "metrics.jsonl").write_text('{"step": 20, "train/tokens": 5, "val/nll": NaN}\n')
    found = findings(tmp_path)
    assert "nothing is ranked" in comparison_page(found, "t", "c", 12)
    assert "nothing is ranked" in comparison_paper(found, "t", "c", 12, tmp_path)


def test_the_paper_has_its_plots_beside_it(sweep, tmp_path):
    text = comparison_paper(findings(sweep), "Two norms", "c", 12, tmp_path)
    names = re.findall(r"\]\((\w+\.png)\)", text)
    assert set(names) == {"finals.png", "curves.png", "fronts.png", "coordinates.png"}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert "| A | norm=rmsnorm | 3 | 2.050 |" in text and "A better" in text


def test_the_mean_over_seeds_stands_where_all_seeds_have_a_point(tmp_path):
    make_run(tmp_path / "a", 2.0, 0)
    make_run(tmp_path / "b", 3.0, 1, upto=10)
    curve = mean_curve(collect([tmp_path]).runs, "val/nll", 0.95)
    assert curve.x["tokens"] == [5 * 384, 10 * 384] and curve.x["seconds"] == [2.5, 5.0]
    assert curve.y == [pytest.approx((2.75 + 3.5) / 2), pytest.approx((2.5 + 3.0) / 2)]


def test_thinning_keeps_means_and_shows_every_gap():
    n = 10 * POINTS
    thin = thinned(Curve({"tokens": range(n)}, [1.0] * (n - 1) + [math.nan]))
    assert len(thin.y) == POINTS and thin.y[0] == 1.0 and math.isnan(thin.y[-1]) and thin.x["tokens"][0] == 4.5


def test_figures_as_people_read_them():
    assert si(87.6e9, "FLOP") == "87.6 GFLOP" and si(0.01284, "s") == "12.8 ms"
    assert cost("parameters", 106880) == "106,880" and cost("memory_gb", 0.005) == "5.12 MiB"
    assert cost("memory_gb", 0.5) == "0.500 GiB" and cost("memory_gb", None) == "not known"
    assert figure(3.65054, 0.011) == "3.651" and figure(math.nan) == "no number" and signed(-0.0001, 0.01) == "+0.000"
    assert chance(0.0001) == "< 0.001" and chance(math.nan) == "–"


def test_a_fence_is_longer_than_what_it_holds():
    assert fenced("a ```` b").startswith("`````text\n")
