"""Config trees of frozen dataclasses from plain data, and back.

Standard library only, so that it travels with an exported model. `build` turns dicts, lists, names and numbers (from
YAML, JSON or the command line) into a typed tree and names the dotted key of whatever does not fit; `plain` is its
inverse. A *part* is a choice among kinds: its name alone, or a mapping with `kind` and that part's own options.
"""

from __future__ import annotations

import dataclasses as dc
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be: the message says which key, what was given and what would do."""


class Part:
    """Base of a registry of kinds.

    Each direct subclass (`class Norm(Part)`) owns one registry, filled at the end of its file:
    `Norm.kinds = {"rmsnorm": RMSNorm, ...}`. Every kind is a frozen dataclass that derives from it.
    """

    kinds: typing.ClassVar[dict[str, type]]
    of_word: typing.ClassVar[Any] = None  # where any other word means something too (a path): word -> part


class Raw(str):
    """A scalar as it was typed (`out=007`): a `str` field takes the text, every other type the parsed `value`."""

    value: Any

    def __new__(cls, text: str, value: Any) -> Raw:
        self = super().__new__(cls, text)
        self.value = value
        return self


def near(word: object, words: Iterable[object]) -> str:
    """The end of an error: the nearest right word, or all of them when none is near."""
    known = [str(w) for w in words]
    close = difflib.get_close_matches(str(word), known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(known)}"


@functools.cache
def fields(cls: type) -> dict[str, tuple[Any, dc.Field]]:
    """name -> (resolved type, dataclass field), in order, of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], f) for f in dc.fields(cls)}


def registry_of(cls: type) -> type[Part] | None:
    """The class that owns the registry a part belongs to (`RMSNorm` -> `Norm`); None for what is no part."""
    return next((base for base in cls.__mro__ if Part in base.__bases__), None)


def part_of(tp: Any) -> type[Part] | None:
    """The registry class inside an annotation (`Norm`, `Norm | tuple[Norm, ...]`, `Norm | None`), if there is one."""
    if isinstance(tp, type) and issubclass(tp, Part):
        return registry_of(tp)
    return next((found for arg in typing.get_args(tp) if (found := part_of(arg)) is not None), None)


def kind_of(part: Part) -> str:
    """The registered name of a part."""
    base = registry_of(type(part))
    assert base is not None
    return next(name for name, cls in base.kinds.items() if cls is type(part))


def join(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


def build(tp: Any, value: Any, at: str = "") -> Any:
    """`value` (dict, list, name, number) as type `tp`.

    tp: a dataclass, a Part registry, a builtin scalar, Literal, list/tuple, dict, Any or a union of these.
    at: the dotted key of `value`, for messages. Raises ConfigError.
    """
    if tp is Any:
        return value.value if isinstance(value, Raw) else value
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin in (types.UnionType, typing.Union):
        return _build_union(args, value, at)
    if origin is typing.Literal:
        value = value.value if isinstance(value, Raw) and value.value in args else value
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in args):
            raise ConfigError(f"{at}={_shown(value)}{near(value, args)}")
        return next(a for a in args if a == value)
    if origin in (list, tuple):
        return _build_sequence(origin, args, value, at)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{at}={_shown(value)} is no mapping")
        return {build(args[0], k, at): build(args[1], v, join(at, str(k))) for k, v in value.items()}
    if isinstance(tp, type) and issubclass(tp, Part) and not isinstance(value, tp):
        tp, value = _kind(tp, value, at)
    if dc.is_dataclass(tp) and isinstance(tp, type):
        return value if isinstance(value, tp) else _build_dataclass(tp, value, at)
    return _build_scalar(tp, value, at)


def plain(x: Any) -> Any:
    """The inverse of `build`: dicts, lists and scalars; a part becomes {"kind": name, **options}."""
    if dc.is_dataclass(x) and not isinstance(x, type):
        tree = {name: plain(getattr(x, name)) for name in fields(type(x))}
        return {"kind": kind_of(x), **tree} if isinstance(x, Part) else tree
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(item) for item in x]
    return x


def flatten(tree: Any, at: str = "") -> dict[str, Any]:
    """A plain tree as {dotted key: scalar or list}; a part's own name stands at its key, not at `key.kind`.

    >>> flatten({"optim": {"lr": 0.1}, "norm": {"kind": "rmsnorm", "eps": 1e-6}})
    {'optim.lr': 0.1, 'norm': 'rmsnorm', 'norm.eps': 1e-06}
    """
    if isinstance(tree, dict):
        out: dict[str, Any] = {}
        for k, v in tree.items():
            out.update({at: v} if k == "kind" and at and isinstance(v, str) else flatten(v, join(at, str(k))))
        return out
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        return {k: v for i, item in enumerate(tree) for k, v in flatten(item, f"{at}[{i}]").items()}
    return {at: tree}


def _shown(value: Any) -> str:
    return repr(str(value)) if isinstance(value, Raw) else repr(value)


