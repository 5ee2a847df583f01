"""Runs that differ in their seed only are one variant; and what differs between variants, and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.lib.comparison.collect import CARRIED_OUT, RunRecord, digest, is_number

ABSENT = object()  # a setting that this variant's kind of part does not have
ORDER = ("complete", "diverged", "cut short", "incomplete", "failed")  # which of two runs of one seed counts
LABEL_KEYS = 3  # settings in a variant's name, before it names only what is unusual about it


@dataclass(frozen=True)
class Variant:
    """Runs of equal settings, one per seed. repeats: names of further runs of a seed, which do not count."""

    key: str
    settings: Mapping[str, Any]
    runs: tuple[RunRecord, ...]
    repeats: tuple[str, ...] = ()
    label: str = ""


def variants_of(runs: Sequence[RunRecord]) -> list[Variant]:
    """The variants among these runs, in the order they come, without labels."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(digest(run.settings), []).append(run)
    found = []
    for key, members in groups.items():
        by_seed: dict[str, RunRecord] = {}
        repeats = []
        for run in sorted(members, key=lambda r: ORDER.index(r.status)):
            if run.seed in by_seed:
                repeats.append(run.name)
            else:
                by_seed[run.seed] = run
        chosen = tuple(by_seed[seed] for seed in sorted(by_seed, key=natural))
        found.append(Variant(key, chosen[0].settings, chosen, tuple(repeats)))
    return found


def natural(text: str) -> tuple[int, int, str]:
    """Order of seeds: numbers by size, before words."""
    head = text.split(" ", 1)[0]
    return (0, int(head), text) if head.lstrip("-").isdigit() else (1, 0, text)


def parents(key: str) -> list[str]:
    """`a.b.c` -> a, a.b."""
    words = key.split(".")
    return [".".join(words[:i]) for i in range(1, len(words))]


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The settings in which two variants differ; options that come and go with their part do not count beside it."""
    keys = [k for k in dict.fromkeys([*a, *b]) if a.get(k, ABSENT) != b.get(k, ABSENT)]
    return [k for k in keys if not any(p in keys for p in parents(k))]


def varying(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which variants differ whose part, around that key, is the same: the columns of the table."""
    found = []
    for key in dict.fromkeys(k for tree in settings for k in tree):
        values: dict[tuple, set[str]] = {}
        for tree in settings:
            around = tuple(repr(tree.get(p)) for p in parents(key))
            values.setdefault(around, set()).add(repr(tree[key]) if key in tree else "")
        if any(len(v) > 1 for v in values.values()):
            found.append(key)
    return found


def computes(keys: Iterable[str]) -> list[str]:
    """The settings that change what is computed, without those of how it is carried out."""
    return [k for k in keys if k not in CARRIED_OUT]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last word, or by as many as tell it from the others."""
    names = {}
    for key in keys:
        words = key.split(".")
        for n in range(1, len(words) + 1):
            tail = ".".join(words[-n:])
            if sum(other == tail or other.endswith("." + tail) for other in keys) == 1 or n == len(words):
                names[key] = tail
                break
    return names


def word(value: Any) -> str:
    """A setting's value as people write it."""
    if value is ABSENT:
        return "–"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return in_runs([word(v) for v in value])
    return str(value)


def brief(value: Any) -> str:
    """A value in a name: a number drawn at random by three of its digits."""
    return word(float(f"{value:.3g}") if isinstance(value, float) else value)


def in_runs(words: Sequence[str]) -> str:
    """`[128 x3, none]`: equal neighbours counted."""
    out: list[tuple[str, int]] = []
    for w in words:
        if out and out[-1][0] == w:
            out[-1] = (w, out[-1][1] + 1)
        else:
            out.append((w, 1))
    return "[" + ", ".join(w if n == 1 else f"{w} x{n}" for w, n in out) + "]"


def labelled(variants: Sequence[Variant]) -> list[Variant]:
    """The variants with names made of the settings that vary; with many of those, of what is unusual in each."""
    import dataclasses as dc

    keys = varying([v.settings for v in variants])
    names = short_names(keys)
    usual = {k: Counter(brief(v.settings.get(k, ABSENT)) for v in variants).most_common(1)[0][0] for k in keys}
    labels = []
    for variant in variants:
        said = [(k, brief(variant.settings[k])) for k in keys if k in variant.settings]
        if len(keys) > LABEL_KEYS:
            said = [(k, w) for k, w in said if w != usual[k]]
        text = ", ".join(f"{names[k]}={w if len(w) <= 40 else w[:37] + '...'}" for k, w in said)
        labels.append(text or ("the usual settings" if keys else variant.runs[0].name))
    twice = {label for label, n in Counter(labels).items() if n > 1}
    return [
        dc.replace(v, label=f"{label} ({v.key[:6]})" if label in twice else label)
        for v, label in zip(variants, labels, strict=True)
    ]


def letter(i: int) -> str:
    """A, B, ... Z, AA, AB, ...: how tables and plots call the variant of that rank."""
    text = ""
    i += 1
    while i:
        i, rest = divmod(i - 1, 26)
        text = chr(65 + rest) + text
    return text


def number_axis(values: Iterable[Any]) -> bool | None:
    """How to lay values along an axis: None for words; True for numbers over a decade or more, which want a log."""
    numbers = [v for v in values if v is not ABSENT]
    if not numbers or not all(is_number(v) and math.isfinite(v) for v in numbers):
        return None
    return min(numbers) > 0 and max(numbers) / min(numbers) >= 10
