"""The Parzen estimator: the same suggestions as optuna's own study, from nothing but the trials."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import warnings

import optuna
import pytest

from models.spec import ConfigError, build
from pipelines.lib.config import InputError
from pipelines.lib.search.domains import DEFAULT, Interval, Options
from pipelines.lib.search.rules import Random, Rule, Tpe
from pipelines.lib.search.rules.listed import by_setting, stream
from pipelines.lib.search.rules.tpe import coded, decoded, distribution, make_study, parameter, recall
from pipelines.lib.search.space import Space
from pipelines.lib.search.trials import Objective, Trial
from tests.pipelines.search.simulation import Pretend, is_repeatable, search

FLAT = {
    "optim.lr": {"log_uniform": [1e-4, 1.0]},
    "optim.weight_decay": {"uniform": [0.0, 1.0]},
    "model.d_model": [32, 64, 128, 256],
    "model.n_heads": {"integer": [1, 8]},
    "model.norm": ["rmsnorm", "layernorm"],
}
GROUPED = {
    "named_variation_groups": [
        {"named_group": "plain", "model.norm": ["a", "b"], "optim.lr": {"log_uniform": [1e-3, 1e-1]}},
        {"named_group": "deep", "model.n_layers": [2, 4, 8], "optim.lr": {"log_uniform": [1e-4, 1e-2]}},
    ],
    "named_group_alternates": ["plain", "deep"],
    "optim.weight_decay": {"uniform": [0.0, 1.0]},
    "model.dropout": [0.1, 0.2, DEFAULT],
    "optim.beta": {"conditions": [{"model.n_layers": 8}], "options": [0.8, 0.9]},
}


def loss(ask, state):
    """Narrow in the learning rate, with an interaction: a larger model wants a smaller one."""
    s = ask.settings
    wanted = -1 - 0.5 * math.log2(s["model.d_model"] / 32)
    value = (math.log10(s["optim.lr"]) - wanted) ** 2 + (s["optim.weight_decay"] - 0.3) ** 2
    value += (
        0.2 * abs(s["model.n_heads"] - 4) - 0.2 * math.log2(s["model.d_model"]) + 0.3 * (s["model.norm"] == "rmsnorm")
    )
    return value + 0.01 * ask.seed, None


@pytest.mark.parametrize("repetitions", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_tpe_beats_random_on_a_narrow_bowl(repetitions):
    by_tpe, by_random = [], []
    for i in range(repetitions):
        by_tpe.append(search(Tpe(), Pretend(FLAT, seed=i), loss, most=40).best())
        by_random.append(search(Random(), Pretend(FLAT, seed=i), loss, most=40).best())
    wins = sum(a < b for a, b in zip(by_tpe, by_random, strict=True))
    gain = statistics.median(by_random) - statistics.median(by_tpe)
    print(f"better in {wins} of {repetitions}; median best {gain:.2f} lower")
    assert wins >= 0.8 * repetitions and gain > 0.1


def test_suggestions_are_those_of_a_plain_optuna_study():
    """One study told as it goes, beside one made anew for each suggestion, with the same seeds."""
    problem = Pretend(FLAT, seed=3)
    found = search(Tpe(startup=8), problem, loss, most=24)
    study = optuna.create_study(direction="minimize")
    domains = problem.space.dimensions()
    for i, trial in enumerate(found.trials):
        if i < 8:
            params = {parameter(k, d): coded(d, trial.ask.settings[k]) for k, d in domains.items()}
            study.enqueue_trial(params)
        seed = stream(problem.seed, "tpe", i, 0).randrange(2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=1, group=True, multivariate=True, seed=seed)
        asked = study.ask({parameter(k, d): distribution(d) for k, d in domains.items()})
        theirs = {k: decoded(d, asked.params[parameter(k, d)]) for k, d in domains.items()}
        for key, value in trial.ask.settings.items():  # ours are rounded to six digits, which the next ones then see
            near = pytest.approx(theirs[key], rel=1e-4) if isinstance(value, float) else theirs[key]
            assert value == near, f"suggestion {i}"
        study.tell(asked, trial.metrics["val/bpb"])


@pytest.mark.parametrize("space", [FLAT, GROUPED])
def test_tpe_answers_the_same_again_with_workers_seeds_and_groups(space):
    def train(ask, state):
        return random.Random(json.dumps(ask.settings)).random() + ask.seed, None

    problem = Pretend(space, seeds=(0, 1), seed=1)
    found = is_repeatable(Tpe(draws=16, startup=5), problem, train, workers=3, order=random.Random(2))
    assert len(found.trials) == 32 and len({t.id for t in found.trials}) == 16


def test_the_first_suggestions_are_those_of_random():
    problem = Pretend(FLAT, seed=9)
    ours, plain = (search(rule, problem, loss, most=6) for rule in (Tpe(startup=5), Random()))
    same = [a.id == b.id for a, b in zip(ours.trials, plain.trials, strict=True)]
    assert same == [True] * 5 + [False]


def test_the_choices_behind_settings_are_found_again_in_every_group():
    space = Space.read(GROUPED)
    groups = set()
    for i in range(200):
        chosen = {}

        def choose(key, domain, i=i, chosen=chosen):
            chosen[key] = domain, domain.sample(stream(i, key))
            return chosen[key][1]

        settings = json.loads(json.dumps(space.draw(choose)))
        assert recall(space, settings) == chosen
        groups |= {str(v) for k, (_, v) in chosen.items() if k.startswith("@")}
    assert len(groups) == 2
    assert recall(space, {"optim.lr": 5.0, "optim.weight_decay": 0.0}) is None


def test_diverged_trials_are_the_worst_and_running_ones_are_known_as_such():
    problem = Pretend(FLAT, seeds=(0, 1), objective=Objective("val/score", "max"))
    asks = [t.ask for t in search(Random(draws=4), problem, loss).trials]
    trials = [Trial(i, a, problem.identity(a.settings), "done", {"val/score": 2.0 + i}) for i, a in enumerate(asks[:2])]
    trials.append(Trial(2, asks[2], problem.identity(asks[2].settings), "done", {"val/score": math.nan}))
    trials.append(Trial(3, asks[3], problem.identity(asks[3].settings), "failed"))
    trials.append(Trial(4, asks[4], problem.identity(asks[4].settings)))
    trials.append(Trial(5, asks[6], problem.identity(asks[6].settings), "refused"))
    told = make_study(problem, by_setting(problem, trials)).trials
    assert [t.state.name for t in told] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert [t.value for t in told] == [-2.5, math.inf, None]


def test_nan_does_not_win_and_the_search_leaves_where_it_diverges():
    def train(ask, state):
        return (math.nan if ask.settings["optim.lr"] > 0.01 else loss(ask, state)[0]), None

    found = is_repeatable(Tpe(), Pretend(FLAT, seed=2), train, most=40)
    diverged = [math.isnan(t.metrics["val/bpb"]) for t in found.trials]
    assert sum(diverged[20:]) < sum(diverged[:10])
    assert Tpe().winner(found.problem, found.trials)["optim.lr"] <= 0.01


def test_a_used_up_space_ends_and_refused_settings_are_not_asked():
    space = {"model.d_model": [32, 64, 128], "model.n_heads": [1, 2, 3]}
    problem = Pretend(space, refuse=lambda s: "odd" if s["model.n_heads"] == 3 else None)
    train = lambda ask, state: (ask.settings["model.d_model"] + ask.settings["model.n_heads"], None)
    found = is_repeatable(Tpe(startup=2), problem, train)
    assert len(found.trials) == 6 and "used up" in found.done.reason
    assert Tpe().winner(problem, found.trials) == {"model.d_model": 32, "model.n_heads": 1}


def test_values_and_their_codes():
    sizes, norms = Options((256, 32, 64)), Options(("a", None, {"kind": "b"}))
    assert [coded(sizes, v) for v in (32, 64, 256)] == [0, 1, 2]
    assert [decoded(norms, coded(norms, v)) for v in norms.values] == list(norms.values)
    assert decoded(Interval(1e-4, 1.0, log=True), 0.123456789) == 0.123457
    assert decoded(Interval(0.1234567891, 1.0), 0.1234567891) >= 0.1234567891  # rounding stays inside
    assert decoded(Interval(1, 9, integer=True), 5) == 5


def test_bad_settings_and_a_missing_optuna_are_one_line(monkeypatch):
    with pytest.raises(ConfigError, match="startup=0"):
        build(Rule, {"kind": "tpe", "startup": 0})
    with pytest.raises(ConfigError, match="draws=0"):
        build(Rule, {"kind": "tpe", "draws": 0})
    Tpe().check(Pretend(FLAT))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match="pip install"):
        Tpe().check(Pretend(FLAT))
