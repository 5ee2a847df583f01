from __future__ import annotations

import math

import pytest
from scipy import stats

from pipelines.lib.comparison.collect import collect
from pipelines.lib.comparison.findings import COSTS, Question, analyse, compare, question_of, rank, spans
from pipelines.lib.comparison.variants import labelled, variants_of
from pipelines.lib.config import InputError
from tests.pipelines.comparison.folders import make_run, make_search, make_sweep

RMS, LAYER = [2.00, 2.10, 2.05, 2.12], [2.20, 2.33, 2.24, 2.31]


def findings(folder, baseline=None, **how):
    found = collect([folder])
    how = {"metric": "val/nll", "mode": None, "at": "last", "level": 0.95, **how}
    return analyse(found, question_of(found, **how), baseline)


def test_two_variants_of_four_seeds_against_scipy(tmp_path):
    found = findings(make_sweep(tmp_path / "r", {"layernorm": LAYER, "rmsnorm": RMS}))
    first = found.ranked[0]
    assert (first.letter, first.variant.label) == ("A", "norm=rmsnorm")
    assert first.interval.mean == pytest.approx(2.0675)
    low, high = stats.t.interval(0.95, 3, loc=2.0675, scale=stats.sem(RMS))
    assert (first.interval.low, first.interval.high) == (pytest.approx(low), pytest.approx(high))
    (pair,) = found.pairs
    truth = stats.ttest_rel(LAYER, RMS)
    assert pair.how == "paired" and pair.p == pytest.approx(truth.pvalue) and pair.verdict == "first"
    assert pair.difference.mean == pytest.approx(0.2025)
    assert pair.settings == ("model.norm",) and pair.caveats == ()
    assert not [n for n in found.notes if n.kind == "stop"]


def test_an_effect_inside_its_error_is_called_none(tmp_path):
    found = findings(make_sweep(tmp_path / "r", {"layernorm": [2.0, 2.3, 2.1], "rmsnorm": [2.1, 2.1, 2.1]}))
    assert [p.verdict for p in found.pairs] == ["none"]


def test_what_counts_alone_need_not_count_among_many(tmp_path):
    """Three seeds and p = 0.04 alone: among six comparisons it is none, and it is known that it would count alone."""
    table = {0.001: [2.0, 2.0, 2.0], 0.002: [2.1, 2.15, 2.2], 0.003: [2.0, 2.3, 2.1], 0.004: [2.2, 2.0, 2.3]}
    make_sweep(tmp_path, table, "optim.lr")
    found = findings(tmp_path)
    alone = next(p for p in found.pairs if {p.first, p.second} == {0, 2} or p.difference.p < 0.05)
    assert alone.difference.p < 0.05 < alone.p and alone.verdict == "none" and found.alone == 1
    ps = sorted(p.difference.p for p in found.pairs)
    assert min(p.p for p in found.pairs) == pytest.approx(min(1.0, 6 * ps[0]))  # Holm, by hand


def test_one_seed_is_without_uncertainty(tmp_path):
    found = findings(make_sweep(tmp_path / "r", {"layernorm": [2.2], "rmsnorm": [2.0]}))
    (pair,) = found.pairs
    assert pair.verdict == "unknown" and math.isnan(pair.p) and pair.difference.mean == pytest.approx(0.2)
    assert "one seed" in found.ranked[0].flags
    assert any("without uncertainty" in n.text for n in found.notes)


def test_other_seeds_are_compared_unpaired(tmp_path):
    for seed, loss in enumerate(RMS):
        make_run(tmp_path / f"a{seed}", loss, seed)
    for seed, loss in enumerate(LAYER):
        make_run(tmp_path / f"b{seed}", loss, seed + 10, {"model.norm": "layernorm"})
    (pair,) = findings(tmp_path).pairs
    assert pair.how == "unpaired" and pair.p == pytest.approx(stats.ttest_ind(LAYER, RMS, equal_var=False).pvalue)


