"""What is in the registries: every kind with formula, source, options, limits and hardware cost."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import models.families  # noqa: F401  a user's own parts, named in NOVELLA_IMPORTS, are in the catalogue too
from models.catalogue.costs import MEASURES, Setting
from models.cost import Ops
from models.gpt.config import GPT
from models.loss import Objective
from models.optim.groups import Optim
from models.optim.schedule import Schedule
from models.spec import ConfigError, Part, fields, kind_of, near, part_of, registry_of

TRAINING: dict[type[Part], tuple[str, str]] = {  # registries of training and not of a model: setting, what it does
    Objective: ("loss", "what is minimised at each token"),
    Schedule: ("schedule", "the learning rate over a run, as a share of its peak"),
    Optim: ("optim", "what turns gradients into updates"),
}


@dataclass(frozen=True)
class Place:
    """Where a part can stand: a field of a model, or of a kind of another part.

    holder: the kind whose field it is, None for the model itself.  outer: where that kind stands.
    """

    field: str
    holder: type | None = None
    outer: Place | None = None

    @property
    def sort(self) -> type[Part]:
        """The registry of what stands there."""
        base = part_of(fields(self.holder or GPT)[self.field][0])
        assert base is not None
        return base

    def put(self, part: Any, spec: GPT) -> GPT:
        """The model with the part there; kinds on the way have their defaults. Raises ConfigError."""
        if self.holder is None or self.outer is None:
            return dataclasses.replace(spec, **{self.field: part})
        return self.outer.put(dataclasses.replace(self.outer.usual(self.holder, spec), **{self.field: part}), spec)

    def usual(self, kind: type, spec: GPT) -> Any:
        """The kind with its defaults, heads as in the model; its small form where it has no defaults that do."""
        heads = {"n_heads": spec.attention.n_heads} if "n_heads" in fields(kind) else {}  # type: ignore[union-attr]
        try:
            return kind(**heads)
        except ConfigError:
            return kind.small()  # type: ignore[attr-defined]

    def path(self) -> str:
        """`attention.softmax`."""
        return self.field if self.outer is None else f"{self.outer.path()}.{self.field}"


@dataclass(frozen=True)
class Option:
    """One option of a kind, as people read it."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Kind:
    """One kind of part.

    text: what the docstring says besides formula, source and options.
    parameters, ops: at the catalogue's setting; None where this registry costs nothing at run time.
    limits: what it refuses, in words.
    """

    name: str
    cls: type
    formula: str
    source: str
    text: tuple[str, ...]
    options: tuple[Option, ...]
    parameters: int | None = None
    ops: Ops | None = None
    limits: tuple[str, ...] = ()


@dataclass
class Registry:
    """All kinds of one sort of part.

    places: dotted names under which it stands in a config, with the kinds it is an option of; what it does there.
    unit: what the costs are of, in words; empty: none are counted.
    """

    name: str
    cls: type[Part]
    places: list[tuple[str, str]] = field(default_factory=list)
    unit: str = ""
    kinds: list[Kind] = field(default_factory=list)


def places() -> list[Place]:
    """Everywhere a part can stand in a GPT. A sort of part that stands in many places is opened at the first one."""
    found = [Place(name) for name, (annotation, _) in fields(GPT).items() if part_of(annotation)]
    opened: set[type[Part]] = set()
    for place in found:  # which grows
        base = place.sort
        if base not in opened:
            opened.add(base)
            for cls in base.kinds.values():
                found += [Place(name, cls, place) for name, (inner, _) in fields(cls).items() if part_of(inner)]
    return found


def registries() -> tuple[dict[type[Part], Place], dict[type[Part], dict[str, list[type]]]]:
    """Every registry that GPT's fields reach: where it stands first, and all its dotted places with their holders."""
    first: dict[type[Part], Place] = {}
    everywhere: dict[type[Part], dict[str, list[type]]] = {}
    for place in places():
        first.setdefault(place.sort, place)
        holders = everywhere.setdefault(place.sort, {}).setdefault(place.path(), [])
        holders += [place.holder] if place.holder is not None else []
    return first, everywhere


def kind_name(cls: type) -> str:
    base = registry_of(cls)
    assert base is not None
    return next(name for name, kind in base.kinds.items() if kind is cls)


