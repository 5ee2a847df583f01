"""ASHA and median stopping on trials whose truth is known, by hand, and beside Ray Tune's schedulers."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from dataclasses import replace
from unittest import mock

import pytest

from models.spec import ConfigError, build
from pipelines.lib.config import InputError
from pipelines.lib.search.rules import Asha, Median, Random, Rule
from pipelines.lib.search.trials import Ask, Done, Objective, Trial
from tests.pipelines.search.simulation import SPACE, Curves, Pretend, is_repeatable, search

LR = {"optim.lr": {"log_uniform": [1e-5, 1.0]}}


def trial(number, loss, share, lr=None, status="done", seed=0):
    """A trial of its own settings unless `lr` says otherwise."""
    lr = (number + 1) / 100 if lr is None else lr
    metrics = {"val/bpb": loss} if status == "done" else {}
    return Trial(number, Ask({"optim.lr": lr}, seed, share, share < 1), f"lr={lr}", status, metrics)


def promotions(rule, problem, trials):
    """The settings that are promoted one after the other while everything else stands still."""
    out = []
    while True:
        ask = rule.next(problem, trials)
        if not isinstance(ask, Ask) or not ask.why.startswith("promoted"):
            return out
        out.append((round(ask.settings["optim.lr"] * 100) - 1, ask.share))
        trials = [*trials, Trial(len(trials), ask, f"lr={ask.settings['optim.lr']}")]


def test_rungs_are_powers_of_eta_down_to_the_smallest_share():
    assert Asha(eta=3, min_share=0.1).shares == [1 / 9, 1 / 3, 1.0]
    assert Asha(eta=4, min_share=1 / 64).shares == [1 / 64, 1 / 16, 1 / 4, 1.0]
    assert Asha(eta=2, min_share=0.3).shares == [0.5, 1.0]


def test_promotions_of_a_worked_example():
    """Nine trials on the lowest rung, eta 3: the best three are promoted, the best first."""
    losses = [5.0, 3.0, 8.0, 1.0, 9.0, 2.0, 7.0, 4.0, 6.0]
    rule, problem = Asha(eta=3, min_share=1 / 9), Pretend(LR)
    low = [trial(i, loss, 1 / 9) for i, loss in enumerate(losses)]
    assert promotions(rule, problem, low) == [(3, 1 / 3), (5, 1 / 3), (1, 1 / 3)]
    # With two ended nobody is among the best third; with three the best is, with five still one.
    assert promotions(rule, problem, low[:2]) == []
    assert promotions(rule, problem, low[:3]) == [(1, 1 / 3)]
    assert promotions(rule, problem, low[:5]) == [(3, 1 / 3)]
    # The highest rung that has a promotable trial comes first: number 5 overtook number 3.
    middle = [trial(9, 0.9, 1 / 3, 0.04), trial(10, 0.5, 1 / 3, 0.06), trial(11, 0.8, 1 / 3, 0.02)]
    assert promotions(rule, problem, low + middle) == [(5, 1.0)]
    assert promotions(rule, problem, low[:6] + middle) == [(5, 1.0)]
    # While one of them runs, a third of two is nobody, and a new draw starts.
    running = replace(middle[2], status="running", metrics={})
    ask = rule.next(problem, [*low, *middle[:2], running])
    assert ask.share == 1 / 9 and ask.why == "draw 9" and ask.keep


def test_a_promotion_keeps_a_checkpoint_below_the_top_and_goes_on_with_the_same_seed():
    rule, problem = Asha(eta=3, min_share=1 / 9), Pretend(LR, seeds=(7, 8))
    low = [trial(i, float(i), 1 / 9, seed=7) for i in range(9)]
    ask = rule.next(problem, low)
    assert (ask.seed, ask.share, ask.keep, ask.source) == (7, 1 / 3, True, None)
    middle = [trial(9 + i, float(i), 1 / 3, 0.01 * (i + 1), seed=7) for i in range(3)]
    ask = rule.next(problem, low + middle)
    assert (ask.settings, ask.share, ask.keep) == ({"optim.lr": 0.01}, 1.0, False)


def test_nan_and_failed_trials_count_in_their_rung_and_are_never_promoted():
    rule, problem = Asha(eta=3, min_share=1 / 3), Pretend(LR)
    bad = [trial(0, math.nan, 1 / 3), trial(1, 0.0, 1 / 3, status="failed"), trial(2, math.inf, 1 / 3)]
    assert promotions(rule, problem, bad) == []
    assert promotions(rule, problem, [*bad, trial(3, 9.0, 1 / 3)]) == [(3, 1.0)]
    low = [*bad[:2], *(trial(i, float(i), 1 / 3) for i in (2, 3, 4, 5))]
    assert promotions(rule, problem, low) == [(2, 1.0), (3, 1.0)]
    # A refused trial took no time and is on no rung.
    assert promotions(rule, problem, [trial(0, 0.0, 1 / 3, status="refused"), *low[2:4]]) == []
    upwards = Pretend(LR, objective=Objective("val/bpb", "max"))
    assert promotions(rule, upwards, [*bad, trial(3, 9.0, 1 / 3)]) == [(3, 1.0)]


def test_a_promotion_that_failed_is_not_asked_again():
    rule, problem = Asha(eta=3, min_share=1 / 3, draws=3), Pretend(LR)
    low = [trial(i, float(i), 1 / 3) for i in range(3)]
    failed = trial(3, 0.0, 1.0, 0.01, status="failed")
    ask = rule.next(problem, [*low, failed])  # the next best one goes on, so that the search has a result
    assert ask.settings == {"optim.lr": 0.02} and ask.share == 1
    assert rule.winner(problem, [*low, failed]) == {"optim.lr": 0.01}  # nothing has been trained to the end yet


def test_a_search_with_few_draws_still_ends_with_a_trial_of_full_length():
    for draws in (1, 2, 5, 10):
        found = is_repeatable(Asha(eta=3, min_share=1 / 9, draws=draws), Pretend(SPACE, seed=2), Curves(1), workers=3)
        assert isinstance(found.done, Done)
        assert sum(t.ask.share == 1 for t in found.trials) == 1
        assert sum(t.ask.share == 1 / 9 for t in found.trials) == draws


def test_a_search_of_which_everything_diverges_ends_without_a_winner():
    for rule in (Asha(draws=9), Median(draws=9)):
        found = search(rule, Pretend(SPACE), lambda ask, state: (math.nan, None), workers=2)
        assert len(found.trials) == 9 and isinstance(found.done, Done)
        assert rule.winner(found.problem, found.trials) is None


def test_finalists_are_trained_with_all_seeds_and_one_of_them_wins():
    rule, problem = Asha(eta=3, min_share=0.3, draws=18, finalists=2), Pretend(SPACE, seeds=(0, 1, 2), seed=3)
    found = is_repeatable(rule, problem, Curves(3, noise=0.3), workers=4, order=random.Random(3))
    whole = [t for t in found.trials if t.ask.share == 1]
    by_loss = sorted((t for t in whole if t.ask.seed == 0), key=problem.objective.loss)
    others = [t for t in whole if t.ask.seed != 0]
    assert sorted((t.id, t.ask.seed) for t in others) == sorted((t.id, s) for t in by_loss[:2] for s in (1, 2))
    mean = {t.id: statistics.fmean(problem.objective.loss(w) for w in whole if w.id == t.id) for t in by_loss[:2]}
    assert problem.identity(rule.winner(problem, found.trials)) == min(mean, key=lambda i: mean[i])


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_asha_answers_the_same_again_in_every_order_of_arrival(workers):
    for order in range(3):
        c = Curves(order, noise=0.05)
        found = is_repeatable(
            Asha(draws=27), Pretend(SPACE, seed=order), c, workers=workers, order=random.Random(order)
        )
        rungs = found.problem and Asha(draws=27).records(found.problem, found.trials)["rungs"]
        assert [r["share"] for r in rungs] == [1 / 9, 1 / 3, 1.0]
        assert rungs[0]["ended"] == 27
        assert all(lower["promoted"] == upper["ended"] for lower, upper in itertools.pairwise(rungs))
        # A rung promotes its best third at each moment: when all is ended at least the final best third.
        finite = [r["ended"] - r["diverged_or_failed"] for r in rungs]
        assert all(r["promoted"] >= min(r["ended"] // 3, n) for r, n in zip(rungs[:-1], finite, strict=False))
        assert rungs[-1]["best"] == min(problem_loss(found, t) for t in found.trials if t.ask.share == 1)


def problem_loss(found, t):
    return found.problem.objective.loss(t)


def test_asha_needs_two_fifths_of_the_budget_for_the_final_best_of_random():
    """The median best loss of 24 searches; their budgets are 40 and 16 whole trials, the curves cross."""
    by_random, by_asha = [], []
    for i in range(24):
        by_random.append(search(Random(draws=40), Pretend(SPACE, seed=i), Curves(i)).best())
        part = search(Asha(), Pretend(SPACE, seed=1000 + i), Curves(i), 4, budget=16, order=random.Random(i))
        assert part.cost <= 17
        by_asha.append(part.best())
    assert statistics.median(by_asha) <= statistics.median(by_random)


def fed(scheduler, curves, by_trial=False):
    """Feed learning curves to a scheduler of Tune, trial after trial or time after time; who was stopped, and when."""
    controller = mock.Mock(**{"get_live_trials.return_value": []})
    them = [mock.Mock(trial_id=str(i)) for i in range(len(curves))]
    stopped: dict[int, int] = {}
    places = [(t, i) for t in range(len(curves[0])) for i in range(len(curves))]
    if by_trial:
        places = [(t, i) for i in range(len(curves)) for t in range(len(curves[0]))]
    for one in them:
        scheduler.on_trial_add(controller, one)
    for t, i in places:
        if i not in stopped:
            result = {"training_iteration": t + 1, "loss": curves[i][t]}
            if scheduler.on_trial_result(controller, them[i], result) == "STOP":
                stopped[i] = t
    return stopped


def test_tunes_cutoff_of_a_full_rung_is_ours():
    """Tune stops below the (1 - 1/eta) percentile of a rung; on a full rung of a multiple of eta that is our rule."""
    from ray.tune.schedulers.async_hyperband import _Bracket

    for seed in range(20):
        losses = [random.Random(f"{seed} {i}").gauss(0, 1) for i in range(9)]
        cutoff = _Bracket(1, 3, 3, 0).cutoff({i: -loss for i, loss in enumerate(losses)})
        ours = promotions(Asha(eta=3, min_share=1 / 3), Pretend(LR), [trial(i, v, 1 / 3) for i, v in enumerate(losses)])
        assert {i for i, _ in ours} == {i for i, loss in enumerate(losses) if -loss >= cutoff}


def test_tunes_asha_depends_on_the_order_of_arrival_and_ours_does_not():
    """Tune decides once, when a result arrives: the first one always goes on, and nobody comes back.

    From best to worst only the first passes; from worst to best all do. Ours ends with the best third either way.
    """
    from ray.tune.schedulers import ASHAScheduler

    losses = [float(i) for i in range(9)]
    kept = {}
    for way, order in (("best first", losses), ("worst first", losses[::-1])):
        tune = ASHAScheduler("training_iteration", "loss", "min", max_t=3, grace_period=1, reduction_factor=3)
        stopped = fed(tune, [[v, v, v] for v in order], by_trial=True)
        kept[way] = {order[i] for i in range(9)} - {order[i] for i, t in stopped.items() if t == 0}
        low = [trial(i, v, 1 / 3) for i, v in enumerate(order)]
        promoted = promotions(Asha(eta=3, min_share=1 / 3), Pretend(LR), low)
        assert sorted(order[i] for i, _ in promoted) == [0.0, 1.0, 2.0]
    assert kept == {"best first": {0.0}, "worst first": set(losses)}


def test_median_stops_whom_tune_stops():
    """The same curves, all trials reporting a share before any reports the next one."""
    from ray.tune.schedulers import MedianStoppingRule

    agreed = 0
    for seed in range(10):
        rng = random.Random(seed)
        curves = [[rng.gauss(i / 8, 0.3) + 2 / (t + 1) for t in range(8)] for i in range(9)]
        tune = MedianStoppingRule("training_iteration", "loss", "min", grace_period=2, min_samples_required=3)
        theirs = fed(tune, curves)
        rule, problem = Median(pieces=8, grace=2 / 8, others=3), Pretend(LR)
        ours: dict[int, int] = {}
        trials: list[Trial] = []
        for t in range(8):
            for i in range(9):
                if i not in ours:
                    trials.append(trial(len(trials), curves[i][t], (t + 1) / 8, (i + 1) / 100))
                    found = rule.curves(problem, trials)
                    which = f"lr={(i + 1) / 100}", 0
                    if rule.stops(problem, which, found[which], rule.means(problem, found)):
                        ours[i] = t
        assert ours == theirs
        agreed += len(ours)
    assert agreed > 20


def test_median_stops_the_worse_half_after_the_grace_and_frees_the_worker():
    rule = Median(pieces=4, grace=0.5, others=3, draws=8)

    def train(ask, state):
        return -math.log(ask.settings["optim.lr"]) / 10 - ask.share, None  # larger is better

    found = is_repeatable(rule, Pretend(LR, seed=2), train, workers=2, order=random.Random(0))
    reached = {t.id: max(u.ask.share for u in found.trials if u.id == t.id) for t in found.trials}
    assert isinstance(found.done, Done)
    assert set(reached.values()) <= {0.5, 0.75, 1.0} and 0.5 in reached.values()
    best = max(found.trials, key=lambda t: t.ask.settings["optim.lr"])
    assert reached[best.id] == 1 and rule.winner(found.problem, found.trials) == best.ask.settings
    rows = rule.records(found.problem, found.trials)["shares"]
    assert [r["ended"] for r in rows] == [sum(v >= r["share"] for v in reached.values()) for r in rows]
    assert sum(r["stopped"] for r in rows) == sum(v < 1 for v in reached.values())


def test_median_waits_for_others_and_for_the_grace():
    problem, rule = Pretend(LR), Median(pieces=4, grace=0.5, others=2)
    good = [trial(i * 2 + k, 1.0, (k + 1) / 4, 0.1 * (i + 1)) for i in range(2) for k in range(2)]
    bad = [trial(4, 9.0, 0.25, 0.5)]
    assert rule.next(problem, [*good[:1], *bad]).settings == {"optim.lr": 0.1}
    ask = rule.next(problem, [*(replace(t, status="running") if t.ask.share == 0.5 else t for t in good), *bad])
    assert (ask.settings, ask.share, ask.keep) == ({"optim.lr": 0.5}, 0.5, True)  # before the grace
    bad.append(trial(5, 9.0, 0.5, 0.5))
    goes_on = lambda r, them: r.next(problem, them).settings == {"optim.lr": 0.5}
    running = [trial(6, 0.0, 0.75, 0.1, "running"), trial(7, 0.0, 0.75, 0.2, "running")]
    assert not goes_on(rule, [*good, *bad, *running])
    assert goes_on(replace(rule, others=3), [*good, *bad, *running])


def test_median_tries_the_next_seed_of_what_reached_the_end():
    rule = Median(pieces=2, grace=0.5, others=2, draws=6)
    problem = Pretend(LR, seeds=(0, 1))
    found = is_repeatable(rule, problem, lambda ask, state: (-ask.settings["optim.lr"] - ask.share, None), workers=2)
    whole = [{t.id for t in found.trials if t.ask.share == 1 and t.ask.seed == s} for s in (0, 1)]
    assert {t.id for t in found.trials if t.ask.seed == 1} == whole[0] and whole[1] <= whole[0]


@pytest.mark.parametrize("workers", [1, 3])
def test_median_answers_the_same_again(workers):
    c = Curves(4, noise=0.1)
    found = is_repeatable(
        Median(pieces=5, draws=12), Pretend(SPACE, seed=4), c, workers=workers, order=random.Random(4)
    )
    assert found.cost < 12 and found.best() < math.inf


def test_a_crash_frees_the_worker_and_the_search_goes_on():
    def train(ask, state):
        if ask.settings["optim.lr"] > 0.01:
            raise RuntimeError("out of memory")
        return -ask.settings["optim.lr"], None

    for rule in (Asha(eta=3, min_share=0.3, draws=18), Median(pieces=3, draws=18)):
        found = is_repeatable(rule, Pretend(LR), train, workers=2)
        assert isinstance(found.done, Done)
        assert sum(t.status == "failed" for t in found.trials) > 3
        assert rule.winner(found.problem, found.trials)["optim.lr"] <= 0.01


def test_settings_that_cannot_be_are_refused_in_one_line():
    for wrong, said in (
        ({"kind": "asha", "eta": 1}, "eta=1"),
        ({"kind": "asha", "min_share": 0.0}, "min_share=0.0"),
        ({"kind": "asha", "eta": 4, "min_share": 0.3}, "at most 1/eta=0.25"),
        ({"kind": "asha", "finalists": 2}, "give draws"),
        ({"kind": "asha", "draws": 0}, "draws=0"),
        ({"kind": "median", "pieces": 1}, "pieces=1"),
        ({"kind": "median", "grace": 1.0}, "grace=1.0"),
        ({"kind": "median", "others": 0}, "others=0"),
    ):
        with pytest.raises(ConfigError, match=said):
            build(Rule, wrong)
    for rule in (Asha(), Median()):
        with pytest.raises(InputError, match=r"vary: steps: .* equal shares of one length"):
            rule.check(Pretend({"steps": [10, 20]}))
    with pytest.raises(InputError, match="try seeds=3"):
        Asha(draws=9, finalists=2).check(Pretend(SPACE))
    Asha(draws=9, finalists=2).check(Pretend(SPACE, seeds=(0, 1)))
