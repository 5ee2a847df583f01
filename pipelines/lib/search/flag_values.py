"""The flags of one run of the modular laboratory, with its defaults behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.spec import near
from pipelines.lib.config import InputError
from pipelines.lib.search.flags import FLAGS


class Lacking(Exception):
    """What a run asks for and we have not: the message says what."""


class Flags:
    """The flags of one run, the laboratory's defaults behind them. read: those that were asked for."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given, self.read = given, set[str]()

    def __call__(self, name: str) -> Any:
        """A flag's value, of its default's type. Raises InputError."""
        self.read.add(name)
        default = FLAGS[name].default
        value = self.given.get(name, default)
        if isinstance(default, bool) and not isinstance(value, bool):
            raise InputError(f"{name}={value!r} is neither true nor false")
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            return self.number(name)
        return value

    def number(self, name: str) -> Any:
        """A flag that is a number, a whole one if its default is. Raises InputError."""
        self.read.add(name)
        default = FLAGS[name].default
        value = self.given.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{name}={value!r} is no number")
        if not isinstance(default, int):
            return value
        if value != int(value):
            raise InputError(f"{name}={value} is no whole number")
        return int(value)

    def one_of(self, name: str, known: Mapping[str, Any], lacking: tuple[str, ...] = ()) -> Any:
        """What a name stands for. lacking: names that the laboratory has and we have not. Raises Lacking."""
        value = self(name)
        if value in lacking:
            raise Lacking(f"{name}={value}")
        if not isinstance(value, str) or value not in known:
            raise Lacking(f"{name}={value!r} is none of the laboratory's{near(value, [*known, *lacking])}")
        return known[value]

    def layers(self, name: str, shared: int) -> list[Any]:
        """A flag in each layer: its `_layerlist`, one entry per group of `shared` layers, again from the first."""
        entries = self(f"{name}_layerlist")
        n = self("n_layer")
        if not entries:
            return [self(name)] * n
        entries = entries if isinstance(entries, list) else [entries]
        return [_entry(entries[i // shared % len(entries)]) for i in range(n)]


def _entry(value: Any) -> Any:
    """An entry of a layer list; the laboratory passed them as text."""
    words = {"none": None, "null": None, "": None, "true": True, "yes": True, "on": True, "false": False, "no": False}
    if not isinstance(value, str):
        return value
    return int(value) if value.isdecimal() else words.get(value.lower(), value)


def equal(items: Any) -> bool:
    """Whether all are the same."""
    return all(item == items[0] for item in items)
