"""The steps that a greedy search may take from where it stands: one thing changed at a time, in every direction."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.lib.config import InputError
from pipelines.lib.search.domains import Domain, Steps, is_number

Duplicate = Literal["middle", "each", "none"]


@dataclass(frozen=True)
class Move:
    """One step.

    key, value: the dimension and what it becomes
    settings: all settings after the step, in the order in which they are laid over the recipe
    label: for people, such as `model.n_layers 2 -> 3`
    """

    key: str
    value: Any
    settings: Mapping[str, Any]
    label: str


def moves(
    dimensions: Mapping[str, Domain],
    tree: Mapping[str, Any],
    settings: Mapping[str, Any],
    times: int = 1,
    layers_key: str = "",
    duplicate: Duplicate = "none",
) -> list[Move]:
    """All steps from `settings`, in the order of the dimensions.

    tree: the whole config with these settings, plain and nested; dimensions that are not in it (an option of another
        kind of part) have no step
    times: how far to go along a list of numbers, each way
    layers_key, duplicate: the number of layers, and how the per-layer lists beside it follow: `middle` doubles or drops
        the middle layer, `each` tries every layer, `none` leaves the lists alone
    """
    found = []
    for key, domain in dimensions.items():
        try:
            value = value_at(tree, key)
        except KeyError:
            continue
        if key == layers_key and duplicate != "none":
            found += _layer_moves(key, domain, tree, settings, duplicate)
            continue
        for at, old, new, whole in _changes(domain, value, times):
            label = f"{key}{at} {show(old)} -> {show(new)}"
            found.append(Move(key, whole, _laid(settings, {key: whole}), label))
    return found


def check_dimension(key: str, domain: Domain, tree: Mapping[str, Any]) -> None:
    """Raise InputError for a dimension that has no steps: an interval, or steps from what is no number."""
    try:
        value = value_at(tree, key)
    except KeyError:
        return
    numbers = [v for v in (value if isinstance(value, list) else [value]) if is_number(v)]
    if isinstance(domain, Steps) and not numbers:
        raise InputError(
            f"vary: {key} is {show(value)} in the recipe, so there is no number to go on from; list its values"
        )
    try:
        domain.neighbours(numbers[0] if numbers else value, 1)
    except InputError as error:
        raise InputError(f"vary: {key}: {error}") from None


def value_at(tree: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, a part by its name. Raises KeyError."""
    node: Any = tree
    for word in key.split("."):
        if not isinstance(node, Mapping) or word not in node:
            raise KeyError(key)
        node = node[word]
    return _named(node)


def show(value: Any) -> str:
    """A plain value as in a settings file, on one line."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _named(value: Any) -> Any:
    return value["kind"] if isinstance(value, Mapping) and "kind" in value else value


def _laid(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes last, so that what was decided later is laid over what was decided earlier."""
    return {**{k: v for k, v in settings.items() if k not in changes}, **changes}


def _changes(domain: Domain, value: Any, times: int) -> Iterator[tuple[str, Any, Any, Any]]:
    """(which entry, its old value, its new one, the whole new value); a list changes in one entry, or as a whole."""
    if not isinstance(value, list):
        for new in _neighbours(domain, value, times):
            yield "", value, new, new
        return
    for i, entry in enumerate(value):
        for new in _neighbours(domain, _named(entry), times):
            if not isinstance(new, list):
                yield f"[{i}]", _named(entry), new, [*value[:i], new, *value[i + 1 :]]
    whole = [] if isinstance(domain, Steps) else _neighbours(domain, value, times)
    for new in whole:
        if isinstance(new, list):
            yield "", value, new, new


def _neighbours(domain: Domain, value: Any, times: int) -> list[Any]:
    if isinstance(domain, Steps) and not is_number(value):
        return []  # a word, null or true between the numbers of a list stays as it is
    return domain.neighbours(value, times)


def _layer_moves(
    key: str, domain: Domain, tree: Mapping[str, Any], settings: Mapping[str, Any], duplicate: Duplicate
) -> list[Move]:
    """One step up and one down: layers doubled or dropped, in every list beside the key with one entry per layer."""
    count = value_at(tree, key)
    root = key.rpartition(".")[0]
    beside: Any = tree
    for word in root.split(".") if root else ():
        beside = beside[word]
    lists = dict(_lists(beside, root, count))
    others = [n for n in domain.neighbours(count, 1) if is_number(n) and n >= 1]
    nearest = [next((n for n in others if n > count), None), next((n for n in others if n < count), None)]
    found = []
    for new in nearest:
        if new is None:
            continue
        by = abs(new - count)
        starts = range(count if new > count else count - by + 1)
        if duplicate == "middle" or not lists:
            starts = range((len(starts) - 1) // 2, (len(starts) - 1) // 2 + 1)
        for i in starts:
            changed = {
                at: [*v[: i + 1], *[v[i]] * by, *v[i + 1 :]] if new > count else [*v[:i], *v[i + by :]]
                for at, v in lists.items()
            }
            label = f"{key} {count} -> {new}"
            if lists and new > count:
                label += f" (layer {i} doubled)" if by == 1 else f" (layer {i} {by + 1} times)"
            elif lists:
                label += f" (without layer {i})" if by == 1 else f" (without layers {i} to {i + by - 1})"
            found.append(Move(key, new, _laid(settings, {key: new, **changed}), label))
    return found


def _lists(tree: Any, at: str, count: int) -> Iterator[tuple[str, list[Any]]]:
    """Every list of `count` entries in a plain tree, by its dotted key; lists inside lists belong to one layer."""
    if isinstance(tree, list):
        if len(tree) == count:
            yield at, tree
    elif isinstance(tree, Mapping):
        for word, below in tree.items():
            yield from _lists(below, f"{at}.{word}" if at else word, count)
