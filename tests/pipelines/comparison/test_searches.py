from __future__ import annotations

from pipelines.lib.comparison.collect import collect
from pipelines.lib.comparison.findings import analyse, question_of
from pipelines.lib.comparison.page import comparison_page
from pipelines.lib.comparison.paper import comparison_paper
from pipelines.lib.comparison.searches import records_of
from tests.pipelines.comparison.folders import make_search
from tests.pipelines.comparison.test_page import data_of

RESULTS = """
decisions:
- "round 0: model.n_layers 2 -> 3 is <b>chosen</b>"
winner: {model.n_layers: 3}
"""


def test_a_search_tells_its_trials_decisions_and_end(tmp_path):
    folder = make_search(tmp_path / "s", {"metric": "val/nll", "mode": "min"})
    (folder / "results.yaml").write_text(RESULTS)
    found = collect([folder])
    (story,) = found.searches
    assert story.points == ((0, 2.0, 1.0), (1, 1.9, 1.0), (2, 2.5, 0.25)) and story.best_so_far() == [
        (0, 2.0),
        (1, 1.9),
    ]
    findings = analyse(found, question_of(found, None, None, "last", 0.95))
    page = comparison_page(findings, "t", "c", 12)
    assert "5 trials (3 done, 1 failed, 1 refused), ended: all drawn" in page
    assert "&lt;b&gt;chosen" in page and "model.n_layers=3" in page
    assert data_of(page)["plots"]["plot-search-0"]["best"] == {"x": [0, 1, 2], "y": [2.0, 1.9, 1.9]}
    assert "1. round 0: model.n_layers 2 -\\> 3 is \\<b\\>chosen" in comparison_paper(findings, "t", "c", 12, tmp_path)


def test_a_search_without_its_config_still_shows_its_trials(tmp_path):
    folder = make_search(tmp_path / "s")
    (folder / "config.yaml").unlink()
    (folder / "results.yaml").write_text("- a: [")
    (story,) = collect([folder]).searches
    assert (story.rule, story.metric, story.points, story.decisions) == ("search", None, (), ())
    assert records_of(folder / "results.yaml") == {}
