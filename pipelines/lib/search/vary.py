"""Reads the `vary:` section of a search file into entries and branches, and refuses what cannot be meant.

One sweep is a mapping; a list of mappings is a union of independent sweeps. In a sweep, `dotted.key: X` where X is
    a scalar                          one value; `null` is the value null, `default` leaves the key to the recipe
    a list                            options; an item that is itself a list is one value (one entry per layer)
    {kind: K, option: X, ...}         a part; its options are keys of their own, `key.option`, and may vary likewise
    {range: {start, end, step}}       both ends included, exact decimals; step 1 between whole numbers, else 0.1
    {uniform | log_uniform | integer | log_integer: [low, high]}      an interval, for rules that draw
    {increment | factor: x, times: n, low: a, high: b}                steps, for the greedy rule
    {conditions: C, options: X}       X where C is true, else the key is left unset. C: a mapping or a list of
                                      [key, value] pairs (all must hold), or a list of mappings (one must). A list as
                                      the value: any of these; `default`: the key is unset. Conditions are tried after
                                      all other keys, in the order written, so that later ones see earlier results.
and these words:
    common_group                      single values that hold everywhere and stand nowhere else
    parameter_groups                  a list of mappings, each laid over this one and expanded on its own; may nest
    named_static_groups,              lists of mappings with a name under `named_group`: of one configuration, or of
    named_variation_groups            several; they may use one another
    named_group_static,               the names of groups to merge in: static ones; any, as a product;
    named_group_variations,           or one at a time
    named_group_alternates
    named_group_settings              plain keys, as if they stood beside it
    aliases                           {short: dotted.key}
A key that stands twice, in groups that are merged, must say the same each time.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from models.spec import near
from pipelines.lib.config import InputError
from pipelines.lib.search.domains import Domain, Interval, Options, Steps, decimals, is_number, same

TOP = ("aliases", "common_group", "named_static_groups", "named_variation_groups")
USES = ("named_group_static", "named_group_variations", "named_group_alternates")
WORDS = (*TOP, *USES, "named_group_settings", "parameter_groups")
INTERVALS = {
    "uniform": (False, False),
    "log_uniform": (True, False),
    "integer": (False, True),
    "log_integer": (True, True),
}
DOMAINS = ("range", *INTERVALS, "increment", "factor")
KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class Option:
    """One value of a key. written: as in the file.  inner: for a part, the entries of its options."""

    value: Any
    written: Any
    inner: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class Clause:
    """Keys and the values any of which will do; true when all keys hold. where: as written, for errors."""

    holds: tuple[tuple[str, tuple[Any, ...]], ...]
    where: str


@dataclass(frozen=True)
class Entry:
    """A key and what it may be.

    domain: what a rule chooses from; for parts of which two have the same kind, Options holds them as written
    options: for Options, what each choice sets
    when: None, or the key is set only where one of these clauses is true
    text: as written; entries with equal texts are the same
    """

    key: str
    text: str
    domain: Domain = field(compare=False)
    options: tuple[Option, ...] = field(default=(), compare=False)
    when: tuple[Clause, ...] | None = field(default=None, compare=False)

    @property
    def is_single(self) -> bool:
        return len(self.options) == 1 and all(e.is_single for e in self.options[0].inner)


@dataclass(frozen=True)
class Branch:
    """A choice among groups. key: what a rule hears of it, starting with @.  names: of the groups."""

    key: str
    names: tuple[Any, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Node:
    """A mapping: its entries, and the branches below it."""

    entries: tuple[Entry, ...] = ()
    branches: tuple[Branch, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """common: entries of common_group.  clauses: of all conditions."""

    common: tuple[Entry, ...]
    node: Node
    clauses: tuple[Clause, ...]


def read_sweeps(tree: Any, where: str) -> tuple[Sweep, ...]:
    """The sweeps of a `vary:` section (plain data). where: its place, for errors. Raises InputError."""
    if isinstance(tree, dict):
        return (_Reader(where, "").sweep(tree),)
    if not isinstance(tree, list) or not tree or not all(isinstance(t, dict) for t in tree):
        raise InputError(f"{where}: a mapping, or a list of mappings, is needed")
    if len(tree) == 1:
        return read_sweeps(tree[0], where)
    return tuple(_Reader(f"{where}[{i}]", f"sweep{i}.").sweep(t) for i, t in enumerate(tree))


class _Reader:
    """Reads one sweep. at: what its branches' keys begin with, so that two sweeps do not share one."""

    def __init__(self, where: str, at: str) -> None:
        self.where, self.at = where, at
        self.aliases: dict[str, str] = {}
        self.groups: dict[str, tuple[str, dict]] = {}  # name -> (word that defines it, keys)
        self.read: dict[str, Node] = {}  # named groups read so far
        self.used_aliases: set[str] = set()
        self.clauses: dict[str, Clause] = {}
        self.path: list[str] = []  # named groups being read, to see cycles

    def fail(self, text: str) -> InputError:
        return InputError(f"{self.where}: {text}")

    def sweep(self, tree: dict) -> Sweep:
        self._read_aliases(tree.get("aliases", {}))
        self._define(tree)
        common = self._common(tree.get("common_group", {}))
        node = self._node({k: v for k, v in tree.items() if k not in TOP}, "")
        if unused := [name for name in self.groups if name not in self.read]:
            raise self.fail(f"named group {unused[0]!r} is never used; name it in {', '.join(USES)}, or remove it")
        if idle := [a for a in self.aliases if a not in self.used_aliases]:
            raise self.fail(f"alias {idle[0]!r} is never used; remove it")
        return Sweep(common, node, tuple(self.clauses.values()))

    def _read_aliases(self, aliases: Any) -> None:
        if not isinstance(aliases, dict) or not all(isinstance(v, str) and KEY.fullmatch(v) for v in aliases.values()):
            raise self.fail("aliases: a mapping of short name to dotted key is needed")
        for alias in aliases:
            if alias in WORDS or not re.fullmatch(r"\w+", str(alias)):
                raise self.fail(f"aliases: {alias!r} cannot be a short name; use letters, digits and _")
        self.aliases = aliases

    def _define(self, tree: dict) -> None:
        for word in ("named_static_groups", "named_variation_groups"):
            for group in self._list_of_mappings(tree.get(word, []), word):
                name = group.get("named_group")
                if not isinstance(name, str):
                    raise self.fail(f"{word}: every group needs its name under `named_group`")
                if name in self.groups:
                    raise self.fail(f"named group {name!r} stands twice")
                self.groups[name] = (word, {k: v for k, v in group.items() if k != "named_group"})

    def _list_of_mappings(self, value: Any, word: str) -> list[dict]:
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise self.fail(f"{word}: a list of mappings is needed")
        return value

    def _common(self, tree: Any) -> tuple[Entry, ...]:
        if not isinstance(tree, dict):
            raise self.fail("common_group: a mapping is needed")
        entries = []
        for word, raw in tree.items():
            entry = self._entry(self._key(word), raw)
            if not entry.is_single or entry.when is not None:
                raise self.fail(f"common_group: {word} must have a single value; let it vary outside of common_group")
            entries.append(entry)
        return tuple(entries)

    def _node(self, tree: dict, at: str) -> Node:
        """at: what stands above it, for the keys of branches."""
        entries: dict[str, Entry] = {}
        branches: list[Branch] = []
        for word, value in tree.items():
            if word in TOP:
                raise self.fail(f"{word} stands at the top of a sweep, not inside a group")
            if word == "parameter_groups":
                groups = self._list_of_mappings(value, word)
                if not groups:
                    raise self.fail("parameter_groups: an empty list leaves nothing to try")
                nodes = tuple(self._node(g, f"{at}group{i}.") for i, g in enumerate(groups))
                branches.append(Branch(f"@{self.at}{at}{word}", tuple(range(len(nodes))), nodes))
            elif word == "named_group_alternates":
                names = self._names(value, word)
                nodes = tuple(self._group(name) for name in names)
                branches.append(Branch(f"@{self.at}{at}{word}", names, nodes))
            elif word in USES:
                for name in self._names(value, word):
                    node = self._static(name) if word == "named_group_static" else self._group(name)
                    for entry in node.entries:
                        self._add(entries, entry)
                    branches += [b for b in node.branches if b not in branches]
            elif word == "named_group_settings":
                if not isinstance(value, dict):
                    raise self.fail(f"{word}: a mapping is needed")
                for key, raw in value.items():
                    self._add(entries, self._entry(self._key(key), raw))
            else:
                self._add(entries, self._entry(self._key(word), value))
        return Node(tuple(entries.values()), tuple(branches))

    def _add(self, entries: dict[str, Entry], entry: Entry) -> None:
        merge(entries, entry, self.where)

    def _names(self, value: Any, word: str) -> tuple[str, ...]:
        names = value if isinstance(value, list) else [value]
        if not names:
            raise self.fail(f"{word}: an empty list names no group")
        for name in names:
            if not isinstance(name, str) or name not in self.groups:
                what = near(name, self.groups) if self.groups else "; none is defined"
                raise self.fail(f"{word}: there is no named group {name!r}{what}")
        return tuple(names)

    def _group(self, name: str) -> Node:
        if name in self.path:
            raise self.fail(f"named groups lead in a circle: {' -> '.join((*self.path, name))}")
        if name not in self.read:
            self.path.append(name)
            node = self._node(self.groups[name][1], f"{name}.")
            self.path.pop()
            if self.groups[name][0] == "named_static_groups":
                self._check_static(name, node)
            self.read[name] = node
        return self.read[name]

    def _check_static(self, name: str, node: Node) -> None:
        varies = [e.key for e in node.entries if not e.is_single] + [b.key[1:] for b in node.branches]
        if varies:
            raise self.fail(
                f"static group {name!r} must have exactly one configuration, but {varies[0]} varies; "
                "move it to named_variation_groups"
            )

    def _static(self, name: str) -> Node:
        if self.groups[name][0] != "named_static_groups":
            raise self.fail(f"named_group_static: {name!r} is a variation group; use named_group_variations")
        return self._group(name)

    def _key(self, word: Any) -> str:
        if word in self.aliases:
            self.used_aliases.add(word)
            return self.aliases[word]
        if not isinstance(word, str) or not KEY.fullmatch(word):
            raise self.fail(f"{word!r} is no dotted key, such as model.d_model")
        if close := difflib.get_close_matches(word, (*WORDS, "named_group"), 1, 0.8):
            hint = f"did you mean {close[0]!r}?" if close[0] != word else "a name belongs to a named group only"
            raise self.fail(f"there is no word {word!r} in a sweep; {hint}")
        if word == "kind" or word.endswith(".kind"):
            raise self.fail(f"{word}: a part is chosen by its own key; write {word.removesuffix('.kind')!r}")
        return word

    def _entry(self, key: str, raw: Any) -> Entry:
        when = None
        text = json.dumps(raw, sort_keys=True, default=str)
        if isinstance(raw, dict) and {"conditions", "options"} & set(raw):
            if set(raw) != {"conditions", "options"}:
                wrong = next(iter(set(raw) ^ {"conditions", "options"}))
                raise self.fail(f"{key}: {wrong!r}: a conditional key has `conditions` and `options`, and no more")
            when = self._conditions(key, raw["conditions"])
            raw = raw["options"]
        if isinstance(raw, dict) and (words := [w for w in DOMAINS if w in raw]):
            domain = self._domain(key, raw, words[0])
            domain.check(f"{self.where}: {key}")
            if not isinstance(domain, Options):
                return Entry(key, text, domain, (), when)
        options: list[Option] = []
        for item in raw if isinstance(raw, list) else [raw]:
            options += self._options(key, item)
        kinds = [o.value for o in options]
        domain = Options(tuple(o.written if sum(same(o.value, k) for k in kinds) > 1 else o.value for o in options))
        domain.check(f"{self.where}: {key}")
        return Entry(key, text, domain, tuple(options), when)

    def _options(self, key: str, item: Any) -> list[Option]:
        """What one item of a list of options stands for."""
        if isinstance(item, list):
            value = self._literal(key, item)
            return [Option(value, value)]
        if not isinstance(item, dict):
            return [Option(item, item)]
        if "kind" in item:
            return self._parts(key, item)
        if "range" in item:
            domain = self._domain(key, item, "range")
            assert isinstance(domain, Options)
            return [Option(v, v) for v in domain.values]
        if "conditions" in item:
            raise self.fail(f"{key}: conditions stand at the key itself, not at one of its options")
        if words := [w for w in DOMAINS if w in item]:
            raise self.fail(f"{key}: {words[0]} cannot stand in a list of options; give it alone")
        word = next(iter(item), "")
        raise self.fail(f"{key}: a mapping is a part (`kind`) or a domain; {word!r}{near(word, ('kind', *DOMAINS))}")

    def _parts(self, key: str, item: dict) -> list[Option]:
        kinds = item["kind"] if isinstance(item["kind"], list) else [item["kind"]]
        inner = []
        for name, raw in item.items():
            if name == "kind":
                continue
            entry = self._entry(f"{key}.{name}", raw)
            if entry.when is not None:
                raise self.fail(f"{entry.key}: conditions stand at a key of its own, {entry.key!r}, not inside a part")
            inner.append(entry)
        for kind in kinds:
            if not isinstance(kind, str):
                raise self.fail(f"{key}: kind={kind!r} is no name")
        return [Option(kind, {**item, "kind": kind} if inner else kind, tuple(inner)) for kind in kinds]

    def _literal(self, key: str, value: Any) -> Any:
        """A list that is one value; the parts in it are plain."""
        if isinstance(value, list):
            return [self._literal(key, v) for v in value]
        if isinstance(value, dict):
            if "kind" not in value:
                word = next(iter(value), "")
                raise self.fail(
                    f"{key}: {word!r} in a list inside a list, which is one value: only parts may stand there"
                )
            return {k: self._literal(key, v) for k, v in value.items()}
        return value

    def _domain(self, key: str, raw: dict, word: str) -> Domain:
        allowed: tuple[str, ...] = (word,)
        if word in ("increment", "factor"):
            allowed = (word, "times", "low", "high")
        if extra := [w for w in raw if w not in allowed]:
            raise self.fail(f"{key}: {extra[0]!r} does not belong beside {word!r}{near(extra[0], allowed)}")
        if word in ("increment", "factor"):
            return Steps(raw[word], raw.get("times", 1), raw.get("low"), raw.get("high"), word == "factor")
        if word == "range":
            return self._range(key, raw[word])
        ends = raw[word]
        if not isinstance(ends, list) or len(ends) != 2:
            raise self.fail(f"{key}: {word} needs [low, high]")
        return Interval(ends[0], ends[1], *INTERVALS[word])

    def _range(self, key: str, ends: Any) -> Options:
        if not isinstance(ends, dict) or not {"start", "end"} <= set(ends) <= {"start", "end", "step"}:
            raise self.fail(f"{key}: range needs {{start: a, end: b, step: c}}")
        if not all(is_number(v) for v in ends.values()):
            raise self.fail(f"{key}: range needs numbers")
        whole = isinstance(ends["start"], int) and isinstance(ends["end"], int)
        try:
            return Options(decimals(ends["start"], ends["end"], ends.get("step", 1 if whole else 0.1)))
        except InputError as error:
            raise self.fail(f"{key}: range: {error}") from None

    def _conditions(self, key: str, raw: Any) -> tuple[Clause, ...]:
        """Both forms: a mapping or [key, value] pairs (all hold); a list of mappings (one of them holds)."""
        alternatives: list[Any]
        if isinstance(raw, dict):
            alternatives = [list(raw.items())]
        elif isinstance(raw, list) and raw and all(isinstance(item, dict) for item in raw):
            alternatives = [list(item.items()) for item in raw]
        elif isinstance(raw, list) and all(isinstance(i, list) and len(i) == 2 and isinstance(i[0], str) for i in raw):
            alternatives = [raw]
        else:
            raise self.fail(f"{key}: conditions are a mapping, a list of mappings, or a list of [key, value] pairs")
        if not all(alternatives):
            raise self.fail(f"{key}: empty conditions")
        clauses = []
        for pairs in alternatives:
            shown = ", ".join(f"{k}: {json.dumps(v, default=str)}" for k, v in pairs)
            holds = tuple((self._key(k), tuple(v) if isinstance(v, list) else (v,)) for k, v in pairs)
            clause = Clause(holds, f"{key}: conditions {{{shown}}}")
            self.clauses[clause.where] = clause
            clauses.append(clause)
        return tuple(clauses)


def merge(entries: dict[str, Entry], entry: Entry, where: str) -> None:
    """Add an entry to those it is merged with. Raises InputError if its key is there and says something else."""
    known = entries.setdefault(entry.key, entry)
    if known != entry:
        raise InputError(f"{where}: {entry.key} is {known.text} and {entry.text} in parts that are merged; keep one")
