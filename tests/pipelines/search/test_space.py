"""The explorations format: what it expands to, in which order, and what it refuses."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.spec import Part, build
from pipelines.lib.config import InputError, override, read_yaml, write_yaml
from pipelines.lib.search.domains import same
from pipelines.lib.search.space import Interval, Options, Space, Steps, label, unknown_keys


def space(text):
    return Space.read(read_yaml(text))


def points(text):
    return space(text).points()


# What a key may be


def test_lists_expand_to_a_product_in_key_order_with_the_last_key_fastest():
    assert points("{a: [1, 2], b: x, c: [null, true]}") == [
        {"a": 1, "b": "x", "c": None},
        {"a": 1, "b": "x", "c": True},
        {"a": 2, "b": "x", "c": None},
        {"a": 2, "b": "x", "c": True},
    ]


def test_a_list_of_mappings_is_a_union_of_independent_sweeps():
    assert points("[{a: [1, 2]}, {b: [3, 4]}, {a: 2}]") == [{"a": 1}, {"a": 2}, {"b": 3}, {"b": 4}]


def test_a_list_inside_a_list_is_one_value():
    assert points("model.mlp: [[swiglu, mlp], swiglu, [{kind: mlp, hidden: [8, 16]}, mlp]]") == [
        {"model.mlp": ["swiglu", "mlp"]},
        {"model.mlp": "swiglu"},
        {"model.mlp": [{"kind": "mlp", "hidden": [8, 16]}, "mlp"]},
    ]


def test_ranges_include_both_ends_and_are_exact_decimals():
    assert points("a: {range: {start: 0.1, end: 0.5}}") == [{"a": v} for v in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert points("a: [{range: {start: 8, end: 2, step: -3}}, 100]") == [{"a": 8}, {"a": 5}, {"a": 2}, {"a": 100}]
    assert points("a: {range: {start: 1, end: 3}}") == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [p["a"] for p in points("a: {range: {start: 1e-4, end: 3e-4, step: 1e-4}}")] == [0.0001, 0.0002, 0.0003]


def test_the_options_of_a_part_are_keys_of_their_own_and_vary():
    norm = "model.norm: [rmsnorm, {kind: prmsnorm, fraction: [0.25, 0.5], eps: 1e-6}]\nn: [1, 2]"
    assert points(norm)[2:5] == [
        {"model.norm": "prmsnorm", "model.norm.fraction": 0.25, "model.norm.eps": 1e-6, "n": 1},
        {"model.norm": "prmsnorm", "model.norm.fraction": 0.25, "model.norm.eps": 1e-6, "n": 2},
        {"model.norm": "prmsnorm", "model.norm.fraction": 0.5, "model.norm.eps": 1e-6, "n": 1},
    ]
    both = "model.mlp: [{kind: mlp, hidden: [8, 16]}, {kind: mlp, activation: {kind: [gelu, silu]}}, {kind: gated}]"
    assert points(both) == [
        {"model.mlp": "mlp", "model.mlp.hidden": 8},
        {"model.mlp": "mlp", "model.mlp.hidden": 16},
        {"model.mlp": "mlp", "model.mlp.activation": "gelu"},
        {"model.mlp": "mlp", "model.mlp.activation": "silu"},
        {"model.mlp": "gated"},
    ]
    assert space(both).dimensions()["model.mlp"] == Options(("mlp", "gated"))


def test_a_part_comes_before_its_options_however_it_was_written():
    tree = {"model": {"mlp": {"kind": "gated", "hidden": 1, "bias": True}}}
    for key, value in points("{model.mlp.hidden: 8, model.mlp: [plain]}")[0].items():
        tree = override(tree, key, value)
    assert tree == {"model": {"mlp": {"kind": "plain", "hidden": 8}}}


def test_default_leaves_a_key_to_the_recipe_and_null_sets_it_to_null():
    assert points("a: [default, null, 1]") == [{}, {"a": None}, {"a": 1}]
    assert points("{a: default, b: 1}") == [{"b": 1}]
    assert space("{a: default, b: 1}").keys() == {"a", "b"}


def test_yaml_anchors_work():
    assert points("[{a: &widths [1, 2]}, {b: *widths}]") == [{"a": 1}, {"a": 2}, {"b": 1}, {"b": 2}]


def test_equal_points_are_left_out_and_counted():
    found = space("[{a: [1, 1.0, 2]}, {a: [2, 3]}]")
    assert found.points() == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert found.duplicates == 2 and found.at_most == 5


# Groups


def test_parameter_groups_are_a_union_each_laid_over_the_base_and_nest():
    text = """
    a: [1, 2]
    parameter_groups:
      - b: [3, 4]
      - c: 5
        parameter_groups: [{d: 6}, {d: [7, 8]}]
    """
    assert points(text) == [
        *({"a": a, "b": b} for a in (1, 2) for b in (3, 4)),
        {"a": 1, "c": 5, "d": 6},
        {"a": 2, "c": 5, "d": 6},
        *({"a": a, "c": 5, "d": d} for a in (1, 2) for d in (7, 8)),
    ]


def test_a_key_with_another_value_in_base_and_group_is_an_error():
    with pytest.raises(InputError, match=r"vary: a is 1 and 2 in parts that are merged"):
        space("{a: 1, parameter_groups: [{b: 1}, {a: 2}]}")
    assert points("{a: 1, parameter_groups: [{a: 1}]}") == [{"a": 1}]


def test_common_group_holds_everywhere_and_may_not_be_overridden():
    assert points("{common_group: {a: [1]}, b: [2, 3]}") == [{"a": 1, "b": 2}, {"a": 1, "b": 3}]
    for text in (
        "{common_group: {a: 1}, a: 2}",
        "{common_group: {a: 1}, parameter_groups: [{b: 1}, {a: 2}]}",
        "{common_group: {a: 1}, named_variation_groups: [{named_group: g, a: [1, 2]}], named_group_variations: [g]}",
    ):
        with pytest.raises(InputError, match="a stands in common_group"):
            space(text)
    with pytest.raises(InputError, match="a must have a single value"):
        space("{common_group: {a: [1, 2]}}")


NAMED = """
named_static_groups:
  - {named_group: rotary, position: rotary, base: [10]}
  - {named_group: modern, named_group_static: [rotary], named_group_settings: {norm: rms}}