def _kind(tp: type[Part], value: Any, at: str) -> tuple[type, Any]:
    """The class a part's mapping or name asks for, and its options."""
    if not isinstance(value, (str, dict)):
        raise ConfigError(f"{at}={_shown(value)}: a name or a mapping with `kind` is needed")
    if dc.is_dataclass(tp) and isinstance(value, dict) and "kind" not in value:
        return tp, value
    base = registry_of(tp)
    assert base is not None
    options = {"kind": str(value)} if isinstance(value, str) else dict(value)
    kind = options.pop("kind", None)
    if kind is None:
        raise ConfigError(f"{join(at, 'kind')} is required; there is {', '.join(base.kinds)}")
    if kind not in base.kinds and base.of_word is not None:
        part = base.of_word(kind)
        options = {**plain(part), **options}
        kind = options.pop("kind")
    if kind not in base.kinds:
        raise ConfigError(f"{_is(at, repr(kind))} does not exist{near(kind, base.kinds)}")
    if not issubclass(base.kinds[kind], tp):
        fit = [name for name, cls in base.kinds.items() if issubclass(cls, tp)]
        raise ConfigError(f"{_is(at, repr(kind))} cannot stand there{near(kind, fit)}")
    return base.kinds[kind], options


def _is(at: str, word: str) -> str:
    return f"{at}={word}" if at else word


def _no_option(tp: type, key: str, at: str) -> str:
    """What is wrong with an option that `tp` has not, in the words of the one who typed it."""
    known = fields(tp)
    base = registry_of(tp) if issubclass(tp, Part) else None
    if base is None:
        return (
            f"{at} has no option {key!r}{near(key, known)}" if at else f"there is no option {key!r}{near(key, known)}"
        )
    kind = next((name for name, cls in base.kinds.items() if cls is tp), "")
    said = f"{_is(at, kind) if kind else at} has no option {key!r}"
    having = [name for name, cls in base.kinds.items() if dc.is_dataclass(cls) and key in fields(cls)]
    if not having:
        return said + (near(key, known) if known else "; it has none")
    more = f" and {len(having) - 3} more" if len(having) > 3 else ""
    has = "has" if len(having) == 1 else "have"
    own = f"it has {', '.join(known)}" if known else "it has none"
    return f"{said}; {own}; {_is(at, ', '.join(having[:3]))}{more} {has} it"


def _build_dataclass(tp: type, value: Any, at: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{at}={_shown(value)}: a mapping is needed, of {', '.join(fields(tp))}")
    known = fields(tp)
    for key in value:
        if key not in known:
            raise ConfigError(_no_option(tp, str(key), at))
    for key, (_, f) in known.items():
        if key not in value and f.default is dc.MISSING and f.default_factory is dc.MISSING:
            raise ConfigError(f"{join(at, key)} is required")
    built = {key: build(known[key][0], v, join(at, key)) for key, v in value.items()}
    try:
        return tp(**built)
    except ConfigError:
        raise
    except ValueError as error:  # a __post_init__ refused
        raise ConfigError(f"{at}: {error}" if at else str(error)) from None


def _build_union(args: tuple[Any, ...], value: Any, at: str) -> Any:
    """The first member that takes the value without changing its nature, else the first that takes it at all."""
    bare = value.value if isinstance(value, Raw) else value
    if (
        bare is None
        and type(None) in args
        and not (isinstance(value, Raw) and value and str in args and value.isspace())
    ):
        return None  # but white space that was typed is a text: a separator of two line breaks
    members = [a for a in args if a is not type(None)]
    if len(members) > 1:
        is_list = isinstance(bare, (list, tuple))
        members.sort(key=lambda a: (typing.get_origin(a) in (list, tuple)) != is_list)
        exact = [a for a in members if isinstance(a, type) and type(bare) is a]
        members = exact + [a for a in members if a not in exact]
    errors = []
    for member in members:
        try:
            return build(member, value, at)
        except ConfigError as error:
            errors.append(error)
    # An error deeper in the tree says more than "is no int".
    raise max(errors, key=lambda e: (isinstance(bare, dict), -errors.index(e)))


def _build_sequence(origin: type, args: tuple[Any, ...], value: Any, at: str) -> Any:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if origin is tuple and args and args[-1] is not ...:
        if len(args) != len(items):
            raise ConfigError(f"{at}={_shown(value)}: {len(args)} values are needed")
        each: Iterable[Any] = args
    else:
        each = (args[0],) * len(items)
    built = [build(a, v, f"{at}[{i}]") for i, (a, v) in enumerate(zip(each, items, strict=True))]
    return tuple(built) if origin is tuple else built


def _build_scalar(tp: Any, value: Any, at: str) -> Any:
    if tp is str:
        if isinstance(value, str):
            return str(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{at}={_shown(value)} is no text")
        return str(value)
    bare = value.value if isinstance(value, Raw) else value
    wrong = (
        isinstance(bare, bool) != (tp is bool)
        or not isinstance(bare, (bool, int, float))
        or (tp is int and isinstance(bare, float) and not (math.isfinite(bare) and bare.is_integer()))
    )
    if wrong or tp not in (bool, int, float):
        names = {bool: "true or false", int: "whole number", float: "number"}
        raise ConfigError(f"{at}={_shown(value)} is no {names.get(tp, getattr(tp, '__name__', tp))}")
    if not math.isfinite(bare):
        raise ConfigError(f"{at}={_shown(value)} is no finite number")
    return tp(bare)
