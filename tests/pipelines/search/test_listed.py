"""Sweep, grid and random: what is asked, in which order, and what a reader learns who stops early."""

from __future__ import annotations

import json
import math
import random
from dataclasses import FrozenInstanceError

import pytest

from models.spec import ConfigError, build, fields
from pipelines.lib.config import InputError
from pipelines.lib.search.domains import DEFAULT
from pipelines.lib.search.rules import Grid, Random, Rule, Sweep
from pipelines.lib.search.rules.listed import draw
from pipelines.lib.search.space import Space
from pipelines.lib.search.trials import Done, Objective, Trial
from tests.pipelines.search.simulation import SPACE, Curves, Pretend, is_repeatable, search

FINITE = {"model.d_model": [32, 64], "optim.lr": [0.1, 0.2, 0.3]}


def bowl(ask, state):
    """Lowest at d_model=64 and lr=0.2; the second seed is worse than the first."""
    s = ask.settings
    return abs(s.get("optim.lr", 0.2) - 0.2) + (s.get("model.d_model", 64) != 64) * 0.05 + 0.01 * ask.seed, None


def asked(found):
    return [(*t.ask.settings.values(), t.ask.seed) for t in found.trials]


def test_sweep_tries_every_point_once_with_the_seed_slowest():
    found = is_repeatable(Sweep(), Pretend(FINITE, seeds=(0, 1)), bowl, workers=2, order=random.Random(0))
    points = [(d, lr) for d in (32, 64) for lr in (0.1, 0.2, 0.3)]
    assert asked(found) == [(*p, seed) for seed in (0, 1) for p in points]
    assert found.done == Done("all 6 points were tried with 2 seeds")


def test_sweep_winner_in_the_middle_of_a_pass_is_not_the_first_point():
    problem = Pretend(FINITE, seeds=(0, 1))
    found = search(Sweep(), problem, bowl, most=8)  # two points have a second seed, and are not the best
    assert Sweep().winner(problem, found.trials) == {"model.d_model": 64, "optim.lr": 0.2}
    assert Sweep().winner(problem, []) is None


def test_what_diverged_or_failed_does_not_win():
    def train(ask, state):
        if ask.settings["optim.lr"] == 0.1:
            return math.nan, None
        if ask.settings["optim.lr"] == 0.2 and ask.seed == 1:
            raise RuntimeError("lost")
        return bowl(ask, state)

    for mode in ("min", "max"):
        problem = Pretend(FINITE, seeds=(0, 1), objective=Objective("val/bpb", mode))
        found = search(Sweep(), problem, train)
        assert len(found.trials) == 12
        assert Sweep().winner(problem, found.trials)["optim.lr"] == 0.3
    nothing = search(Sweep(), problem, lambda ask, state: (math.nan, None))
    assert Sweep().winner(problem, nothing.trials) is None


def test_points_that_mean_the_same_are_tried_once():
    problem = Pretend({"optim.lr": [0.1, 0.2, DEFAULT]}, recipe={"optim.lr": 0.2})
    assert asked(search(Sweep(), problem, bowl)) == [(0.1, 0), (0.2, 0)]


def test_a_refused_point_is_asked_once_and_shown():
    problem = Pretend(
        FINITE, seeds=(0, 1), refuse=lambda s: "no" if s == {"model.d_model": 32, "optim.lr": 0.2} else None
    )
    found = is_repeatable(Sweep(), problem, bowl)
    assert [t.ask.seed for t in found.trials if t.status == "refused"] == [0]
    assert len(found.trials) == 1 + 5 * 2


def test_a_space_of_which_nothing_is_allowed_is_refused_before_it_starts():
    problem = Pretend(FINITE, refuse=lambda s: "d_model is odd")
    for rule in (Sweep(), Grid(), Random()):
        with pytest.raises(InputError, match="refused; the first: d_model is odd"):
            rule.check(problem)