named_variation_groups:
  - {named_group: widths, d: [64, 128]}
  - {named_group: shapes, named_group_variations: [widths], parameter_groups: [{n: 1}, {n: [2, 3]}]}
  - {named_group: plain, position: [learned, none]}
"""


def test_static_groups_merge_and_variation_groups_multiply_and_both_nest():
    text = NAMED + "named_group_static: [modern]\nnamed_group_variations: [shapes]\nparameter_groups: [{lr: [1, 2]}]"
    with pytest.raises(InputError, match="named group 'plain' is never used"):
        points(text)
    found = points(text.replace("  - {named_group: plain, position: [learned, none]}\n", ""))
    assert len(found) == 2 * 3 * 2
    assert all(p["position"] == "rotary" and p["base"] == 10 and p["norm"] == "rms" for p in found)
    assert [(p["n"], p["d"], p["lr"]) for p in found[:4]] == [(1, 64, 1), (1, 64, 2), (1, 128, 1), (1, 128, 2)]


def test_alternates_are_one_branch_per_name_whichever_kind_of_group():
    text = NAMED + "named_group_alternates: [modern, plain]\nparameter_groups:\n - named_group_variations: shapes\n"
    found = points(text)
    assert len(found) == 6 * (1 + 2)
    assert {p["position"] for p in found} == {"rotary", "learned", "none"}
    assert {p.get("norm") for p in found if p["position"] == "learned"} == {None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{named_static_groups: [{named_group: g, a: [1, 2]}], named_group_static: g}", "exactly one configuration"),
        (
            "{named_variation_groups: [{named_group: g, a: [1, 2]}], named_group_static: g}",
            "use named_group_variations",
        ),
        ("{named_static_groups: [{named_group: rotary, a: 1}], named_group_static: rotry}", "did you mean 'rotary'"),
        (
            "{named_static_groups: [{named_group: g, named_group_static: h}, {named_group: h, named_group_static: g}],"
            " named_group_static: g}",
            "in a circle: g -> h -> g",
        ),
        ("{named_static_groups: [{named_group: g, a: 1}, {named_group: g, a: 1}]}", "'g' stands twice"),
        ("{named_static_groups: [{a: 1}]}", "under `named_group`"),
        ("{named_static_groups: [{named_group: g, a: 1}], a: 2, named_group_static: g}", "a is 1 and 2|a is 2 and 1"),
        (
            "{named_variation_groups: [{named_group: g, a: 1}, {named_group: h, a: 2}],"
            " named_group_variations: g, named_group_alternates: h}",
            "a is 1 and 2",
        ),
    ],
)
def test_named_groups_that_cannot_be_meant_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        space(text)


# Conditions


@pytest.mark.parametrize(
    "conditions",
    [
        "{norm: rms, n: 2}",
        "[[norm, rms], [n, 2]]",  # the form that the original silently never fired
        "[{norm: rms, n: 2}]",
        "[{norm: rms, n: [2, 3]}]",
    ],
)
def test_a_condition_fires_in_every_form_and_else_leaves_the_key_unset(conditions):
    found = points(f"{{norm: [rms, layer], n: [1, 2], eps: {{conditions: {conditions}, options: [5, 6]}}}}")
    assert found == [
        {"norm": "rms", "n": 1},
        {"norm": "rms", "n": 2, "eps": 5},
        {"norm": "rms", "n": 2, "eps": 6},
        {"norm": "layer", "n": 1},
        {"norm": "layer", "n": 2},
    ]


def test_a_list_of_mappings_is_an_or_of_ands():
    found = points("{a: [1, 2], b: [1, 2], c: {conditions: [{a: 1, b: 2}, {a: 2, b: 1}], options: 9}}")
    assert [p.get("c") for p in found] == [None, 9, 9, None]


def test_later_conditions_see_earlier_results_and_conditions_stand_after_the_product():
    text = "{y: {conditions: {x: 5}, options: 6}, a: [1, 2], x: {conditions: {a: 1}, options: [4, 5]}}"
    with pytest.raises(InputError, match=r"y: conditions {x: 5} can never be true; a condition sees all plain keys"):
        points(text)
    assert points("{x: {conditions: {a: 1}, options: [4, 5]}, a: [1, 2], y: {conditions: {x: 5}, options: 6}}") == [
        {"a": 1, "x": 4},
        {"a": 1, "x": 5, "y": 6},
        {"a": 2},
    ]


def test_default_in_a_condition_means_unset():
    assert points("{a: [default, null], b: {conditions: {a: default}, options: 1}}") == [{"b": 1}, {"a": None}]


def test_one_and_true_differ_but_one_and_one_point_zero_do_not():
    assert points("{a: [[1, true], [1, 1], [1.0, 1]]}") == [{"a": [1, True]}, {"a": [1, 1]}]
    assert points("{a: [1, true], b: {conditions: {a: 1.0}, options: 2}}") == [{"a": 1, "b": 2}, {"a": True}]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ("{nrm: rms}", "nothing here sets 'nrm'; did you mean 'norm'"),
        ("{norm: rmss}", r"norm is one of \['rms', 'layer'\]"),
        ("[[norm, rms], [norm, layer]]", "can never be true"),
        ("{n: 1, m: 1}", "can never be true"),  # in two groups that exclude each other
        ("[{norm: rms}, {norm: other}]", r"x: conditions {norm: \"other\"} can never be true"),
        ("{d: 9}", "can never be true"),
    ],
)
def test_a_condition_that_can_never_be_true_is_named(conditions, message):
    text = "{norm: [rms, layer], d: {integer: [1, 8]}, parameter_groups: [{n: 1}, {m: 1}],"
    text += " x: {conditions: %s, options: 1}}"
    with pytest.raises(InputError, match=message):
        space(text % conditions)
    assert space(text % "{norm: rms, d: 8, m: 1}").keys() == {"norm", "d", "n", "m", "x"}


def test_a_condition_in_a_part_of_a_large_space_is_checked_without_expanding_it():
    keys = "".join(f"k{i}: {{range: {{start: 1, end: 100}}}}\n" for i in range(12))
    big = space(keys + "x: {conditions: {k3: 50, k7: 100}, options: 1}")
    assert big.at_most == 100**12
    with pytest.raises(InputError, match="can never be true"):
        space(keys + "x: {conditions: {k3: 50, k7: 101}, options: 1}")
    with pytest.raises(InputError, match="as many as 1,000,000"):
        big.points()


# Words


def test_aliases_stand_for_keys_also_in_conditions():
    text = "{aliases: {lr: optim.lr}, lr: [1, 2], x: {conditions: {lr: 1}, options: 3}}"
    assert points(text) == [{"optim.lr": 1, "x": 3}, {"optim.lr": 2}]
    with pytest.raises(InputError, match="alias 'lr' is never used"):
        points("{aliases: {lr: optim.lr}, optim.lr: 1}")
    with pytest.raises(InputError, match=r"optim.lr is 1 and 2"):
        points("{aliases: {lr: optim.lr}, optim.lr: 1, lr: 2}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{comon_group: {a: 1}}", "did you mean 'common_group'"),
        ("{parameter_group: [{a: 1}]}", "did you mean 'parameter_groups'"),
        ("{named_group: x}", "a name belongs to a named group only"),
        ("{parameter_groups: [{aliases: {a: b}}]}", "aliases stands at the top"),
        ("{parameter_groups: {a: 1}}", "parameter_groups: a list of mappings"),
        ("{parameter_groups: []}", "empty list"),
        ("{named_group_static: {}}", "there is no named group {}; none is defined"),
        ("{a: []}", "a: an empty list"),
        ("{a: {rang: {start: 1, end: 2}}}", "a: .*did you mean 'range'"),
        ("{a: {range: {start: 1, stop: 2}}}", "range needs"),
        ("{a: {range: {start: 1, end: 2, step: -1}}}", "does not lead from 1 to 2"),
        ("{a: {range: {start: 1, end: 2, step: 0}}}", "does not lead from 1 to 2"),
        ("{a: {uniform: [2, 1]}}", "must rise"),
        ("{a: {uniform: [1]}}", "uniform needs"),
        ("{a: {log_uniform: [0, 1]}}", "above 0"),
        ("{a: {integer: [0.5, 1]}}", "whole numbers"),
        ("{a: {uniform: [1, 2], step: 1}}", "'step' does not belong beside 'uniform'"),
        ("{a: {increment: 0}}", "above 0"),
        ("{a: {factor: 1}}", "leads nowhere"),
        ("{a: {increment: 1, times: 0}}", "at least 1"),
        ("{a: {increment: 1, lo: 0}}", "did you mean 'low'"),
        ("{a: [{uniform: [1, 2]}]}", "give it alone"),
        ("{a: [[{range: {start: 1, end: 2}}]]}", "only parts may stand there"),
        ("{a: {conditions: {b: 1}}, b: 1}", "'options'"),
        ("{a: {conditions: {b: 1}, options: 1, option: 2}, b: 1}", "'option'"),
        ("{a: {conditions: [b, 1], options: 1}, b: 1}", "conditions are"),
        ("{a: {conditions: {}, options: 1}}", "empty conditions"),
        ("{model.norm.kind: rmsnorm}", "write 'model.norm'"),
        ("{'a b': 1}", "is no dotted key"),
        ("{m: {kind: x, o: {conditions: {b: 1}, options: 1}}, b: 1}", "key of its own, 'm.o'"),
        ("{m: {kind: x, o: 1}, m.o: 2}", "m.o is set twice"),
        ("{parameter_groups: [{a: [1, 2]}, {a: {uniform: [1, 2]}}]}", "two kinds of domain"),
        ("[]", "a mapping, or a list of mappings"),
        ("[a]", "a mapping, or a list of mappings"),
    ],
)
def test_what_cannot_be_meant_is_one_line_that_names_it(text, message):
    with pytest.raises(InputError, match=message) as caught:
        space(text)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("vary")


def test_errors_name_the_sweep_of_a_list():
    with pytest.raises(InputError, match=r"^spaces/x.yaml: vary\[1\]: a: an empty list"):
        Space.read([{"a": 1}, {"a": []}], "spaces/x.yaml: vary")


# Drawing


def test_choices_come_in_order_and_only_where_there_is_one():
    asked = []

    def choose(key, domain):
        asked.append((key, domain))
        return domain.low if isinstance(domain, Interval) else domain.values[-1]

    text = """
    - {z: 1}
    - c: {conditions: {b: 2}, options: [3, 4]}
      a: 1
      parameter_groups: [{n: 1}, {n: 2, lr: {log_uniform: [1e-4, 1e-2]}}]
      b: [1, 2]
      d: {conditions: {b: 1}, options: [3, 4]}
    """
    assert space(text).draw(choose) == {"a": 1, "b": 2, "n": 2, "lr": 1e-4, "c": 4}
    assert asked == [
        ("@sweep", Options((0, 1))),
        ("@sweep1.parameter_groups", Options((0, 1))),
        ("b", Options((1, 2))),
        ("lr", Interval(1e-4, 1e-2, log=True)),
        ("c", Options((3, 4))),
    ]


def test_a_choice_outside_of_the_options_is_refused():
    with pytest.raises(InputError, match=r"a=3 is not among \[1, 2\]"):
        space("a: [1, 2]").draw(lambda key, domain: 3)


def test_a_space_that_is_not_finite_says_which_key_and_a_step_cannot_be_drawn():
    with pytest.raises(InputError, match=r"b: .*no finite number of values"):
        points("{a: 1, b: {uniform: [1, 2]}}")
    with pytest.raises(InputError, match="says how to go on"):
        space("{a: {increment: 1}}").sample(random.Random(0))
    assert space("{a: {increment: 2, times: 3, low: 1}}").dimensions() == {"a": Steps(2, 3, 1)}


def test_dimensions_hold_what_may_vary_or_be_unset_merged_over_groups():
    text = """
    common_group: {s: 1}
    one: 1
    w: [1, 2]
    parameter_groups: [{a: 1, lr: {uniform: [0, 1]}}, {a: [2, 1]}, {lr: {uniform: [0.5, 2]}}]
    c: {conditions: {w: 1}, options: 7}
    """
    assert space(text).dimensions() == {
        "w": Options((1, 2)),
        "c": Options((7,)),
        "a": Options((1, 2)),
        "lr": Interval(0, 2),
    }
    assert space(text).keys() == {"s", "one", "w", "a", "lr", "c"}
    assert set(space("[{a: 1, b: 1}, {a: 1, b: 2}, {a: 1}]").dimensions()) == {"b"}


plain_values = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from(["x", "default", 0.5]))
lists = st.lists(st.one_of(plain_values, st.lists(plain_values, max_size=2)), min_size=1, max_size=3)
mappings = st.dictionaries(st.sampled_from("abcd"), lists, max_size=3)


@st.composite
def trees(draw):
    """A finite sweep with two groups of keys of their own and conditions on a key that is there."""
    tree = draw(mappings)
    if draw(st.booleans()):
        tree["parameter_groups"] = [{f"g{k}": v for k, v in draw(mappings).items()} for _ in range(2)]
    keys = [k for k in tree if k in "abcd"]
    for name in draw(st.lists(st.sampled_from("xyz"), unique=True, max_size=2)) if keys else []:
        on = draw(st.sampled_from(keys))
        value = [draw(st.sampled_from(tree[on]))]
        form = draw(st.sampled_from([{on: value}, [[on, value]], [{on: value}]]))
        tree[name] = {"conditions": form, "options": draw(lists)}
    return tree


@given(trees(), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_every_sample_is_a_point_and_every_branch_is_sampled(tree, rng):
    found = Space.read(tree)
    expanded = found.points()
    assert len(expanded) + found.duplicates <= found.at_most
    assert all(found.sample(rng) in expanded for _ in range(20))
    assert all(set(p) <= found.keys() for p in expanded)
    keys = found.keys()
    varied = {k for k in keys if len({repr(p.get(k, "unset")) for p in expanded}) > 1}
    assert varied <= set(found.dimensions())


def _pair(form):
    return next(iter((form[0] if isinstance(form, list) else form).items()))


def by_hand(tree):
    """The expansion in another way: products of lists, then every condition in turn over all results."""
    groups = tree.get("parameter_groups", [{}])
    found = []
    for group in groups:
        both = {**{k: v for k, v in tree.items() if k != "parameter_groups"}, **group}
        free = {k: v for k, v in both.items() if isinstance(v, list)}
        results = [dict(zip(free, values, strict=True)) for values in itertools.product(*free.values())]
        for key, rule in both.items():
            if isinstance(rule, dict):
                form = rule["conditions"]
                on, (value,) = form[0] if isinstance(form, list) and isinstance(form[0], list) else _pair(form)
                results = [
                    result
                    for r in results
                    for result in ([{**r, key: o} for o in rule["options"]] if repr(r[on]) == repr(value) else [r])
                ]
        found += [{k: v for k, v in r.items() if v != "default"} for r in results]
    return list({repr(sorted(r.items())): r for r in found}.values())


@given(trees())
@settings(max_examples=80, deadline=None)
def test_points_and_their_order_are_those_of_nested_loops(tree):
    assert list(map(repr, map(sorted, map(dict.items, Space.read(tree).points())))) == list(
        map(repr, map(sorted, map(dict.items, by_hand(tree))))
    )


@given(trees())
@settings(max_examples=60, deadline=None)
def test_points_written_down_as_groups_read_back_as_the_same_points(tree):
    expanded = Space.read(tree).points()
    written = {"parameter_groups": [{k: [v] for k, v in point.items()} for point in expanded]}
    assert Space.read(read_yaml(write_yaml(written))).points() == expanded


@given(trees())
@settings(max_examples=60, deadline=None)
def test_different_points_have_different_short_safe_labels(tree):
    found = Space.read(tree)
    expanded = found.points()
    labels = [label(p, found.dimensions()) for p in expanded]
    assert len(set(labels)) == len(expanded)


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(anything, anything)
def test_labels_tell_any_two_values_apart_in_letters_that_files_may_have(a, b):
    ours, theirs = label({"k": a}, {"k": None}), label({"k": b}, {"k": None})
    assert (ours == theirs) == (json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)) or same(a, b)
    assert re.fullmatch(r"[\w.,=+~-]{1,96}", ours, re.ASCII)


def test_a_sampled_conditional_space_gives_every_branch():
    text = """
    norm: [rms, layer]
    parameter_groups: [{n: {integer: [1, 4]}}, {m: [1, 2]}]
    eps: {conditions: [[norm, layer]], options: {log_uniform: [1e-8, 1e-3]}}
    """
    found = space(text)
    rng = random.Random(0)
    seen = {frozenset(found.sample(rng)) for _ in range(100)}
    assert seen == {frozenset(k) for k in ({"norm", "n"}, {"norm", "m"}, {"norm", "n", "eps"}, {"norm", "m", "eps"})}


# Names


def test_labels_are_short_and_bounded_and_tell_keys_and_values_apart():
    dims = dict.fromkeys(["model.d_model", "optim.lr", "model.norm", "model.mlp.hidden", "model.attention.hidden"])
    settings_ = {"model.d_model": 64, "optim.lr": 1e-3, "model.norm": "rmsnorm", "model.mlp.hidden": [64, 128]}
    assert label(settings_, dims) == "d_model=64,lr=0.001,norm=rmsnorm,mlp.hidden=64+128"
    assert label({"steps": 5}, dims) == "base"
    # Two sweeps that differ in the key but not in the value had one name in the original.
    assert label({"optim.lr": 1}, dims) != label({"model.d_model": 1}, dims)
    odd = [label({"model.norm": v}, dims) for v in ("a/b", "a-b", "../a", "", "1", 1, "true", True, "x" * 300, [1], [])]
    assert len(set(odd)) == len(odd) and all(len(n) <= 96 for n in odd)
    assert not any(c in name for name in odd for c in "/ \\:*?'\"<>|")


# Keys


class Norm(Part):
    kinds: ClassVar[dict[str, type]]


@dataclass(frozen=True)
class RMS(Norm):
    eps: float = 1e-5


@dataclass(frozen=True)
class Partial(Norm):
    fraction: float = 0.5
    inner: Norm = field(default_factory=RMS)


Norm.kinds = {"rms": RMS, "partial": Partial}


@dataclass(frozen=True)
class Config:
    norm: Norm | tuple[Norm, ...] = RMS()
    tags: dict[str, str] = field(default_factory=dict)
    steps: int = 1


def test_every_kinds_options_are_known_and_the_nearest_name_is_given_for_what_is_not():
    good = space(
        "{norm: [rms, [rms, partial], default], norm.inner.inner.eps: 1, norm.fraction: 1, tags.x: y, steps: 1}"
    )
    assert unknown_keys(good, Config) == []
    bad = space("{norm: [[rms, {kind: prtial}]], norm.fractin: 1, stepz: 1, steps.x: 1}")
    assert unknown_keys(bad, Config) == [
        "norm='prtial' does not exist; did you mean 'partial'?",
        "norm.fractin: norm has no setting 'fractin'; did you mean 'fraction'?",
        "steps.x: steps has no setting 'x'",
        "stepz: there is no setting 'stepz'; did you mean 'steps'?",
    ]


def test_points_laid_over_a_recipe_build():
    found = points("{norm: [rms, {kind: partial, fraction: [0.25, 0.5]}, [rms, {kind: partial}]], steps: [2, 3]}")
    built = []
    for point in found:
        tree = {"norm": {"kind": "partial", "inner": "rms"}}
        for key, value in point.items():
            tree = override(tree, key, value)
        built.append(build(Config, tree))
    assert built[2] == Config(Partial(0.25), steps=2) and built[-1] == Config((RMS(), Partial()), steps=3)
    assert len(set(map(repr, built))) == len(built) == 8