def snake(name: str) -> str:
    """`QKNorm` -> `qk_norm`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def collect(setting: Setting, only: str | None = None, with_limits: bool = True) -> list[Registry]:
    """The catalogue, registries in the order in which a GPT names them.

    with_limits: whether to look for what each kind refuses, which takes seconds.  Raises ConfigError for an unknown
    `only`.
    """
    from models.catalogue.limits import limits

    first, everywhere = registries()
    all_of = {snake(cls.__name__): cls for cls in (*first, *TRAINING)}
    if only is not None and only not in all_of:
        raise ConfigError(f"--kind {only}: there are no such parts{near(only, all_of)}")
    spec = setting.spec()
    two = dataclasses.replace(spec, n_layers=2)  # enough for every limit, and quicker to check
    found = []
    for name, cls in all_of.items():
        if only not in (None, name):
            continue
        registry = Registry(name, cls, unit=MEASURES[name].unit if name in MEASURES else "")
        if cls in everywhere:
            registry.places = [shown(path, holders) for path, holders in everywhere[cls].items()]
        else:
            key, words = TRAINING[cls]
            registry.places = [(f"`{key}` of pipelines.train", words)]
        for kind, part in cls.kinds.items():
            entry = describe(kind, part)
            own = costs(name, part, first.get(cls), spec)
            refused = limits(part, first.get(cls), two) if with_limits else ()
            registry.kinds.append(dataclasses.replace(entry, parameters=own[0], ops=own[1], limits=refused))
        found.append(registry)
    return found


def shown(path: str, holders: list[type]) -> tuple[str, str]:
    """`model.attention.softmax` of causal, mla; and what it does there."""
    name = path.rpartition(".")[2]
    where = f"`model.{path}`" + (f" of {', '.join(map(kind_name, holders))}" if holders else "")
    return where, meanings(holders[0] if holders else GPT).get(name, "")


def costs(name: str, cls: type, place: Place | None, spec: GPT) -> tuple[int | None, Ops | None]:
    """Parameters and operations of one kind with its defaults."""
    if name not in MEASURES or place is None:
        return None, None
    return MEASURES[name].of(place.usual(cls, spec), spec)


# ---- docstrings


def describe(name: str, cls: type) -> Kind:
    """A kind as its docstring and fields say it."""
    all_paragraphs = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    paragraphs = [" ".join(p.split()) for p in all_paragraphs if p.split(":")[0] not in fields(cls)]
    sources: list[str] = []
    kept = []
    for paragraph in paragraphs:
        rest, source = without_source(paragraph)
        sources += [source] if source else []
        kept += [rest] if rest else []
    return Kind(name, cls, kept[0] if kept else "", "; ".join(sources), tuple(kept[1:]), tuple(options(cls)))


def without_source(text: str) -> tuple[str, str]:
    """A paragraph without its sentence about the source, and that sentence."""
    match = re.search(r"Sources?(?: of the idea| for [^:]{1,20})?: (.+?)(?<!\b[A-Z])(?<!et al)\.(?= |$)", text)
    if match is None:
        return text, ""
    return " ".join((text[: match.start()] + text[match.end() :]).split()), match.group(1)


def options(cls: type) -> Iterator[Option]:
    said = meanings(cls)
    for name, (annotation, f) in fields(cls).items():
        default: Any = f.default if f.default is not dataclasses.MISSING else None
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        yield Option(name, type_words(annotation), default_words(default), said.get(name, ""))


def meanings(cls: type) -> dict[str, str]:
    """Option -> what docstrings say of it, ancestors' first."""
    said: dict[str, str] = {}
    for ancestor in reversed(cls.__mro__):
        current = None
        for line in inspect.cleandoc(ancestor.__dict__.get("__doc__") or "").splitlines():
            match = re.match(r"(\w+): (.+)$", line)
            if match:
                current = match.group(1)
                said[current] = match.group(2)
            elif current and line.startswith("  "):
                said[current] += " " + line.strip()
            else:
                current = None
    return said


def default_words(value: Any) -> str:
    if isinstance(value, Part):
        return kind_of(value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list)):
        return ", ".join(default_words(v) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = ((name, getattr(value, name)) for name in fields(type(value)))
        return "{" + ", ".join(f"{name}: {default_words(v)}" for name, v in inside if v is not None) + "}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def type_words(annotation: Any) -> str:
    """`float | None` -> `number or none`."""
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        words = [type_words(a) for a in args if a is not type(None) and typing.get_origin(a) is not tuple]
        text = " or ".join(words + (["none"] if type(None) in args else []))
        return text + (", or a list of them" if any(typing.get_origin(a) is tuple for a in args) else "")
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(map(str, args))
    if typing.get_origin(annotation) in (tuple, list):
        return f"list of {type_words(args[0])}s"
    base = part_of(annotation)
    if base is not None:
        return f"kind of {snake(base.__name__)}"
    if dataclasses.is_dataclass(annotation):
        return "mapping"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(annotation, str(annotation))
