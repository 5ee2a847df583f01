"""The space of a search: all settings that its `vary:` section allows, expanded, drawn, named and checked.

`draw` is the one meaning of a space: it asks for one choice after the other (sweep, groups, keys in the order written,
then conditional keys) and sets what follows. `points` walks through all its answers; every rule draws in its own way.
vary.py says how a space is written.
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import itertools
import json
import math
import random
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.spec import Raw, fields, near, part_of
from pipelines.lib.config import InputError, scalar
from pipelines.lib.search.domains import DEFAULT, Domain, Interval, Options, Steps, is_number, merged, same
from pipelines.lib.search.vary import Clause, Entry, Node, Sweep, merge, read_sweeps

__all__ = ["DEFAULT", "Domain", "Interval", "Options", "Space", "Steps", "label", "unknown_keys"]

Choose = Callable[[str, Domain], Any]
MOST_POINTS = 1_000_000  # beyond this a sweep is a mistake
MOST_PATHS = 100_000  # of what conditions read, when it is checked that each can be true


@dataclass(frozen=True)
class Space:
    """What a search may set: `Space.read(tree)` from the plain data of `vary:`."""

    sweeps: tuple[Sweep, ...]
    where: str = "vary"

    @classmethod
    def read(cls, tree: Any, where: str = "") -> Space:
        """Parse `vary:`. where: its place, for errors. Raises InputError that names the key."""
        space = cls(read_sweeps(tree, where or "vary"), where or "vary")
        space._check()
        return space

    def draw(self, choose: Choose) -> dict[str, Any]:
        """One setting. choose(key, domain) is called where there is more than one way to go on, in this order: the
        sweep and its groups (keys that begin with @), keys as written, conditional keys whose conditions hold.

        The same key may come with other domains in other groups. Raises InputError for a choice outside of Options.
        """
        return self._draw(choose, set())

    def sample(self, rng: random.Random) -> dict[str, Any]:
        """One setting at random: groups evenly, then each key by its domain."""
        return self.draw(lambda key, domain: domain.sample(rng))

    def points(self) -> list[dict[str, Any]]:
        """All settings, each once; the last key written varies fastest. Raises InputError where they are not finite."""
        return list(self._distinct()[0])

    @property
    def duplicates(self) -> int:
        """How many more points there would be if equal ones were not left out."""
        return self._distinct()[1]

    @property
    def at_most(self) -> int | None:
        """The number of points before conditions and duplicates, without expanding; None: not finite."""
        counts = [_count(s.node) for s in self.sweeps]
        return None if None in counts else sum(c for c in counts if c is not None)

    def dimensions(self) -> dict[str, Domain]:
        """Every key that may vary, also by being left unset, with all that it may be in any group.

        Parts stand by their kind; their options are dimensions of their own.
        """
        always = [{e.key for e in (*s.common, *s.node.entries) if e.when is None} for s in self.sweeps]
        out = {}
        for key, domains in self.domains().items():
            domain = merged(f"{self.where}: {key}", domains)
            single = isinstance(domain, Options) and len(domain.values) == 1
            if not (single and (all(key in keys for keys in always) or domain == Options((DEFAULT,)))):
                out[key] = domain
        return out

    def keys(self) -> set[str]:
        """Every key it may set, also those with a single value."""
        return set(self.domains())

    def domains(self) -> dict[str, list[Domain]]:
        """What every key may be in each place where it stands, single values too."""
        found: dict[str, list[Domain]] = {}
        for sweep in self.sweeps:
            for entry in (*sweep.common, *_entries(sweep.node)):
                _collect(entry, found)
        return found

    def _draw(self, choose: Choose, true: set[str]) -> dict[str, Any]:
        """As `draw`; the clauses that held are added to `true`, as `sweep number: where`."""
        number = 0
        if len(self.sweeps) > 1:
            number = choose("@sweep", Options(tuple(range(len(self.sweeps)))))
        sweep = self.sweeps[number]
        entries: dict[str, Entry] = {}
        _lay(sweep.node, entries, choose, self.where)
        settings: dict[str, Any] = {}
        for entry in sweep.common:
            if entry.key in entries:
                raise InputError(f"{self.where}: {entry.key} stands in common_group, so it may stand nowhere else")
            self._set(entry, settings, choose)
        for entry in entries.values():
            if entry.when is None:
                self._set(entry, settings, choose)
        for entry in entries.values():
            if entry.when is not None:
                held = [f"{number}: {clause.where}" for clause in entry.when if _holds(clause, settings)]
                true.update(held)
                if held:
                    self._set(entry, settings, choose)
        return _parents_first(settings)

    def _set(self, entry: Entry, settings: dict[str, Any], choose: Choose) -> None:
        key, domain = entry.key, entry.domain
        if key in settings:
            raise InputError(f"{self.where}: {key} is set twice, by its own key and as an option of a part; keep one")
        if not isinstance(domain, Options):
            settings[key] = choose(key, domain)
            return
        option = entry.options[0]
        if len(entry.options) > 1:
            choice = choose(key, domain)
            at = next((i for i, v in enumerate(domain.values) if same(v, choice)), None)
            if at is None:
                raise InputError(f"{self.where}: {key}={choice!r} is not among {list(domain.values)}")
            option = entry.options[at]
        if not same(option.value, DEFAULT):
            settings[key] = option.value
        for inner in option.inner:
            self._set(inner, settings, choose)

    def _distinct(self) -> tuple[list[dict[str, Any]], int]:
        """The points, and how many equal ones were left out."""
        most = self.at_most
        if most is None:
            key, domain = next((k, d) for k, d in self.dimensions().items() if not isinstance(d, Options))
            raise InputError(f"{self.where}: {key}: {domain} has no finite number of values; write a list or a range")
        if most > MOST_POINTS:
            raise InputError(f"{self.where}: expands to as many as {most:,} points; a rule that draws may search it")
        points: dict[str, dict[str, Any]] = {}
        count = 0
        for point in paths(lambda choose: self._draw(choose, set()), _values):
            count += 1
            points.setdefault(_identity(point), point)
        return list(points.values()), count - len(points)

    def _check(self) -> None:
        """Raise InputError for groups that contradict each other and for conditions that can never be true.

        Walks every way through groups and through the values that conditions read; all other values stand for one.
        """
        self.dimensions()
        read: dict[str, list[Any]] = {}
        for clause in (c for s in self.sweeps for c in s.clauses):
            for key, accepted in clause.holds:
                read.setdefault(key, []).extend(accepted)
        entries = [e for s in self.sweeps for e in (*s.common, *_entries(s.node))]
        parts = {e.key for e in entries if any(o.inner for o in e.options)}

        def few(key: str, domain: Domain) -> Sequence[Any]:
            if key.startswith("@") or key in parts:
                return _values(key, domain)
            wanted = read.get(key, [])
            if isinstance(domain, Options):
                rest = [v for v in domain.values if not any(same(v, w) for w in wanted)]
                return [v for v in domain.values if any(same(v, w) for w in wanted)] + rest[:1]
            low, high = domain.low, domain.high
            inside = [w for w in wanted if is_number(w) and (low is None or w >= low) and (high is None or w <= high)]
            return [*inside, 0 if low is None else low]

        true: set[str] = set()
        seen = 0
        for _ in itertools.islice(paths(lambda choose: self._draw(choose, true), few), MOST_PATHS):
            seen += 1
        for number, sweep in enumerate(self.sweeps):
            for clause in sweep.clauses:
                if f"{number}: {clause.where}" not in true and seen < MOST_PATHS:
                    raise InputError(f"{self.where}: {clause.where} can never be true{self._hint(clause)}")

    def _hint(self, clause: Clause) -> str:
        known, dimensions = self.keys(), self.dimensions()
        for key, accepted in clause.holds:
            if key not in known:
                return f"; nothing here sets {key!r}{near(key, known)}"
            domain = dimensions.get(key)
            if isinstance(domain, Options) and not any(same(a, v) for a in (*accepted, DEFAULT) for v in domain.values):
                return f"; {key} is one of {list(domain.values)}"
        return "; a condition sees all plain keys, and the conditional keys written before it"


def _count(node: Node) -> int | None:
    counts = [_count_entry(e) for e in node.entries]
    for branch in node.branches:
        below = [_count(n) for n in branch.nodes]
        counts.append(None if None in below else sum(c for c in below if c is not None))
    return None if None in counts else math.prod(c for c in counts if c is not None)


def _count_entry(entry: Entry) -> int | None:
    if not isinstance(entry.domain, Options):
        return None
    counts = [[_count_entry(e) for e in option.inner] for option in entry.options]
    if any(None in c for c in counts):
        return None
    return sum(math.prod(n for n in c if n is not None) for c in counts)


def _entries(node: Node) -> Iterator[Entry]:
    """All entries of a node and of what is below it."""
    yield from node.entries
    for branch in node.branches:
        for below in branch.nodes:
            yield from _entries(below)


def _collect(entry: Entry, found: dict[str, list[Domain]]) -> None:
    """Add an entry's domain, and those of its part's options, to `found`."""
    domain = entry.domain
    if isinstance(domain, Options):
        domain = merged(entry.key, [Options((o.value,)) for o in entry.options])
    found.setdefault(entry.key, []).append(domain)
    for option in entry.options:
        for inner in option.inner:
            _collect(inner, found)


def _lay(node: Node, entries: dict[str, Entry], choose: Choose, where: str) -> None:
    """Gather the entries of a node and of the groups chosen below it."""
    for entry in node.entries:
        merge(entries, entry, where)
    for branch in node.branches:
        name = branch.names[0] if len(branch.names) == 1 else choose(branch.key, Options(branch.names))
        _lay(branch.nodes[branch.names.index(name)], entries, choose, where)


def _holds(clause: Clause, settings: Mapping[str, Any]) -> bool:
    return all(any(same(settings.get(key, DEFAULT), v) for v in accepted) for key, accepted in clause.holds)


def _parents_first(settings: dict[str, Any]) -> dict[str, Any]:
    """`model.mlp` before `model.mlp.hidden`: laid over a recipe in this order, a part's kind keeps its options."""
    out: dict[str, Any] = {}
    for key in settings:
        words = key.split(".")
        for i in range(1, len(words) + 1):
            parent = ".".join(words[:i])
            if parent in settings:
                out.setdefault(parent, settings[parent])
    return out