def test_a_diverged_variant_is_never_first_and_its_seeds_are_not_forgotten(tmp_path):
    make_sweep(tmp_path, {"rmsnorm": [2.0, 2.1], "layernorm": [1.0, 1.0]})
    with open(tmp_path / "layernorm-s1" / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "train/nll": null, "val/nll": null}\n')
    found = findings(tmp_path)
    assert [r.variant.label for r in found.ranked] == ["norm=rmsnorm", "norm=layernorm"]
    assert found.ranked[1].group == 2 and "1 of 2 seeds diverged" in found.ranked[1].flags
    assert found.compared == [0] and not found.pairs


def test_an_unfinished_run_stands_behind_finished_ones_and_is_flagged(tmp_path):
    make_run(tmp_path / "a", 2.0)
    make_run(tmp_path / "b", 1.0, 0, {"model.norm": "layernorm"}, upto=10)
    found = findings(tmp_path)
    assert [r.group for r in found.ranked] == [0, 1] and "incomplete" in found.ranked[1].flags
    assert any("1 incomplete" in n.text for n in found.notes)


def test_trials_that_a_search_cut_short_are_not_ranked_with_the_others(tmp_path):
    found = findings(make_search(tmp_path / "s"))
    assert [r.group for r in found.ranked] == [0, 0, 1, 1]
    assert found.left_out[0].name == "trial 4"


def test_the_common_length_makes_unequal_runs_comparable(tmp_path):
    make_run(tmp_path / "a", 2.0)
    make_run(tmp_path / "b", 2.4, 0, {"model.norm": "layernorm"}, upto=10)
    found = findings(tmp_path, at="common")
    assert {r.variant.label: r.interval.mean for r in found.ranked} == {"norm=rmsnorm": 2.5, "norm=layernorm": 2.4}
    assert [r.group for r in found.ranked] == [0, 0] and any("3,840 tokens" in n.text for n in found.notes)


def test_the_best_value_and_more_is_better(tmp_path):
    folder = make_run(tmp_path / "a", 2.0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "val/nll": 2.6}\n')
    make_run(tmp_path / "b", 2.4, 0, {"model.norm": "layernorm"})
    assert findings(tmp_path).ranked[0].variant.label == "norm=layernorm"
    assert findings(tmp_path, at="best").ranked[0].interval.mean == 2.0
    assert findings(tmp_path, mode="max").ranked[0].interval.mean == 2.6


def test_the_metric_is_the_searchs_own_then_bits_then_nats(tmp_path):
    search = collect([make_search(tmp_path / "s", {"metric": "train/nll", "mode": "max"})])
    assert question_of(search, None, None, "last", 0.95) == Question("train/nll", "max")
    run = make_run(tmp_path / "r" / "a", 2.0)
    assert question_of(collect([run]), None, None, "last", 0.95).metric == "val/bpb"
    text = (run / "metrics.jsonl").read_text().replace("val/bpb", "val/other")
    (run / "metrics.jsonl").write_text(text)
    assert question_of(collect([run]), None, None, "last", 0.95).metric == "val/nll"
    with pytest.raises(InputError, match="did you mean 'val/nll'"):
        question_of(collect([run]), "val/nlll", None, "last", 0.95)