def test_sweep_refuses_an_interval_and_grid_cuts_it():
    space = {"optim.lr": {"log_uniform": [1e-4, 1e-1]}, "model.n_layers": {"integer": [1, 3]}, "model.norm": ["a", "b"]}
    with pytest.raises(InputError, match=r"optim\.lr"):
        Sweep().check(Pretend(space))
    points = Grid(points=4).expand(Space.read(space))
    assert [p["optim.lr"] for p in points[::6]] == [1e-4, 1e-3, 1e-2, 1e-1]
    assert [tuple(p.values())[1:] for p in points[:6]] == [(n, x) for n in (1, 2, 3) for x in "ab"]
    assert len(points) == 4 * 3 * 2
    found = is_repeatable(Grid(points=2), Pretend(space), bowl)
    assert len(found.trials) == 2 * 2 * 2
    with pytest.raises(ConfigError, match="points=1"):
        build(Rule, {"kind": "grid", "points": 1})


def test_steps_are_refused_with_their_key_by_all_rules_but_greedy():
    problem = Pretend({"optim.lr": {"uniform": [0.1, 0.2]}, "model.d_model": {"increment": 16}})
    for kind, cls in Rule.kinds.items():
        if kind not in ("sweep", "greedy"):
            with pytest.raises(InputError, match=r"vary: model\.d_model: an increment leads on"):
                cls().check(problem)


def test_random_finishes_the_seeds_of_a_draw_before_the_next():
    problem = Pretend(SPACE, seeds=(0, 1, 2))
    found = is_repeatable(Random(draws=4), problem, Curves(), workers=3, order=random.Random(1))
    assert [t.ask.seed for t in found.trials] == [0, 1, 2] * 4
    assert len({t.id for t in found.trials}) == 4
    assert found.done is not None


def test_random_without_draws_goes_on_until_somebody_stops_it():
    found = search(Random(), Pretend(SPACE), Curves(), most=25)
    assert len({t.id for t in found.trials}) == 25
    assert found.done is None


def test_draws_depend_on_the_searchs_seed_and_their_number_alone():
    longer, shorter = (search(Random(draws=n), Pretend(SPACE, seed=5), Curves(), w) for n, w in ((8, 1), (4, 3)))
    assert [t.id for t in longer.trials][:4] == [t.id for t in shorter.trials]
    other = search(Random(draws=8), Pretend(SPACE, seed=6), Curves())
    assert not {t.id for t in other.trials} & {t.id for t in longer.trials}


def test_refused_and_repeated_draws_are_drawn_again_until_the_space_is_used_up():
    problem = Pretend(FINITE, refuse=lambda s: "no" if s["optim.lr"] == 0.3 else None)
    found = is_repeatable(Random(), problem, bowl)
    assert sorted(asked(found)) == [(d, lr, 0) for d in (32, 64) for lr in (0.1, 0.2)]
    assert "used up" in found.done.reason
    assert draw(problem, 4, [t.id for t in found.trials]) is None


def test_a_trial_that_is_refused_late_gets_no_other_seeds():
    problem = Pretend(FINITE, seeds=(0, 1))
    first = Random().next(problem, [])
    late = Trial(0, first, problem.identity(first.settings), "refused")
    assert Random().next(problem, [late]).settings != first.settings
    point = Sweep().next(problem, [])
    rest = search(Sweep(), problem, bowl).trials[1:6]  # the first pass without its first point
    assert Sweep().next(problem, [Trial(0, point, problem.identity(point.settings), "refused"), *rest]).seed == 1


def test_more_seeds_later_complete_what_was_drawn():
    found = search(Random(draws=3), Pretend(SPACE, seeds=(0,)), Curves())
    ask = Random(draws=3).next(Pretend(SPACE, seeds=(0, 1)), found.trials)
    assert ask.seed == 1 and json.dumps(ask.settings) == json.dumps(found.trials[0].ask.settings)


def test_every_rule_is_a_frozen_dataclass_with_a_line_for_each_field():
    assert set(Rule.kinds) == {"sweep", "grid", "random", "greedy", "asha", "median", "pbt", "tpe"}
    for kind, cls in Rule.kinds.items():
        with pytest.raises(FrozenInstanceError):
            build(Rule, {"kind": kind}).draws = 1
        said = "\n".join(c.__doc__ for c in cls.__mro__ if issubclass(c, Rule) and c is not Rule)
        for name in fields(cls):
            assert f"\n    {name}: " in said, f"{kind}.{name}"
