"""Progress of a stage: a live bar on a terminal; in a log, a job or CI one plain line every few seconds.

with Progress(total=2000, unit="steps", description="train") as progress:
    progress.update(step, loss=f"{loss:.3f}")        # done so far, and figures to show beside it
    progress.print(sample)                           # or print(): it appears above the bar, never inside it
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

WINDOW_S = 30.0  # the rate is that of the last half minute, so that a slow start does not spoil the ETA
SHORTEST_S = 0.5  # figures that come together, as of a run that was read late, have no rate


class Progress:
    """Counts `done` of `total` units; total None means that the end is not known. Safe to use from several threads.

    file: where it is shown; stderr by default, so that a stage's output can be piped.  every_s: seconds between two
    plain lines.  clock: seconds, for tests.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        description: str,
        *,
        file: TextIO | None = None,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.unit, self.description = total, unit, description
        self.file, self.every_s, self.clock = file or sys.stderr, every_s, clock
        self.done = 0
        self.figures: dict[str, Any] = {}
        self.points: deque[tuple[float, int]] = deque()  # (time, done): what the rate is taken from
        self.lock = threading.Lock()
        self.shown_at, self.shown = clock(), ""
        self.live: Any = None  # rich's display; None in a log

    def __enter__(self) -> Progress:
        from rich.console import Console

        console = Console(file=self.file)
        if console.is_terminal and not console.is_dumb_terminal:
            self.live = self._bar(console)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        with self.lock:
            if self.live:
                self.live.stop()
                self.live = None
            elif self.done:
                self._line()

    def update(self, done: int, *, time: float | None = None, **figures: Any) -> None:
        """`done` units are finished in all; figures are shown as they are, and kept until given again.

        time: when they were, in seconds from any beginning; None: now. Given once, it must be given always.
        """
        with self.lock:
            now, at = self.clock(), time
            at = now if at is None else at
            self.done = done
            self.figures |= figures
            if self.points and (at < self.points[-1][0] or done < self.points[-1][1]):
                self.points.clear()  # a clock that was set back, or work that is done again
            self.points.append((at, done))
            while len(self.points) > 2 and at - self.points[1][0] >= WINDOW_S:
                self.points.popleft()
            if self.live:
                self.live.update(0, completed=done, words=self._words())
            elif now - self.shown_at >= self.every_s:
                self._line()

    def print(self, text: str) -> None:
        """Print a whole text above the bar, or into the log."""
        with self.lock:
            print(text, flush=True)

    @property
    def rate(self) -> float | None:
        """Units per second over the last half minute; None before two updates that are some time apart."""
        if len(self.points) < 2:
            return None
        (start, first), (now, last) = self.points[0], self.points[-1]
        return (last - first) / (now - start) if now - start >= SHORTEST_S else None

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at the present rate; None if the end or the rate is not known."""
        rate = self.rate
        return max(0, self.total - self.done) / rate if self.total is not None and rate else None

    def _words(self) -> str:
        """What is known beside the count: rate, ETA, figures."""
        words = []
        if (rate := self.rate) is not None:
            words.append(f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s")
        if (eta := self.eta_s) is not None:
            words.append(f"ETA {clock_text(eta)}")
        return ", ".join([*words, *(f"{name} {value}" for name, value in self.figures.items())])

    def _line(self) -> None:
        count = f"{self.done:,} {self.unit}"
        if self.total:
            count = f"{self.done:,}/{self.total:,} {self.unit} ({100 * self.done / self.total:.0f} %)"
        words = self._words()
        line = f"{self.description}: {count}{', ' if words else ''}{words}"
        if line != self.shown:
            print(line, file=self.file, flush=True)
        self.shown_at, self.shown = self.clock(), line

    def _bar(self, console: Any) -> Any:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}" if self.total is None else "{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn(f"{self.unit} {{task.fields[words]}}", markup=False),
        )
        # A stdout that is a file keeps its lines; rich would send them to the terminal.
        bar = Bar(*columns, console=console, refresh_per_second=4, redirect_stdout=sys.stdout.isatty())
        bar.add_task(self.description, total=self.total, words="")
        return bar


def clock_text(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