@pytest.mark.parametrize(
    "settings, how, said, caveat",
    [
        ({}, {"data": "cd" * 32}, "other data", "other data"),
        ({"steps": 40}, {"steps": 40}, "other numbers of tokens", "other tokens"),
        ({"eval_tokens": 64}, {}, "other windows", "other validation"),
        ({"model.seq_len": 16}, {}, "other windows", "other validation"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path, settings, how, said, caveat):
    make_run(tmp_path / "a", 2.0)
    make_run(tmp_path / "b", 2.1, 0, settings, **how)
    found = findings(tmp_path)
    assert any(n.kind == "stop" and said in n.text for n in found.notes), found.notes
    assert caveat in found.pairs[0].caveats


def test_two_settings_at_once_are_said_and_one_is_not(tmp_path):
    make_run(tmp_path / "a", 2.0)
    make_run(tmp_path / "b", 2.1, 0, {"model.norm": "layernorm", "optim.lr": 0.1})
    found = findings(tmp_path)
    assert any("A and B in model.norm, optim.lr" in n.text for n in found.notes)
    assert found.pairs[0].caveats == ("differ in 2 settings",)


def test_unknown_data_is_said(tmp_path):
    make_run(tmp_path / "a", 2.0, data=None)
    assert any("Nothing tells what data" in n.text for n in findings(tmp_path).notes)


def test_seeds_in_a_row_are_said_by_their_ends():
    assert spans(["0", "1", "2", "18", "19", "21 (init 3)"]) == "0 to 2, 18, 19, 21 (init 3)"


def test_a_baseline_is_compared_with_each_other_variant_only(tmp_path):
    make_sweep(tmp_path, {0.001: RMS, 0.002: LAYER, 0.003: [2.5, 2.6, 2.5, 2.7]}, "optim.lr")
    found = findings(tmp_path, baseline="lr=0.002")
    assert {(p.first, p.second) for p in found.pairs} == {(0, 1), (1, 2)} and found.baseline == 1
    assert findings(tmp_path, baseline="0.002-s1").baseline == 1
    with pytest.raises(InputError, match=r"did you mean 'lr=0\.002'"):
        findings(tmp_path, baseline="lr=0.0002")


def test_pareto_fronts_by_hand(tmp_path):
    costs = {"0.001": (2.0, 30), "0.002": (2.1, 20), "0.003": (2.2, 25), "0.004": (2.3, 10)}
    for lr, (loss, memory) in costs.items():
        make_run(tmp_path / lr, loss, 0, {"optim.lr": float(lr)}, cost={"memory_gb": memory})
    assert findings(tmp_path).fronts["memory_gb"] == ((0, 1, 2, 3), (True, True, False, True))
    assert findings(tmp_path, mode="max").fronts["memory_gb"][1] == (True, False, False, False)


def test_counts_of_operations_can_be_asked_for_as_costs(tmp_path):
    for norm, loss in (("rmsnorm", 2.0), ("layernorm", 2.1)):
        make_run(tmp_path / norm, loss, 0, {"model.norm": norm})
    found = findings(tmp_path, costs=("reductions",))
    assert found.question.costs == (*COSTS, "reductions")
    rms, layer = (r.costs["reductions"] for r in found.ranked)
    norms = 2 * found.ranked[0].variant.runs[0].config["model"]["n_layers"] + 1
    assert layer - rms == norms, "a layernorm takes two sums over a row, an rmsnorm one"
    with pytest.raises(InputError, match="costs=reduction: no run has it; did you mean 'reductions'"):
        findings(tmp_path, costs=("reduction",))


def test_ranking_is_the_same_for_metrics_in_any_order(tmp_path):
    runs = collect([make_sweep(tmp_path / "r", {"layernorm": LAYER, "rmsnorm": RMS})]).runs
    question = Question("val/nll", "min")
    one, two = rank(labelled(variants_of(runs)), question), rank(labelled(variants_of(runs[::-1])), question)
    assert [r.variant.key for r in one] == [r.variant.key for r in two]
    assert compare(one, question)[0].p == compare(two, question)[0].p


def test_of_very_many_variants_the_first_are_tested(tmp_path, monkeypatch):
    from pipelines.lib.comparison import findings as module
    from pipelines.lib.comparison.sentences import about_differences

    monkeypatch.setattr(module, "TESTED", 2)
    found = findings(make_sweep(tmp_path, {0.001: [2.0, 2.1], 0.002: [2.2, 2.2], 0.003: [2.4, 2.5]}, "optim.lr"))
    assert [(p.first, p.second) for p in found.pairs] == [(0, 1)]
    assert len(findings(tmp_path, baseline="lr=0.003").pairs) == 2
    assert "paired over common seeds" in about_differences(found)
