"""Rules that go on from checkpoints, or learn from trials, in a whole search that really trains."""

from __future__ import annotations

import pytest

from pipelines import search
from pipelines.lib.config import read_yaml
from pipelines.lib.search.ledger import Ledger
from tests.pipelines.search.small import search_words

VARY = {"model.norm": ["rmsnorm", "layernorm"], "optim.lr": {"log_uniform": [1e-3, 1e-1]}}


@pytest.mark.parametrize(
    ("rule", "shares"),
    [
        ({"kind": "asha", "draws": 4, "min_share": 0.3}, [1 / 3] * 4 + [1.0]),
        ({"kind": "median", "draws": 3, "pieces": 2, "grace": 0.5, "others": 2}, None),
        ({"kind": "pbt", "population": 3, "pieces": 2}, [0.5] * 3 + [1.0] * 3),
        ({"kind": "tpe", "draws": 3, "startup": 2}, [1.0] * 3),
    ],
    ids=lambda x: x["kind"] if isinstance(x, dict) else "",
)
def test_a_whole_search_trains_what_its_rule_asks_and_goes_on_from_checkpoints(tmp_path, rule, shares):
    assert search.main(search_words(tmp_path, rule=rule, vary=VARY)) == 0
    ledger = Ledger(tmp_path / "out")
    asked = sorted(t.ask.share for t in ledger.trials)
    assert shares is None or asked == shares
    assert {t.status for t in ledger.trials} == {"done"}
    # Nothing was trained twice: each piece is paid from where the one before it ended.
    lengths = {}
    for t in ledger.trials:
        row = ledger.rows[t.number]
        begun = ledger.rows[t.ask.source]["until"] if t.ask.source is not None else lengths.get(row["run"], 0)
        assert row["piece_tokens"] == (row["until"] - begun) * 384
        lengths[row["run"]] = row["until"]
    winner = (tmp_path / "out/winner").read_text().strip()
    best = min((t for t in ledger.trials if t.ask.share == 1), key=lambda t: t.metrics["val/nll"])
    assert winner == ledger.rows[best.number]["run"]
    assert (tmp_path / "out/results.yaml").is_file() == (rule["kind"] != "tpe")
    if rule["kind"] == "pbt":
        line = read_yaml((tmp_path / "out/results.yaml").read_text())["lineage_of_best"]
        assert line[-1]["settings"] == dict(best.ask.settings)
