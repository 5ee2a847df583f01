"""Intervals, differences, many comparisons and fronts, against scipy and worked examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pipelines.lib.statistics import Difference, holm, interval, paired, pareto, welch

A, B = np.random.default_rng(0).normal(2, 1, 7), np.random.default_rng(1).normal(2.5, 3, 5)


@pytest.fixture
def rng():
    return np.random.default_rng(2)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_interval_is_students(level):
    found = interval(A, level)
    low, high = stats.t.interval(level, len(A) - 1, A.mean(), stats.sem(A))
    assert (found.mean, found.se, found.n) == (pytest.approx(A.mean()), pytest.approx(stats.sem(A)), 7)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_interval_holds_the_truth_as_often_as_it_says(rng):
    draws = rng.normal(1.0, 2.0, (2000, 3))
    held = sum((found := interval(row, 0.9)).low <= 1.0 <= found.high for row in draws)
    assert abs(held / 2000 - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 2000)


def test_interval_of_one_or_no_value_knows_no_bounds():
    one, none = interval([3.0]), interval([])
    assert one.mean == 3.0 and one.n == 1 and math.isnan(one.low) and math.isnan(one.high) and math.isnan(one.se)
    assert none.n == 0 and math.isnan(none.mean)


def test_paired_is_scipys_over_the_common_seeds_in_any_order():
    a = {0: 1.0, 1: 1.2, 2: 0.9, 9: 50.0}
    b = {2: 0.7, 1: 1.05, 0: 0.9, 8: -50.0}
    found = paired(a, b)
    want = stats.ttest_rel([b[s] for s in (0, 1, 2)], [a[s] for s in (0, 1, 2)])
    assert found.p == pytest.approx(want.pvalue) and found.n == 3 and found.dof == 2
    assert found.mean == pytest.approx(-0.15) and found.mean / found.se == pytest.approx(want.statistic)
    bounds = want.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(bounds.low), pytest.approx(bounds.high))


def test_paired_drops_what_a_seed_does_to_both_sides(rng):
    seeds = rng.normal(0, 100, 5)
    a = dict(enumerate(seeds))
    b = dict(enumerate(seeds + rng.normal(1, 0.1, 5)))
    assert paired(a, b).p < 0.001 < 0.5 < welch(list(a.values()), list(b.values())).p


def test_welch_is_scipys():
    found, want = welch(A, B), stats.ttest_ind(B, A, equal_var=False)
    assert found.p == pytest.approx(want.pvalue) and found.dof == pytest.approx(want.df)
    bounds = want.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(bounds.low), pytest.approx(bounds.high))


def test_repeats_to_the_last_bit():
    same = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    moved = paired({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5})
    assert (same.mean, same.p) == (0.0, 1.0) and (moved.mean, moved.se, moved.p) == (0.5, 0.0, 0.0)
    assert (welch([1.0, 1.0], [1.0, 1.0]).p, welch([1.0, 1.0], [2.0, 2.0]).p) == (1.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_left_out(bad):
    for found in (paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: bad, 2: 0.0}), welch([1.0, 2.0], [0.0, bad])):
        assert isinstance(found, Difference)
        assert not math.isfinite(found.mean) and math.isnan(found.p) and math.isnan(found.low)
    assert not math.isfinite(interval([1.0, bad]).mean) and math.isnan(interval([1.0, bad]).low)


def test_one_pair_or_none_proves_nothing():
    for found in (paired({0: 1.0}, {0: 2.0}), paired({0: 1.0}, {1: 2.0}), welch([1.0], [2.0, 3.0])):
        assert math.isnan(found.p) and math.isnan(found.low)


def test_holm_on_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    adjusted = holm([0.02, math.nan, 0.03])
    assert adjusted[0] == pytest.approx(0.04) and math.isnan(adjusted[1]) and adjusted[2] == pytest.approx(0.04)


def test_holm_keeps_any_false_one_rare(rng):
    false = sum(min(holm(row)) < 0.05 for row in rng.uniform(size=(4000, 6)))
    assert 0.03 < false / 4000 < 0.06


def test_pareto():
    assert pareto([(1, 5), (2, 2), (3, 3), (5, 1), (2, 2)]) == [True, True, False, True, True]
    assert pareto([(1, 1), (1, 2)]) == [True, False] and pareto([]) == []
    assert pareto([(3.0,), (1.0,), (2.0,)]) == [False, True, False]


def test_pareto_leaves_what_is_not_known_off_the_front():
    nan = math.nan
    assert pareto([(nan, 0), (1, 1), (0, nan)]) == [False, True, False]
    assert pareto([(math.inf, 0), (1, 0)]) == [False, True]
