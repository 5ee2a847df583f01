"""The search files: one for every family and preset, and each of them can be searched as it stands."""

from __future__ import annotations

import dataclasses as dc
import functools
import random

import pytest

from models.family import Family
from models.gpt.presets import PRESETS
from models.spec import build
from pipelines.lib.config import defaults_under, override, recipe
from pipelines.lib.search.space import Options, Space, label, unknown_keys
from pipelines.lib.search.study import SPACES, SearchConfig
from pipelines.lib.training import LENGTHS, TrainConfig

known = functools.cache(recipe)
FILES = sorted(SPACES.glob("*.yaml"))
EXAMPLES = {"shakespeare_greedy", "asha_ten", "parts_sweep", "single_parts"}


def search(path):
    """The file as the command reads it."""
    return build(SearchConfig, defaults_under(SearchConfig, {**recipe(path), "data": "d", "out": "o"}))


def trained(config, settings):
    """The training config of settings, as a search lays them over its recipe."""
    changes = {"data": "d", "out": "o", **config.fixed, **settings}
    tree = known(config.recipe)
    if any(k in changes for k in LENGTHS):
        tree = {k: v for k, v in tree.items() if k not in LENGTHS}
    for key, value in changes.items():
        tree = override(tree, key, value)
    return build(TrainConfig, defaults_under(TrainConfig, tree))


def parameters(model):
    """Of a model over a vocabulary of its own size, or of 256."""
    return dc.replace(model, vocab_size=model.vocab_size or 256).n_parameters()


def test_every_family_and_preset_has_a_file():
    families = {name for name, family in Family.kinds.items() if family.__module__.startswith("models.")}
    assert {*families, *PRESETS, *EXAMPLES} - {p.stem for p in FILES} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_parses_its_keys_and_parts_exist_and_its_samples_build(path):
    config = search(path)
    space = Space.read(config.vary, path.name)
    assert unknown_keys(space, TrainConfig) == []
    assert trained(config, {}).rows > 0  # what the recipe and `fixed` say alone is a training run too
    dimensions = space.dimensions()
    if path.stem == "shakespeare_greedy":
        return  # its steps are tried below
    rng = random.Random(path.stem)
    samples = [space.sample(rng) for _ in range(20)]
    for settings in samples:
        built = trained(config, settings)
        assert built.rows > 0 and parameters(built.model) > 0, settings
        warmup = built.schedule.warmup_steps
        assert warmup <= built.total_steps(1) / 4, f"{settings}: {warmup} updates of warm-up"
    assert len({label(s, dimensions) for s in samples}) == len({str(s) for s in samples})


@pytest.mark.parametrize("name", PRESETS)
def test_the_baseline_of_a_presets_file_is_the_preset(name):
    model = trained(search(SPACES / f"{name}.yaml"), {}).model
    assert dc.replace(model, vocab_size=None) == dc.replace(PRESETS[name](), vocab_size=None)


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith(("gpt2", "smollm2", "nanogpt"))])
def test_shapes_that_are_compared_have_about_equal_parameters(name):
    """Each group of a preset's file, all else as in the preset, is within a twelfth of it."""
    config = search(SPACES / f"{name}.yaml")
    preset = PRESETS[name]()
    vocab = preset.vocab_size or 65
    whole = dc.replace(preset, vocab_size=vocab).n_parameters()
    for group in Space.read({"parameter_groups": config.vary["parameter_groups"]}).points():
        own = preset.attention.n_kv_heads
        keys = None if own == preset.attention.n_heads else own  # as many as heads, in every shape
        model = trained(config, {**group, "model.attention.n_kv_heads": keys}).model
        model = dc.replace(model, vocab_size=vocab)
        assert abs(model.n_parameters() / whole - 1) < 1 / 12, (group, model.n_parameters(), whole)


def test_every_step_of_the_greedy_example_builds():
    config = search(SPACES / "shakespeare_greedy.yaml")
    dimensions = Space.read(config.vary).dimensions()
    assert len(dimensions) >= 6
    for key, domain in dimensions.items():
        value = trained(config, {})
        for word in key.split("."):
            value = getattr(value, word)
        if isinstance(domain, Options):
            steps = list(domain.values)
        else:
            steps = domain.neighbours(value, 1)
        assert steps, key
        for step in steps:
            assert trained(config, {key: step}).rows > 0


def test_the_examples_are_of_the_sizes_that_their_comments_say():
    asha = Space.read(search(SPACES / "asha_ten.yaml").vary)
    assert len(asha.dimensions()) >= 8
    sweep = Space.read(search(SPACES / "parts_sweep.yaml").vary)
    assert len(sweep.points()) == 2 * 3 * 3
