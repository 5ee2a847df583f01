from __future__ import annotations

from pipelines.lib.comparison.collect import collect
from pipelines.lib.comparison.variants import (
    ABSENT,
    differing,
    labelled,
    letter,
    number_axis,
    short_names,
    variants_of,
    varying,
    word,
)
from tests.pipelines.comparison.folders import make_run, make_sweep


def test_runs_that_differ_in_their_seed_only_are_one_variant(tmp_path):
    found = variants_of(collect([make_sweep(tmp_path / "r", {"rmsnorm": [2.0, 2.1, 2.2], "layernorm": [2.3]})]).runs)
    assert sorted(len(v.runs) for v in found) == [1, 3]


def test_bookkeeping_does_not_part_variants_but_workers_do(tmp_path):
    make_run(tmp_path / "a", 2.0, 0, {"keep_last": 5, "log_every": 3})
    make_run(tmp_path / "b", 2.0, 1)
    make_run(tmp_path / "c", 2.0, 1, {"num_workers": 2})
    found = variants_of(collect([tmp_path]).runs)
    assert [[run.name for run in v.runs] for v in found] == [["a", "b"], ["c"]]


def test_a_second_run_of_a_seed_does_not_count_twice(tmp_path):
    make_run(tmp_path / "broken", 1.0, 0, upto=5)
    make_run(tmp_path / "whole", 2.0, 0)
    (variant,) = variants_of(collect([tmp_path]).runs)
    assert [run.name for run in variant.runs] == ["whole"] and variant.repeats == ("broken",)


def test_options_that_come_with_a_part_are_not_a_second_difference():
    a = {"model.norm": "rmsnorm", "model.norm.eps": 1e-6, "optim.lr": 0.1}
    b = {"model.norm": "layernorm", "model.norm.eps": 1e-5, "model.norm.bias": None, "optim.lr": 0.1}
    assert differing(a, b) == ["model.norm"]
    assert varying([a, b]) == ["model.norm"]
    c = {**a, "model.norm.eps": 1e-3}
    assert differing(a, c) == ["model.norm.eps"] and varying([a, b, c]) == ["model.norm", "model.norm.eps"]


def test_labels_name_what_varies_and_are_distinct(tmp_path):
    make_run(tmp_path / "a", 2.0, 0, {"optim.lr": 0.001})
    make_run(tmp_path / "b", 2.0, 0, {"optim.lr": 0.01, "model.norm": "layernorm"})
    labels = [v.label for v in labelled(variants_of(collect([tmp_path]).runs))]
    assert labels == ["norm=rmsnorm, lr=0.001", "norm=layernorm, lr=0.01"]


def test_short_names_are_no_shorter_than_distinct():
    assert short_names(["model.mlp.bias", "model.norm.bias", "optim.lr"]) == {
        "model.mlp.bias": "mlp.bias",
        "model.norm.bias": "norm.bias",
        "optim.lr": "lr",
    }


def test_values_as_people_write_them():
    assert word([128, 128, 128, None]) == "[128 x3, none]" and word(True) == "true" and word(1e-3) == "0.001"
    assert word(ABSENT) == "–" and word(None) == "none"


def test_letters_go_on_after_z():
    assert [letter(i) for i in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]


def test_wide_ranges_are_laid_out_by_their_logarithm_and_words_not_at_all():
    assert number_axis([1e-4, 1e-2]) is True and number_axis([2, 4]) is False
    assert number_axis([0, 100]) is False and number_axis(["a", 1]) is None and number_axis([True, False]) is None
