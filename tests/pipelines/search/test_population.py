"""Population based training on a schedule whose best setting changes while the model trains."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from models.spec import ConfigError, build
from pipelines.lib.config import InputError
from pipelines.lib.search.domains import DEFAULT, Interval, Options
from pipelines.lib.search.rules import Pbt, Random, Rule
from pipelines.lib.search.rules.population import changes_while_training, lineage
from pipelines.lib.search.trials import Ask, Done
from tests.pipelines.search.simulation import Pretend, is_repeatable, search

SPACE = {
    "optim.lr": {"log_uniform": [1e-4, 1.0]},
    "model.d_model": [32, 64],
    "model.attention.dropout": [0.0, 0.1, 0.2, 0.3],
}


def schedule(ask, state):
    """A loss that falls fastest with lr=0.3 at the beginning and lr=0.001 at the end: no constant value does well."""
    start, loss = state or (0.0, 4.0)
    steps = 40
    for i in range(round(start * steps), round(ask.share * steps)):
        ideal = 0.3 * (1 / 300) ** (i / (steps - 1))
        wrong = math.log10(ask.settings["optim.lr"] / ideal)
        loss -= 0.1 * math.exp(-4 * wrong**2)
    return loss + 0.5 * (ask.settings["model.d_model"] == 32), (ask.share, loss)


def test_pbt_beats_random_where_the_best_setting_changes_with_time():
    gains = []
    for i in range(12):
        by_pbt = search(Pbt(population=8, pieces=8), Pretend(SPACE, seed=i), schedule, workers=4)
        by_random = search(Random(draws=8), Pretend(SPACE, seed=i), schedule, workers=4)
        assert by_pbt.cost <= 8 + 1e-9
        gains.append(by_random.best() - by_pbt.best())
    print([round(g, 2) for g in gains])
    assert statistics.median(gains) > 0.2 and sum(g > 0 for g in gains) >= 10


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_decisions_do_not_depend_on_the_speed_of_the_workers(workers):
    rule = Pbt(population=6, pieces=4)
    problem = Pretend(SPACE, seeds=(0, 1), seed=1)
    found = is_repeatable(rule, problem, schedule, workers=workers, order=random.Random(workers))
    alone = search(rule, problem, schedule)
    pieces = lambda s: sorted((t.id, t.ask.seed, t.ask.share, t.metrics["val/bpb"]) for t in s.trials)
    assert pieces(found) == pieces(alone)
    assert len(found.trials) == 2 * 6 * 4 and isinstance(found.done, Done)


def test_the_worst_take_over_the_checkpoints_of_the_best_and_change_them():
    rule, problem = Pbt(population=8, pieces=3, quantile=0.25), Pretend(SPACE, seed=2)
    found = search(rule, problem, schedule, workers=2)
    loss = {t.number: problem.objective.loss(t) for t in found.trials}
    shares = [1 / 3, 2 / 3, 1.0]
    for before, share in itertools.pairwise(shares):
        ranked = sorted((t for t in found.trials if t.ask.share == before), key=lambda t: loss[t.number])
        after = [t for t in found.trials if t.ask.share == share]
        assert len(ranked) == len(after) == 8
        copies = [t for t in after if t.id != found.trials[t.ask.source].id]
        assert len(copies) == 2
        assert {t.ask.source for t in copies} <= {t.number for t in ranked[:2]}
        # Who is among the worst has no piece of his own any more, everybody else has.
        assert {t.id for t in after} - {t.id for t in copies} == {t.id for t in ranked[:6]}
        for t in copies:
            old = found.trials[t.ask.source].ask.settings
            assert t.ask.settings["model.d_model"] == old["model.d_model"]
            assert t.ask.settings != old and "copies member" in t.ask.why


def test_a_changed_value_is_a_step_away_or_drawn_anew_and_stays_in_its_domain():
    rng = random.Random(0)
    rule, lr, drop = Pbt(factor=1.2, resample=0.0), Interval(1e-4, 1.0, log=True), Options((0.0, 0.1, 0.2, DEFAULT))
    assert {rule.near(0.1, lr, rng) for _ in range(50)} == {0.12, 0.0833333}
    assert {rule.near(1.0, lr, rng) for _ in range(50)} == {1.0, 0.833333}
    assert {rule.near(0.1, drop, rng) for _ in range(50)} == {0.0, 0.2}
    assert {rule.near(3, Interval(1, 4, integer=True), rng) for _ in range(50)} == {2, 4}
    anew = Pbt(resample=1.0)
    assert {anew.near(0.1, drop, rng) for _ in range(50)} == {0.0, 0.1, 0.2}
    assert len({anew.near(0.1, lr, rng) for _ in range(50)}) == 50


def test_members_with_nan_or_a_crash_are_replaced_and_never_copied():
    def train(ask, state):
        if ask.settings["optim.lr"] > 0.1:
            return math.nan, state
        if ask.settings["model.attention.dropout"] == 0.3:
            raise RuntimeError("lost")
        return ask.settings["optim.lr"] - ask.share, state

    rule = Pbt(population=8, pieces=3)
    found = is_repeatable(rule, Pretend(SPACE, seed=4), train, workers=3, order=random.Random(0))
    bad = {t.number for t in found.trials if t.status == "failed" or math.isnan(t.metrics["val/bpb"])}
    assert len([n for n in bad if found.trials[n].ask.source is None]) > 2
    assert not bad & {t.ask.source for t in found.trials}
    assert sum(t.ask.share == 1 for t in found.trials) == 8
    assert rule.winner(found.problem, found.trials)["optim.lr"] <= 0.1


def test_a_population_without_one_finite_loss_ends():
    rule = Pbt(population=4)
    found = search(rule, Pretend(SPACE), lambda ask, state: (math.nan, None), workers=2)
    assert len(found.trials) == 4 and "finite" in found.done.reason
    assert rule.winner(found.problem, found.trials) is None
    assert rule.records(found.problem, found.trials)["lineage_of_best"] == []


def test_a_small_space_lets_members_go_on_when_every_change_is_taken():
    space = {"optim.lr": [0.1, 0.2], "model.d_model": [32, 64]}
    found = is_repeatable(Pbt(population=4, pieces=4), Pretend(space), schedule, workers=2)
    assert {t.id for t in found.trials if t.ask.share == 1} == {t.id for t in found.trials}
    assert len(found.trials) == 16


def test_refused_changes_are_changed_again():
    problem = Pretend(SPACE, seed=5, refuse=lambda s: "too large" if s["optim.lr"] > 0.05 else None)
    found = is_repeatable(Pbt(population=6, pieces=6), problem, schedule, workers=2)
    assert len(found.trials) == 36 and {t.status for t in found.trials} == {"done"}


def test_the_record_holds_the_lineage_of_the_best():
    rule, problem = Pbt(population=8, pieces=8), Pretend(SPACE, seed=6)
    found = search(rule, problem, schedule, workers=2)
    best = min((t for t in found.trials if t.ask.share == 1), key=problem.objective.loss)
    line = rule.records(problem, found.trials)["lineage_of_best"]
    assert [row["until_share"] for row in line] == [(i + 1) / 8 for i in range(8)]
    assert line[-1]["number"] == best.number and line[-1]["settings"] == rule.winner(problem, found.trials)
    assert line[0]["settings"] != line[-1]["settings"]
    state = None  # training along the lineage gives the loss of the best
    for t in lineage(found.trials, best):
        loss, state = schedule(t.ask, state)
    assert loss == best.metrics["val/bpb"]
    generations = rule.records(problem, found.trials)["populations"][0]["generations"]
    assert [sum(m["copies"] is not None for m in g["members"]) for g in generations] == [0] + [2] * 7
    assert [m["objective"] for m in generations[0]["members"]] == [t.metrics["val/bpb"] for t in found.trials[:8]]
    assert [m["trial"] for m in generations[-1]["members"]] == [t.number for t in found.trials if t.ask.share == 1]


def test_what_a_checkpoint_fixes_cannot_be_mutated():
    lr = Interval(1e-4, 1.0)
    assert all(changes_while_training(k, lr) for k in ("optim.lr", "schedule.min_ratio", "grad_clip", "model.dropout"))
    assert not any(changes_while_training(k, lr) for k in ("model.d_model", "seq_len", "batch_tokens", "init_seed"))
    assert not changes_while_training("optim.kind", Options(("adamw", "lion")))
    Pbt().check(Pretend(SPACE))
    assert set(Pbt().mutable(Pretend(SPACE).space.dimensions())) == {"optim.lr", "model.attention.dropout"}
    with pytest.raises(InputError, match=r"a checkpoint fixes model.d_model; what can change is numbers under optim"):
        Pbt(mutate=("model.d_model",)).check(Pretend(SPACE))
    with pytest.raises(InputError, match=r"optim.lrr does not vary in this space; did you mean 'optim.lr'"):
        Pbt(mutate=("optim.lrr",)).check(Pretend(SPACE))
    with pytest.raises(InputError, match="nothing here can change while training"):
        Pbt().check(Pretend({"model.d_model": [32, 64]}))
    with pytest.raises(InputError, match=r"vary: tokens: pbt compares at equal shares"):
        Pbt().check(Pretend({"tokens": [100, 200], "optim.lr": [0.1, 0.2]}))
    only = search(Pbt(population=4, pieces=4, mutate=("optim.lr",)), Pretend(SPACE, seed=1), schedule)
    for t in only.trials:
        if t.ask.source is not None:
            old = only.trials[t.ask.source].ask.settings
            assert {k for k in old if old[k] != t.ask.settings[k]} <= {"optim.lr"}


def test_settings_that_cannot_be_are_refused_in_one_line():
    for key, value in (("population", 1), ("pieces", 1), ("quantile", 0.6), ("resample", 1.5), ("factor", 1.0)):
        with pytest.raises(ConfigError, match=f"{key}={value}"):
            build(Rule, {"kind": "pbt", key: value})


def test_every_piece_but_the_last_leaves_a_checkpoint():
    found = search(Pbt(population=3, pieces=3), Pretend(SPACE), schedule)
    assert all(t.ask.keep == (t.ask.share < 1) for t in found.trials)
    assert isinstance(Pbt().next(Pretend(SPACE), []), Ask)
    assert Pbt.looks_back
