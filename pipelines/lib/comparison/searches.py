"""What a search did, from its ledger and results.yaml: its trials in order, its decisions, and why it ended."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.lib.config import InputError, read_yaml, recipe
from pipelines.lib.search.ledger import Ledger


@dataclass(frozen=True)
class SearchStory:
    """One search.

    rule: its kind;  metric, mode: its objective, None where its config is not there
    trials: status -> how many;  seconds: spent by its drivers;  done: why it ended, None while it has not
    points: (number, objective, share of the full length) of each trial that ended with a finite objective
    decisions: what the rule decided, one line each;  winner: the settings that it ended with, where its record says so
    """

    path: Path
    rule: str
    metric: str | None
    mode: str
    trials: Mapping[str, int]
    seconds: float
    done: str | None
    points: tuple[tuple[int, float, float], ...] = ()
    decisions: tuple[str, ...] = ()
    winner: Mapping[str, Any] | None = None

    def sentence(self) -> str:
        counts = ", ".join(f"{n} {status}" for status, n in self.trials.items())
        end = f"ended: {self.done}" if self.done else "has not ended"
        return f"{self.path.name}: {self.rule}, {sum(self.trials.values())} trials ({counts}), {end}."

    def best_so_far(self) -> list[tuple[int, float]]:
        """(number, objective) of each fully trained trial that was better than all before it."""
        found: list[tuple[int, float]] = []
        for number, value, share in self.points:
            better = not found or (value < found[-1][1] if self.mode == "min" else value > found[-1][1])
            if share == 1 and better:
                found.append((number, value))
        return found


def story_of(folder: Path, ledger: Ledger) -> SearchStory:
    """Read a search folder. What its files do not say stays empty."""
    config = recipe(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    objective, rule = config.get("objective"), config.get("rule")
    objective = objective if isinstance(objective, dict) else {}
    metric = objective.get("metric")
    records = records_of(folder / "results.yaml")
    points = []
    for trial in ledger.trials:
        value = trial.metrics.get(metric, math.nan) if metric and trial.status == "done" else math.nan
        if isinstance(value, int | float) and math.isfinite(value):
            points.append((trial.number, float(value), trial.ask.share))
    decisions = records.get("decisions")
    winner = records.get("winner")
    return SearchStory(
        folder,
        str(rule.get("kind", "search") if isinstance(rule, dict) else rule or "search"),
        metric,
        str(objective.get("mode", "min")),
        Counter(trial.status for trial in ledger.trials),
        ledger.spent_s,
        ledger.done,
        tuple(points),
        tuple(map(str, decisions)) if isinstance(decisions, list) else (),
        winner if isinstance(winner, dict) else None,
    )


def records_of(path: Path) -> dict[str, Any]:
    """What the rule wrote of itself; empty without the file, or if it is no mapping."""
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, InputError):
        return {}
    return tree if isinstance(tree, dict) else {}
