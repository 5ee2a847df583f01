"""Choices, intervals and steps: what they draw, and where one may go from a value."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.lib.config import InputError
from pipelines.lib.search.domains import Interval, Options, Steps, decimals


def test_neighbours_of_numbers_are_the_next_ones_each_way_in_sorted_order():
    widths = Options((256, 64, 128, 32))
    assert widths.neighbours(64, 1) == [128, 32]
    assert widths.neighbours(64, 2) == [128, 32, 256]
    assert widths.neighbours(100, 1) == [128, 64]  # it may lie between them
    assert widths.neighbours(1000, 2) == [256, 128]


def test_neighbours_of_anything_else_are_all_others_without_default():
    assert Options(("default", "a", "b", None)).neighbours("a", 1) == ["b", None]
    assert Options((None, 1, 2, 4)).neighbours(None, 1) == [1, 2, 4]
    assert Options((False, True)).neighbours(False, 1) == [True]  # a switch is no number
    assert Options((1, True)).neighbours(1, 1) == [True]
    assert Options(([1, 2], [2, 1])).neighbours([1, 2], 1) == [[2, 1]]


def test_steps_go_both_ways_within_bounds_and_whole_numbers_stay_whole():
    assert Steps(64, 2, low=64).neighbours(128) == [192, 64, 256]
    assert Steps(2, 2, factor=True).neighbours(6) == [12, 3, 24, 2]
    assert Steps(0.3).neighbours(1) == []  # rounded, it stays where it is
    assert Steps(0.1, 3).neighbours(0.1) == [0.2, 0.0, 0.3, -0.1, 0.4, -0.2]
    assert Steps(2, 1, high=1e-3, factor=True).neighbours(1e-3) == [5e-4]
    assert all(isinstance(v, int) for v in Steps(1.5, 3, factor=True).neighbours(10))


def test_steps_refuse_what_is_no_number():
    for value in (True, "rmsnorm", None, [1]):
        with pytest.raises(InputError, match="is no number"):
            Steps(1).neighbours(value)


@given(st.floats(1e-6, 1e3), st.sampled_from([2, 3, 1.5]))
def test_a_factor_step_up_and_down_leads_back(value, factor):
    value = float(f"{value:.6g}")
    steps = Steps(factor, factor=True)
    down = steps.neighbours(value)[1]
    assert steps.neighbours(down)[0] == value


@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 9))
def test_draws_lie_in_the_interval(low, width, log, integer, seed):
    interval = Interval(low, low + width, log, integer)
    value = interval.sample(random.Random(seed))
    assert low <= value <= low + width
    assert isinstance(value, int) == integer


@pytest.mark.parametrize("log", [False, True])
def test_every_whole_number_is_drawn_and_a_logarithm_prefers_the_small(log):
    rng = random.Random(0)
    drawn = [Interval(1, 8, log, True).sample(rng) for _ in range(2000)]
    assert set(drawn) == set(range(1, 9))
    share = sum(v == 1 for v in drawn) / 2000
    assert abs(share - (0.315 if log else 0.125)) < 0.03  # ln 2 / ln 9


def test_a_logarithmic_interval_is_even_in_the_logarithm():
    rng = random.Random(0)
    below = sum(Interval(1e-4, 1e-2, log=True).sample(rng) < 1e-3 for _ in range(2000)) / 2000
    assert abs(below - 0.5) < 0.04


@given(st.integers(-50, 50), st.integers(1, 30), st.sampled_from([1, 0.1, 0.05, 0.25, 0.001]))
def test_ranges_have_no_rounding_errors(first, count, step):
    values = decimals(first, round(first + count * step, 6), step)
    assert len(values) == count + 1
    assert all(len(str(v)) <= 8 for v in values)


def test_an_interval_has_no_next_value():
    with pytest.raises(InputError, match="write a list"):
        Interval(0, 1).neighbours(0.5, 1)
