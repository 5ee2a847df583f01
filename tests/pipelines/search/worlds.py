"""A problem whose truth is known, and trials that answer at once: searches by the thousand, without training."""

from __future__ import annotations

import copy
import json
import math
import zlib
from dataclasses import replace

import numpy as np

from pipelines.lib.config import InputError, override
from pipelines.lib.search.moves import value_at
from pipelines.lib.search.trials import Done, Objective, Trial


class Vary:
    """A space of single keys, as far as a greedy search looks at one."""

    def __init__(self, dimensions):
        self._dimensions = dimensions

    def dimensions(self):
        return self._dimensions


class World:
    """A problem and its truth.

    base: the recipe's tree.  dimensions: key -> domain.
    truth(tree): the expected loss.  noise: standard deviation of a trial's own noise, or noise(tree); seeds add theirs
    to all trials alike.  cost(tree): name -> value.  refuse(tree): a reason or None.
    """

    def __init__(self, base, dimensions, truth, noise=0.0, cost=None, refuse=None, seeds=3, draw=0, objective=None):
        self.recipe = {"steps": 100, "tokens": None, "epochs": None, "seconds": None, **base}
        self.space = Vary(dimensions)
        self.truth, self.noise, self.costs, self.refuse = (
            truth,
            noise,
            cost or (lambda tree: {"parameters": 1.0}),
            refuse,
        )
        self.seeds, self.seed, self.draw = tuple(range(seeds)), 0, draw
        self.objective = objective or Objective()
        self._trees = {}

    def tree(self, settings):
        key = json.dumps(settings)
        if key not in self._trees:
            tree = copy.deepcopy(self.recipe)
            for name, value in settings.items():
                tree = override(tree, name, value)
            self._trees[key] = _parts(self.recipe, tree)
        return self._trees[key]

    def base(self, key):
        try:
            return value_at(self.recipe, key)
        except KeyError:
            raise InputError(f"{key}: not a setting") from None

    def refuses(self, settings):
        return self.refuse(self.tree(settings)) if self.refuse else None

    def identity(self, settings):
        return f"{zlib.crc32(json.dumps(self.tree(settings), sort_keys=True).encode()):08x}"

    def loss(self, settings):
        return self.truth(self.tree(settings))

    def answer(self, number, ask):
        """The trial of an ask, ended. The same ask has the same answer in any order."""
        tree, ident = self.tree(ask.settings), self.identity(ask.settings)
        spread = self.noise(tree) if callable(self.noise) else self.noise
        own = np.random.Generator(np.random.PCG64([self.draw, int(ident, 16), ask.seed])).standard_normal()
        shared = np.random.Generator(np.random.PCG64([self.draw, ask.seed])).standard_normal()
        value = self.truth(tree) + spread * own + (0.0 if callable(self.noise) else spread) * shared
        metrics = {"val/bpb": value, "val/nll": value, "val/score": math.exp(-value)}
        return Trial(number, ask, ident, "done", metrics, self.costs(tree))


def search(world, rule, change=lambda trial: trial, most=10_000):
    """Run a search to its end, everything that may run at once answered at once. change: trial -> trial that is seen.

    Returns its trials and the reason of its end.
    """
    trials = []
    while not isinstance(found := rule.asks(world, trials), Done):
        assert found and len(trials) < most
        trials += [change(world.answer(len(trials) + i, ask)) for i, ask in enumerate(found)]
    return trials, found.reason


def one_by_one(world, rule, parallel=1, order=None, trials=()):
    """The same by `next`, at most `parallel` trials at a time. order(running): index of the one that ends next.

    Yields the trials after every change.
    """
    trials = list(trials)
    while True:
        running = [t for t in trials if t.status == "running"]
        found = rule.next(world, tuple(trials)) if len(running) < parallel else None
        if isinstance(found, Done):
            return
        if found is not None:
            trials.append(Trial(len(trials), found, world.identity(found.settings)))
        else:
            assert running, "the rule waits for nothing"
            trial = running[order(running) if order else 0]
            trials[trial.number] = world.answer(trial.number, trial.ask)
        yield list(trials)


def failed(trial, error="out of memory"):
    return replace(trial, status="failed", metrics={}, cost={}, error=error)


def _parts(old, new):
    """As a built config has it: a part that is named only becomes a mapping."""
    if isinstance(old, dict) and "kind" in old and isinstance(new, str):
        return {"kind": new}
    if isinstance(old, dict) and isinstance(new, dict):
        return {k: _parts(old.get(k), v) for k, v in new.items()}
    if isinstance(old, list) and old and isinstance(new, list):
        return [_parts(old[0], v) for v in new]
    return new