def _values(key: str, domain: Domain) -> Sequence[Any]:
    assert isinstance(domain, Options)
    return domain.values


def paths(draw: Callable[[Choose], Any], values: Callable[[str, Domain], Sequence[Any]]) -> Iterator[Any]:
    """The outcome of `draw` for every sequence of choices, the last choice fastest."""
    path: list[int] = []
    while True:
        trail: list[tuple[int, int]] = []

        def choose(key: str, domain: Domain, path: list[int] = path, trail: list[tuple[int, int]] = trail) -> Any:
            choices = values(key, domain)
            at = path[len(trail)] if len(trail) < len(path) else 0
            trail.append((at, len(choices)))
            return choices[at]

        yield draw(choose)
        while trail and trail[-1][0] + 1 == trail[-1][1]:
            trail.pop()
        if not trail:
            return
        path = [at for at, _ in trail]
        path[-1] += 1


def _identity(settings: Mapping[str, Any]) -> str:
    """Equal for equal settings; 1 and 1.0 are equal."""

    def canon(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: canon(v) for k, v in value.items()}
        if isinstance(value, list):
            return [canon(v) for v in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return json.dumps(canon(settings), sort_keys=True)


def label(settings: Mapping[str, Any], dimensions: Mapping[str, Any], most: int = 96) -> str:
    """A short name of settings by what varies: `n_layers=2,lr=0.001`; letters, digits, `._=,+-~`, up to `most` of them.

    dimensions: the keys that vary; the others are left out, as are keys that are unset. Each key is shortened to its
    last words, as many as keep it apart. What cannot be shown whole ends in a hash, so that different settings have
    different names.
    """
    shown = [(key, _short(settings[key])) for key in dimensions if key in settings]
    name = ",".join(f"{_suffix(key, dimensions)}={text or 'x'}" for key, (text, _) in shown) or "base"
    if len(name) <= most and all(whole for _, (_, whole) in shown):
        return name
    digest = hashlib.sha256(_identity({key: settings[key] for key, _ in shown}).encode()).hexdigest()[:8]
    return f"{name[: most - 9]}~{digest}"


def _suffix(key: str, keys: Mapping[str, Any]) -> str:
    words = key.split(".")
    for n in range(1, len(words)):
        end = ".".join(words[-n:])
        if sum(k == end or k.endswith(f".{end}") for k in keys) == 1:
            return end
    return key


def _short(value: Any) -> tuple[str, bool]:
    """The text of a value, and whether it says all."""
    if isinstance(value, (list, tuple)):
        items = [_short(v) for v in value]
        flat = len(items) > 1 and not any(isinstance(v, (list, tuple)) for v in value)
        return "+".join(text for text, _ in items), flat and all(whole for _, whole in items)
    if isinstance(value, str):
        text = re.sub(r"[^\w.-]+", "-", value, flags=re.ASCII)
        return text, text == value != "" and not isinstance(scalar(value), Raw)
    if isinstance(value, dict):
        return str(value.get("kind", "x")), False
    return json.dumps(value).replace("e+", "e"), True


def unknown_keys(space: Space, cls: type) -> list[str]:
    """A line for each key of the space that a config of type `cls` cannot have, and for each kind that no part has.

    The options of every registered kind count as known, whichever kind is chosen.
    """
    errors = []
    for key, domains in sorted(space.domains().items()):
        types: list[Any] = [cls]
        at = ""
        for word in key.split("."):
            known = {name: tp for t in types for name, (tp, _) in fields(t).items()}
            here = [fields(t)[word][0] for t in types if word in fields(t)]
            if not here:
                why = f"{at} has no setting {word!r}" if at else f"there is no setting {word!r}"
                errors.append(f"{key}: {why}{near(word, known) if known else ''}")
                break
            at = f"{at}.{word}" if at else word
            if any(typing.get_origin(tp) is dict for tp in here):
                break  # any word may follow
            types = [t for tp in here for t in _classes(tp)]
        else:
            errors += _unknown_kinds(key, here, domains)
    return errors


def _classes(tp: Any) -> list[type]:
    """The dataclasses whose fields may follow a key of this type."""
    base = part_of(tp)
    if base is not None:
        return list(base.kinds.values())
    return [tp] if dc.is_dataclass(tp) and isinstance(tp, type) else []


def _unknown_kinds(key: str, types: list[Any], domains: Sequence[Domain]) -> list[str]:
    bases = [base for tp in types if (base := part_of(tp)) is not None]
    if not bases or any(base.of_word is not None for base in bases):
        return []
    known = {kind for base in bases for kind in base.kinds}
    errors = []
    for value in (v for d in domains if isinstance(d, Options) for v in d.values):
        for item in value if isinstance(value, list) else [value]:
            kind = item.get("kind") if isinstance(item, dict) else item
            if isinstance(kind, str) and kind != DEFAULT and kind not in known:
                errors.append(f"{key}={kind!r} does not exist{near(kind, known)}")
    return errors
