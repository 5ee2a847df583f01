from __future__ import annotations

import json

from pipelines.lib.comparison.card import card_of, card_page, card_paper
from tests.pipelines.comparison.folders import make_run
from tests.pipelines.comparison.test_page import EVIL, data_of, own_part

RESULTS = {
    "model": {"step": 20},
    "text": {"book": {"bits_per_byte": 2.2354, "bits_per_byte_stderr": 0.0201}},
    "tasks": {"arc": {"metrics": {"acc": {"value": 0.25, "stderr": None}}}},
}


def cells(rows):
    return {row.name: row.cells for row in rows}


def test_an_estimate_stands_beside_what_was_measured(tmp_path):
    folder = make_run(tmp_path / "a", 2.0, cost={"parameters": 1000, "memory_gb": 0.5, "energy_j": 12.0})
    (folder / "estimate.json").write_text(
        json.dumps({"parameters": 1000, "memory_gb": 0.2, "disk_gb": 1.0, "how": "x"})
    )
    found = cells(card_of(folder).estimate)
    assert found["parameters"] == ("1,000", "1,000", "1.00")
    assert found["peak memory"] == ("0.200 GiB", "0.500 GiB", "2.50 (far off)")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "weights").write_bytes(bytes(1 << 20))
    estimated, actual, ratio = cells(card_of(folder).estimate)["disk"]
    assert (estimated, ratio) == ("1.00 GiB", "0.00 (far off)") and 1.0 <= float(actual.removesuffix(" MiB")) < 1.1
    assert len(found) == 3


def test_what_is_missing_is_said_to_be(tmp_path):
    card = card_of(make_run(tmp_path / "a", 2.0, data=None))
    page, paper = card_page(card, "c"), card_paper(card, "c", tmp_path)
    for text in (page, paper):
        assert "this run has no estimate.json" in text and "Not evaluated yet" in text
        assert "No samples" in text and "Nothing tells what data" in text
    assert cells(card.cost)["energy"] == ("not known", "") and cells(card.data)["tokens"][0] == "not known"


def test_the_card_holds_evaluation_data_hardware_and_config(tmp_path):
    folder = make_run(tmp_path / "a", 2.0, 3, {"optim.lr": 0.02}, tags={"host": "box", "version.torch": "2.13"})
    out = folder / "evaluation" / "step_20-book"
    out.mkdir(parents=True)
    (out / "results.json").write_text(json.dumps(RESULTS))
    (folder / "log.txt").write_text("12:00:00 workers: 1 on cpu, CPU threads each: 1\n")
    card = card_of(folder)
    assert cells(card.evaluations)["book, bits per byte"][:2] == ("2.235", "0.0201")
    assert cells(card.evaluations)["arc, acc"][:2] == ("0.2500", "not known")
    assert cells(card.hardware)["host"] == ("box",) and cells(card.hardware)["workers"] == (
        "1 on cpu, CPU threads each: 1",
    )
    unusual = cells(card.unusual)
    assert unusual["optim.lr"] == ("0.02",) and unusual["seed"] == ("3",) and "optim.eps" not in unusual
    assert cells(card.losses)["val/nll"] == ("2.0000", "2.0000 at step 20")
    page = card_page(card, "c")
    plots = data_of(page)["plots"]
    assert len(plots) == 5 and all(f'id="{place}"' in page for place in plots)
    assert "train/lr" in json.dumps(plots) and "abab" in page


def test_a_diverged_run_is_shown_as_one(tmp_path):
    folder = make_run(tmp_path / "a", 2.0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "train/nll": NaN, "val/nll": NaN}\n')
    card = card_of(folder)
    assert "This run diverged" in card_page(card, "c") and cells(card.losses)["val/nll"][0] == "no number"


def test_text_of_a_run_is_text(tmp_path):
    folder = make_run(tmp_path / EVIL.replace("/", ""), 2.0, samples=f"--- step 20 | {json.dumps(EVIL)}\n{EVIL}\n\n")
    page = card_page(card_of(folder), EVIL)
    assert "<img" not in own_part(page) and page.count("<script") == 3


def test_the_paper_has_its_plot_and_no_old_one_stays(tmp_path):
    folder = make_run(tmp_path / "a", 2.0)
    text = card_paper(card_of(folder), "c", tmp_path)
    assert "![curves](curves.png)" in text and (tmp_path / "curves.png").is_file()
    (folder / "metrics.jsonl").write_text('{"step": 20}\n')
    assert "curves.png" not in card_paper(card_of(folder), "c", tmp_path) and not (tmp_path / "curves.png").exists()
