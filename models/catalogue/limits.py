"""What parts refuse, in their own words: found by trying it, so that nothing has to be written twice."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from models.catalogue.collect import Place
from models.gpt.config import GPT
from models.spec import ConfigError, Part, fields, kind_of, part_of, registry_of

NUMBERS: dict[type, tuple[Any, ...]] = {int: (-1, 0, 7, 10**6), float: (-1.0, 0.0, 2.0), bool: (False, True)}


@dataclass(frozen=True)
class Refusal:
    """Two settings that are fine alone and cannot stand together."""

    one: str
    other: str
    reason: str


def limits(cls: type, place: Place | None, spec: GPT) -> tuple[str, ...]:
    """What one kind says to unusual values of each of its options, every distinct answer once."""
    found: dict[str, str] = {}

    def note(said: str | None) -> None:
        if said:
            found.setdefault(re.sub(r"-?\d[\d.e+]*", "#", said), said)

    usual: Any = place.usual(cls, spec) if place is not None else cls()
    for name, (annotation, _) in fields(cls).items():
        for value in values(annotation, getattr(cls, "lists", ()), name):
            if value == getattr(usual, name) and type(value) is type(getattr(usual, name)):
                continue
            note(_alone(usual, [(name, value)], place, spec))
    return (*found.values(), *_inner_limits(cls, usual, place, spec))


def _inner_limits(cls: type, usual: Any, place: Place | None, spec: GPT) -> Iterator[str]:
    """What it says to pairs of kinds inside of it: `softmax=consmax, relumax with sink=fixed: ...`."""
    found: list[Refusal] = []
    alone = {c: _alone(usual, [c], place, spec) for c in inner(cls, usual)}
    for one, other in pairs([c for c, said in alone.items() if said is None]):
        if reason := _alone(usual, [one, other], place, spec):
            found.append(Refusal(_word(one), _word(other), reason))
    yield from (said for said in dict.fromkeys(alone.values()) if said)
    for ones, others, reason in grouped(found):
        yield f"{_listed(ones)} with {_listed(others)}: {reason}"


def _alone(usual: Any, choices: list[tuple[str, Any]], place: Place | None, spec: GPT) -> str | None:
    """What is said to a kind with these options in the model; None: nothing is refused."""
    try:
        part = dataclasses.replace(usual, **dict(choices))
        if place is not None:
            place.put(part, spec)
    except ValueError as error:
        return bare(str(error))
    return None


def _listed(words: tuple[str, ...]) -> str:
    """`sink=fixed, sink=head` -> `sink=fixed, head`."""
    by_name: dict[str, list[str]] = {}
    for word in words:
        name, _, value = word.partition("=")
        by_name.setdefault(name, []).append(value)
    return "; ".join(f"{name}={', '.join(values)}" for name, values in by_name.items())


def grouped(refusals: Sequence[Refusal]) -> list[tuple[tuple[str, ...], tuple[str, ...], str]]:
    """Refusals with the same reason together, wherever each of some settings is refused with each of others."""
    others: dict[tuple[str, str], list[str]] = {}
    for r in refusals:
        others.setdefault((r.reason, r.one), []).append(r.other)
    ones: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, one), them in others.items():
        ones.setdefault((reason, tuple(them)), []).append(one)
    return [(tuple(us), them, reason) for (reason, them), us in ones.items()]


def values(annotation: Any, lists: tuple[str, ...], name: str) -> list[Any]:
    """Values of an option that may be out of its range."""
    if name in lists:
        return [(), (0,), (7, 7)]
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [v for a in args if a is not type(None) and typing.get_origin(a) is not tuple for v in values(a, (), "")]
    if typing.get_origin(annotation) is typing.Literal:
        return list(args)
    return list(NUMBERS.get(annotation, ()))


def inner(cls: type, usual: Any) -> Iterator[tuple[str, Any]]:
    """Other kinds of the parts inside a part, and its switches turned: (option, value)."""
    for name, (annotation, _) in fields(cls).items():
        value = getattr(usual, name)
        base = part_of(annotation)
        if base is not None:
            yield from ((name, kind()) for kind in base.kinds.values() if kind is not type(value))
        elif isinstance(value, bool):
            yield name, not value


def pairs(values: list[tuple[str, Any]]) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    """All pairs of values of two options."""
    for i, one in enumerate(values):
        for other in values[i + 1 :]:
            if one[0] != other[0]:
                yield one, other


def bare(message: str) -> str:
    """A reason without the place that it was found at: `norm=krmsnorm: k=0 ... (layer 0)` -> `k=0 ...`."""
    message = re.sub(r" \(layer \d+\)$", "", message)
    return re.sub(r"^((model\.)?\w+(\[\d+\])?=\w+: )+", "", message)


def combinations(spec: GPT) -> list[Refusal]:
    """Every pair of kinds, or of a kind and a switch, of the model's own fields that is refused though each is fine."""
    spec = dataclasses.replace(spec, n_layers=2)
    choices = [c for c in _choices(spec) if _refused(spec, c) is None]
    found = []
    for i, one in enumerate(choices):
        for other in choices[i + 1 :]:
            if one[0] == other[0] or not (_has_a_say(one[1]) or _has_a_say(other[1])):
                continue
            reason = _refused(spec, one, other)
            if reason:
                found.append(Refusal(_word(one), _word(other), bare(reason)))
    return found


def _choices(spec: GPT) -> Iterator[tuple[str, Any]]:
    for name, (annotation, _) in fields(GPT).items():
        base, value = part_of(annotation), getattr(spec, name)
        if base is not None:
            for kind in base.kinds.values():
                part = Place(name).usual(kind, spec)
                if part != value:
                    yield name, part
        elif isinstance(value, bool) or "bool" in str(annotation):
            yield name, not value


def _has_a_say(value: Any) -> bool:
    """Whether a value could refuse another: kinds that inherit `refuses` unchanged say nothing."""
    if not isinstance(value, Part):
        return True
    base = registry_of(type(value))
    return getattr(type(value), "refuses", None) is not getattr(base, "refuses", None)


def _refused(spec: GPT, *choices: tuple[str, Any]) -> str | None:
    try:
        dataclasses.replace(spec, **dict(choices))
    except ConfigError as error:
        return str(error)
    return None


def _word(choice: tuple[str, Any]) -> str:
    name, value = choice
    return f"{name}={kind_of(value) if isinstance(value, Part) else str(value).lower()}"
