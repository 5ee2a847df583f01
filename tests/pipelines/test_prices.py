"""The price of an estimate: the user's, a machine's, or none."""

from __future__ import annotations

import re

import pytest

from models.spec import ConfigError
from pipelines.lib.config import InputError
from pipelines.lib.estimate import Estimate
from pipelines.lib.prices import Machine, Prices, machines, take


def test_every_row_of_the_table_has_a_source_a_date_and_what_it_is():
    table = Prices().table()
    assert len(table) >= 5
    for name, row in table.items():
        assert row.usd_per_hour > 0 and row.source and re.fullmatch(r"\d{4}-\d\d-\d\d", row.date), name
        assert (row.gpus > 0) == (row.gpu is not None) and (row.gpus > 0) != (row.cpus > 0), name


def test_money_is_said_only_with_a_price_and_a_time():
    hour = Estimate(tokens=1, seconds=1800)
    assert Prices().cost(hour) is None and Prices().notes() == []
    assert Prices(price_per_hour=3.0).cost(hour) == "1.50 USD"
    assert Prices(price_per_hour=3.0).cost(Estimate(tokens=1)) is None


def test_workers_need_as_many_machines_as_hold_them(tmp_path):
    table = tmp_path / "mine.yaml"
    table.write_text("box: {usd_per_hour: 2, gpus: 4, gpu: X, source: me, date: 2026-01-01}\n")
    prices = Prices(machine="box", prices=str(table))
    assert prices.cost(Estimate(tokens=1, seconds=3600, workers=9)) == "6.00 USD (3 x box at 2 USD/h)"
    assert prices.cost(Estimate(tokens=1, seconds=3600, workers=4)) == "2.00 USD (box at 2 USD/h)"
    assert "me, 2026-01-01" in prices.notes()[0]
    assert machines(Machine(1, "me", "today", cpus=2), 3) == 2
    assert machines(Machine(1, "me", "today"), 3) == 1


def test_the_words_on_prices_are_taken_out_of_a_command_line():
    prices, rest = take(["gpt_debug", "price_per_hour=2", "data=a"])
    assert prices == Prices(price_per_hour=2.0) and rest == ["gpt_debug", "data=a"]
    assert take(["--machine", "x", "--prices=y", "machine"]) == (Prices(machine="x", prices="y"), ["machine"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("box: {usd_per_hour: 2, source: me}", "date is required"),
        ("box: {usd_per_hour: much, source: me, date: 2026-01-01}", "is no number"),
        ("[1, 2]", "is no mapping"),
    ],
)
def test_a_table_that_is_none_is_named(tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        Prices(machine="box", prices=str(path)).chosen()


def test_two_prices_are_refused_and_a_machine_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="not both"):
        take(["price_per_hour=2", "machine=x"])
    with pytest.raises(InputError, match="is not in the price table"):
        Prices(machine="abacus").chosen()
