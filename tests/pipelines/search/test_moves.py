"""The steps from a setting: both directions, one entry of a list at a time, layers with all their lists."""

from __future__ import annotations

import pytest

from pipelines.lib.config import InputError
from pipelines.lib.search.domains import Interval, Options, Steps
from pipelines.lib.search.moves import check_dimension, moves, value_at

TREE = {
    "model": {
        "kind": "gpt",
        "n_layers": 3,
        "d_model": 64,
        "bias": True,
        "norm": [{"kind": "rmsnorm", "eps": 1e-6}, {"kind": "layernorm"}, {"kind": "rmsnorm", "eps": 1e-6}],
        "mlp": {"kind": "swiglu", "hidden": [32, 48, 64], "activation": {"kind": "silu"}},
        "attention": {"kind": "causal", "window": [16, None, 16], "n_heads": 4},
    },
    "optim": {"kind": "adamw", "lr": 0.001, "betas": [0.9, 0.95, 0.99]},
}


def steps(dimensions, settings=None, **options):
    return moves(dimensions, TREE, settings or {}, **options)


def labels(found):
    return [m.label for m in found]


def test_both_directions():
    assert labels(steps({"model.d_model": Steps(16), "optim.lr": Steps(2, factor=True)})) == [
        "model.d_model 64 -> 80",
        "model.d_model 64 -> 48",
        "optim.lr 0.001 -> 0.002",
        "optim.lr 0.001 -> 0.0005",
    ]
    found = steps({"model.d_model": Options((32, 64, 96, 128))}, times=2)
    assert [m.value for m in found] == [96, 32, 128]


def test_a_list_changes_in_one_entry():
    found = steps({"model.mlp.hidden": Steps(8)})
    assert [m.settings["model.mlp.hidden"] for m in found] == [
        [40, 48, 64], [24, 48, 64], [32, 56, 64], [32, 40, 64], [32, 48, 72], [32, 48, 56],
    ]  # fmt: skip
    assert found[2].label == "model.mlp.hidden[1] 48 -> 56" and found[2].settings.keys() == {"model.mlp.hidden"}


def test_what_is_no_number_stays():
    windows = [m.settings["model.attention.window"] for m in steps({"model.attention.window": Steps(8)})]
    assert windows == [[24, None, 16], [8, None, 16], [16, None, 24], [16, None, 8]]
    assert steps({"model.bias": Steps(1)}) == []


def test_booleans_are_a_choice():
    assert [m.value for m in steps({"model.bias": Options((True, False))})] == [False]
    assert [m.value for m in steps({"model.bias": Options((0, 1, False))})] == [0, 1, False]


def test_parts_per_layer_change_one_layer_at_a_time():
    found = steps({"model.norm": Options(("rmsnorm", "layernorm", "none"))})
    assert labels(found) == [
        "model.norm[0] rmsnorm -> layernorm",
        "model.norm[0] rmsnorm -> none",
        "model.norm[1] layernorm -> rmsnorm",
        "model.norm[1] layernorm -> none",
        "model.norm[2] rmsnorm -> layernorm",
        "model.norm[2] rmsnorm -> none",
    ]
    assert found[3].settings["model.norm"] == [TREE["model"]["norm"][0], "none", TREE["model"]["norm"][2]]


def test_a_whole_list_may_be_an_option():
    found = steps({"model.mlp.hidden": Options(([32, 48, 64], [64, 64, 64]))})
    assert [m.value for m in found] == [[64, 64, 64]]
    assert [m.value for m in steps({"model.d_model": Options((64, [1, 2, 3]))})] == [[1, 2, 3]]


def test_a_part_by_its_name():
    assert [m.value for m in steps({"model.mlp": Options(("mlp", "swiglu"))})] == ["mlp"]
    assert value_at(TREE, "model.mlp") == "swiglu" and value_at(TREE, "model.mlp.activation") == "silu"


def test_options_of_another_kind_have_no_steps():
    assert steps({"model.mlp.rank": Steps(4), "model.norm.eps": Options((1e-5, 1e-6))}) == []


def test_what_is_decided_later_is_laid_last():
    found = steps({"model.mlp": Options(("mlp",))}, {"model.mlp": "swiglu", "model.mlp.hidden": [32, 48, 64]})
    assert list(found[0].settings.items()) == [("model.mlp.hidden", [32, 48, 64]), ("model.mlp", "mlp")]


def test_the_middle_layer_is_doubled_or_dropped_in_every_list():
    more, fewer = steps({"model.n_layers": Steps(1, times=3)}, layers_key="model.n_layers", duplicate="middle")
    norm = TREE["model"]["norm"]
    assert more.settings == {
        "model.n_layers": 4,
        "model.norm": [norm[0], norm[1], norm[1], norm[2]],
        "model.mlp.hidden": [32, 48, 48, 64],
        "model.attention.window": [16, None, None, 16],
    }
    assert fewer.settings == {
        "model.n_layers": 2,
        "model.norm": [norm[0], norm[2]],
        "model.mlp.hidden": [32, 64],
        "model.attention.window": [16, 16],
    }
    assert more.label == "model.n_layers 3 -> 4 (layer 1 doubled)"


def test_each_layer_in_turn():
    found = steps({"model.n_layers": Steps(1)}, layers_key="model.n_layers", duplicate="each")
    assert [m.settings["model.mlp.hidden"] for m in found] == [
        [32, 32, 48, 64], [32, 48, 48, 64], [32, 48, 64, 64], [48, 64], [32, 64], [32, 48],
    ]  # fmt: skip


def test_several_layers_at_once():
    found = steps({"model.n_layers": Options((1, 3, 5))}, layers_key="model.n_layers", duplicate="middle")
    assert [m.settings["model.mlp.hidden"] for m in found] == [[32, 48, 48, 48, 64], [64]]
    assert labels(found) == ["model.n_layers 3 -> 5 (layer 1 3 times)", "model.n_layers 3 -> 1 (without layers 0 to 1)"]


def test_lists_stay_without_duplication():
    found = steps({"model.n_layers": Steps(1)}, layers_key="model.n_layers", duplicate="none")
    assert [dict(m.settings) for m in found] == [{"model.n_layers": 4}, {"model.n_layers": 2}]


def test_without_lists_a_layer_is_a_number_and_never_none():
    tree = {"model": {"n_layers": 1, "d_model": 8}}
    found = moves({"model.n_layers": Steps(1)}, tree, {}, layers_key="model.n_layers", duplicate="each")
    assert labels(found) == ["model.n_layers 1 -> 2"]


@pytest.mark.parametrize(
    ("key", "domain", "says"),
    [
        ("model.d_model", Interval(1, 9), "no next value"),
        ("model.bias", Steps(1), "model.bias is true in the recipe"),
        ("model.mlp", Steps(1), "swiglu"),
    ],
)
def test_dimensions_without_steps_are_refused(key, domain, says):
    with pytest.raises(InputError, match=says) as error:
        check_dimension(key, domain, TREE)
    assert key in str(error.value)


def test_usable_dimensions_are_not():
    for key, domain in (("model.attention.window", Steps(8)), ("model.norm", Options(("rmsnorm",))), ("x.y", Steps(1))):
        check_dimension(key, domain, TREE)
