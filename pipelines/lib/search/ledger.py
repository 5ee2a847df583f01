"""The record of a search: OUT/ledger.jsonl, one event a line, only ever added to, from which everything else follows.

session   a driver began, or went on: the budget of seconds counts its time
start     a trial (or its next attempt) was handed out: number, id, seed, settings, the command that repeats it
end       what came of it: status, metrics, cost, checkpoint; `interrupted` means that it will be started again
promoted  a trial's checkpoint was kept, as MODEL of the search
mlflow    the MLflow run that shows a trial
done      why the search ended
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.lib.config import InputError
from pipelines.lib.jsonl import append, figures, rows
from pipelines.lib.search.trials import Ask, Trial

FORMAT_VERSION = 1
NAME = "ledger.jsonl"
ENDED = ("done", "failed", "refused")


class Ledger:
    """The trials of a search folder, as far as its ledger knows them. Reading changes nothing.

    trials: those that the rule asked for, in its order.  rows: number -> what is known of that trial, start and end
    merged.  elapsed_s: time spent by all drivers so far.  done: why the search ended, or None.
    Raises InputError for a ledger of another format, or one that is damaged before its last line.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / NAME
        self.rows: dict[int, dict[str, Any]] = {}
        self.trials: list[Trial] = []
        self.elapsed_s = 0.0
        self.done: str | None = None
        self.computes: dict[str, Any] | None = None  # what the trials of its first session shared
        self._session: tuple[float, float] = (0.0, 0.0)  # began, last seen
        events = list(rows(self.path))
        for i, (event, _) in enumerate(events):
            if event is None or "event" not in event:
                following = events[i + 1][0] if i + 1 < len(events) else {"event": "session"}
                if not following or following.get("event") != "session":  # else a driver was killed while it wrote
                    raise InputError(f"{self.path}: line {i + 1} is damaged; restore it or begin with another out=")
                continue
            try:
                self._take(event)
            except (KeyError, TypeError, IndexError, AttributeError):
                raise InputError(
                    f"{self.path}: line {i + 1} ({event['event']}) does not fit to what stands before it; restore the "
                    "file, or begin with another out="
                ) from None

    def write(self, event: str, **what: Any) -> None:
        """Add an event, on the disk before this returns."""
        row = {"event": event, "time": round(time.time(), 3), **what}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append(self.path, row)
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        self._take(row)

    def session(self, computes: dict[str, Any] | None = None) -> None:
        """A driver begins. computes: what all trials share (Study.computes), written down by the first to know."""
        first = {} if self.computes or computes is None else {"computes": computes}
        self.write("session", format_version=FORMAT_VERSION, **first)

    @property
    def running(self) -> list[int]:
        """Numbers of trials that were started and have not ended, be it that they run or were interrupted."""
        return [n for n, row in self.rows.items() if row["status"] not in ENDED]

    @property
    def spent_s(self) -> float:
        """Seconds that all drivers have spent so far, the present one until its last event."""
        return self.elapsed_s + self._session[1] - self._session[0]

    def ended(self) -> Iterator[dict[str, Any]]:
        return (row for row in self.rows.values() if row["status"] in ENDED)

    def _take(self, event: dict[str, Any]) -> None:
        kind, now = event["event"], float(event.get("time", 0.0))
        if kind == "session":
            if event.get("format_version") != FORMAT_VERSION:
                raise InputError(
                    f"{self.path}: a ledger of format {event.get('format_version')}; this program reads "
                    f"{FORMAT_VERSION}; give another out="
                )
            self.elapsed_s, self._session, self.done = self.spent_s, (now, now), None
            self.computes = self.computes or event.get("computes")
            return
        self._session = (self._session[0], max(now, self._session[1]))
        if kind == "done":
            self.done = event["reason"]
            return
        number = event["number"]
        rest = {k: v for k, v in event.items() if k not in ("event", "time")}
        if kind == "start":
            self.rows[number] = {**self.rows.get(number, {}), **rest, "status": "running"}
            if number == len(self.trials):
                self.trials.append(_trial(self.rows[number]))
        else:
            self.rows[number] |= rest
        self.trials[number] = _told(self.trials[number], self.rows[number])


def _trial(row: dict[str, Any]) -> Trial:
    ask = Ask(row["settings"], row["seed"], row["share"], row["keep"], row["source"], row["why"])
    return Trial(row["number"], ask, row["id"])


def _told(trial: Trial, row: dict[str, Any]) -> Trial:
    if row["status"] not in ENDED:
        return replace(trial, status="running", metrics={}, cost={}, error="")
    return replace(
        trial, status=row["status"], metrics=figures(row["metrics"]), cost=row["cost"], error=row.get("error") or ""
    )
