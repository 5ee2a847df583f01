"""CORE from accuracies: every published table; and errors against resampling."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pipelines.lib.core.aggregate import Outcome, centred, core, core_stderr
from pipelines.lib.core.tasks import read_chance

# gpt2 (124M): task, accuracy, random baseline in percent, centred value. Source: openai-community-gpt2.csv and
# eval_meta_data.csv of nanochat's evaluation bundle (MIT); CORE there 0.113891.
GPT2 = """
hellaswag_zeroshot 0.308504 25 0.078006
jeopardy 0.001889 0 0.001889
bigbench_qa_wikidata 0.282663 0 0.282663
arc_easy 0.412458 25 0.216611
arc_challenge 0.221843 25 -0.037543
copa 0.600000 50 0.200000
commonsense_qa 0.224406 20 0.030508
piqa 0.622960 50 0.245919
openbook_qa 0.278000 25 0.037333
lambada_openai 0.322919 0 0.322919
hellaswag 0.307907 25 0.077209
winograd 0.578755 50 0.157509
winogrande 0.486188 50 -0.027624
bigbench_dyck_languages 0.155000 0 0.155000
agi_eval_lsat_ar 0.226087 20 0.032609
bigbench_cs_algorithms 0.419697 0 0.419697
bigbench_operators 0.085714 0 0.085714
bigbench_repeat_copy_logic 0.031250 0 0.031250
squad 0.058278 0 0.058278
coqa 0.133659 0 0.133659
boolq 0.552294 62 -0.178175
bigbench_language_identification 0.256600 9.1 0.182178
"""
ROUNDED = 2e-6  # the tables give accuracies to six digits, of which a centred value takes at most 1 / (1 - 0.62)


def test_a_published_table_is_reproduced():
    rows = [line.split() for line in GPT2.split("\n") if line]
    accuracy = {name: float(a) for name, a, *_ in rows}
    chance = {name: float(b) / 100 for name, _, b, _ in rows}
    for name, *_, published in rows:
        assert centred(accuracy[name], chance[name]) == pytest.approx(float(published), abs=ROUNDED)
    assert f"{core(accuracy, chance, accuracy):.6f}" == "0.113891"


@pytest.mark.parametrize("model", ["gpt2", "gpt2-large"])
def test_the_published_tables_of_gpt2(data_dir, model):
    chance = read_chance(data_dir / "core" / "eval_meta_data.csv")
    lines = (data_dir / "core-reference" / f"openai-community-{model}.csv").read_text().splitlines()[1:]
    rows = {name.strip(): (a.strip(), c.strip()) for name, a, c in (line.split(",") for line in lines)}
    published = rows.pop("CORE")[1]
    accuracy = {name: float(a) for name, (a, _) in rows.items()}
    assert len(rows) == 22
    for name, (_, value) in rows.items():
        assert centred(accuracy[name], chance[name]) == pytest.approx(float(value), abs=ROUNDED)
    assert f"{core(accuracy, chance, accuracy):.6f}" == published


def test_the_published_scores_of_dclm(data_dir):
    folder = data_dir / "core-reference" / "dclm"
    chance = read_chance(folder / "eval_meta_data.csv")
    tasks = json.loads((folder / "additional_aggregation.json").read_text())["low_variance_datasets"]
    tables = sorted(folder.glob("evaluation_*.json"))
    assert len(tasks) == 22 and len(tables) == 10
    for path in tables:
        table = json.loads(path.read_text())
        assert core(table["eval_metrics"]["icl"], chance, tasks) == pytest.approx(table["Core"], abs=1e-12), path.name


def test_errors_are_those_of_resampling_items_also_where_two_tasks_ask_the_same_ones():
    draw = np.random.default_rng(0)
    ability = draw.random(400)
    answers = {
        "a": draw.random(400) < ability,
        "a_again": draw.random(400) < ability,  # the same items, so right together
        "b": draw.random(250) < 0.4,
    }
    outcomes = {name: Outcome(list(c), 0.25, name[0]) for name, c in answers.items()}
    totals = []
    for _ in range(4000):
        picks = {400: draw.integers(0, 400, 400), 250: draw.integers(0, 250, 250)}
        totals.append(np.mean([(c[picks[len(c)]].mean() - 0.25) / 0.75 for c in answers.values()]))
    error = core_stderr(outcomes.values())
    assert error == pytest.approx(np.std(totals), rel=0.05)
    apart = core_stderr(Outcome(o.correct, o.chance, name) for name, o in outcomes.items())
    assert error > 1.02 * apart
    accuracy = outcomes["b"]
    assert accuracy.stderr == pytest.approx(np.std(answers["b"], ddof=1) / np.sqrt(250))
    assert accuracy.centred_stderr == pytest.approx(accuracy.stderr / 0.75)
    assert core_stderr([Outcome([True], 0.25, "c")]) is None and Outcome([True], 0.25, "c").stderr is None


@pytest.mark.parametrize("n", [2, 3, 250])
@pytest.mark.parametrize("right", [True, False])
def test_none_right_of_three_is_no_certainty(n, right):
    """The far end of Wilson's interval, by its definition: there the observed share is one standard error away."""
    outcome = Outcome([right] * n, 0.25, "a")
    end = abs(outcome.accuracy - outcome.stderr)
    assert abs(end - outcome.accuracy) == pytest.approx(math.sqrt(end * (1 - end) / n))
    assert outcome.centred_stderr == pytest.approx(outcome.stderr / 0.75)
    mixed = Outcome([True, False] * 50, 0.5, "b")
    assert core_stderr([outcome, mixed]) == pytest.approx(math.hypot(outcome.centred_stderr, mixed.centred_stderr) / 2)
    assert core_stderr([outcome, outcome]) == pytest.approx(outcome.centred_stderr)  # the same items
