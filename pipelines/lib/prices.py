"""What an hour of a machine costs: the user's own price, or a table of named machines.

Money is said only where a price is given, or a machine of the table is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.spec import build, fields, near
from pipelines.lib.config import InputError, read_yaml, scalar

if TYPE_CHECKING:
    from pipelines.lib.estimate import Estimate

TABLE = Path(__file__).resolve().parent.parent / "prices.yaml"


@dataclass(frozen=True)
class Machine:
    """A machine that can be rented.

    usd_per_hour: price of the whole machine
    source: where the price was read
    date: when, as YYYY-MM-DD
    gpu: what its GPUs are (null: it has none)
    gpus: how many; a worker takes one
    cpus: CPUs of a machine without GPUs; a worker takes one
    """

    usd_per_hour: float
    source: str
    date: str
    gpu: str | None = None
    gpus: int = 0
    cpus: int = 0


@dataclass(frozen=True)
class Prices:
    """Where the price of an estimate comes from.

    price_per_hour: USD for an hour of everything the work runs on
    machine: a machine of the table
    prices: another table (YAML: name -> usd_per_hour, source, date, gpu, gpus, cpus)
    """

    price_per_hour: float | None = None
    machine: str | None = None
    prices: str | None = None

    def __post_init__(self) -> None:
        if self.price_per_hour is not None and not self.price_per_hour >= 0:
            raise ValueError(f"price_per_hour={self.price_per_hour} is negative")
        if self.price_per_hour is not None and (self.machine or self.prices):
            raise ValueError("give price_per_hour, or machine and prices; not both")
        if self.prices is not None and self.machine is None:
            raise ValueError("prices= is a table of machines; give machine= too")

    def table(self) -> dict[str, Machine]:
        """The machines. Raises InputError for a table that is not there or not readable."""
        path = Path(self.prices) if self.prices is not None else TABLE
        try:
            tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"prices={path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
        return build(dict[str, Machine], tree or {}, at=path.name)

    def chosen(self) -> tuple[str, Machine] | None:
        """The machine that is meant. Raises InputError for one that is not in the table."""
        if self.machine is None:
            return None
        table = self.table()
        if self.machine not in table:
            raise InputError(f"machine={self.machine} is not in the price table{near(self.machine, table)}")
        return self.machine, table[self.machine]

    def cost(self, found: Estimate) -> str | None:
        """Money for an estimate, as text; None where no price is known."""
        machine = self.chosen()
        hours = (found.seconds or 0.0) / 3600
        if self.price_per_hour is not None:
            return None if found.seconds is None else f"{hours * self.price_per_hour:,.2f} USD"
        if machine is None or found.seconds is None:
            return None
        name, row = machine
        n = machines(row, found.workers)
        several = f"{n} x " if n > 1 else ""
        return f"{n * hours * row.usd_per_hour:,.2f} USD ({several}{name} at {row.usd_per_hour:g} USD/h)"

    def notes(self) -> list[str]:
        machine = self.chosen()
        if machine is None:
            return []
        name, row = machine
        has = f"{row.gpus} x {row.gpu}" if row.gpu else f"{row.cpus} CPUs"
        return [
            f"price of {name} ({has}): {row.source}, {row.date}",
            f"the time was measured on this machine; it is only {name}'s if this is one",
        ]


def machines(row: Machine, workers: int) -> int:
    """Machines that so many workers need: a GPU each, or a CPU."""
    each = row.gpus or row.cpus
    return -(-workers // each) if each else 1


def take(words: Sequence[str]) -> tuple[Prices, list[str]]:
    """Part the words of a command line into those on prices and the stage's own. Raises ConfigError."""
    given, rest, queue = {}, [], list(words)
    while queue:
        word = queue.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if key not in fields(Prices) or not (equals or word.startswith("--")):
            rest.append(word)
            continue
        given[key] = scalar(value if equals else queue.pop(0) if queue else "")
    return build(Prices, given), rest
