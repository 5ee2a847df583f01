from __future__ import annotations

import random

import pytest

from pipelines.lib.comparison.importance import importance_of

KEYS = ["a", "b"]


def test_main_effects_of_a_full_factorial_by_hand():
    """y = 1 + 0.5 [b = y] + 0.1 seed; a does nothing but a bit of noise on one seed."""
    design = [({"a": a, "b": b}, {str(s): 1 + 0.5 * (b == "y") + 0.1 * s + 0.01 * a * s for s in range(3)})
              for a in (1, 2) for b in "xy"]  # fmt: skip
    found = importance_of(design, KEYS, 0.95)
    assert found.kind == "main effects"
    effects = {e.key: e for e in found.effects}
    assert effects["b"].change == "x → y" and effects["b"].size == pytest.approx(0.5) and effects["b"].shown
    assert effects["a"].size == pytest.approx(0.01) and not effects["a"].shown and effects["a"].n == 3


def test_only_pairs_that_differ_in_nothing_else_count():
    design = [({"a": 1, "b": 1}, {"0": 1.0, "1": 1.1}), ({"a": 2, "b": 2}, {"0": 5.0, "1": 5.3})]
    found = importance_of(design, KEYS, 0.95)
    assert found.kind == "none" and "Too few runs" in found.text


def test_one_seed_uses_its_contexts_and_says_when_they_are_too_few():
    design = [({"a": a, "b": b}, {"0": 2.0 + a + 0.01 * a * b}) for a in (0, 1) for b in (0, 1, 2)]
    effect = next(e for e in importance_of(design, KEYS, 0.95).effects if e.key == "a")
    assert effect.n == 3 and effect.size == pytest.approx(1.01) and effect.shown
    assert importance_of(design[:2], ["b"], 0.95).kind == "none"


def test_a_forest_finds_the_setting_that_matters_and_not_the_one_that_does_nothing():
    pick = random.Random(0)
    design = []
    for _ in range(60):
        settings = {"lr": 10 ** pick.uniform(-4, -2), "norm": pick.choice("xyz"), "idle": pick.random()}
        loss = 2.0 + (settings["norm"] == "y") + pick.gauss(0, 0.05)
        design.append((settings, {"0": loss}))
    found = importance_of(design, ["lr", "norm", "idle"], 0.95)
    assert found.kind == "forest"
    first, *others = found.effects
    assert first.key == "norm" and first.shown and first.size > 0.5
    assert all(abs(e.size) < 0.1 for e in others)


def test_a_forest_that_learned_nothing_says_that_it_cannot_tell():
    pick = random.Random(1)
    design = [({"a": pick.random(), "b": pick.random()}, {"0": pick.gauss(2, 0.1)}) for _ in range(40)]
    found = importance_of(design, KEYS, 0.95)
    assert found.kind == "none" and "cannot be told" in found.text


def test_nothing_varies():
    assert importance_of([({"a": 1}, {"0": 2.0})], [], 0.95).kind == "none"
