"""Show a run while it is written: progress from metrics.jsonl, events from log.txt, samples from samples.txt.

The driver reads the run folder's files along, so the terminal looks the same whether the loop runs in this process, in
local workers or on other machines.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.lib.jsonl import figures, rows
from pipelines.lib.progress import Progress
from pipelines.lib.run import Run


class Tail:
    """New whole lines of a text file that grows; starts at its present end."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = path.stat().st_size if path.is_file() else 0

    def read(self) -> list[str]:
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as f:
            f.seek(self.offset)
            data = f.read()
        whole, _, _ = data.rpartition(b"\n")
        if not whole:
            return []
        self.offset += len(whole) + 1
        return whole.decode("utf-8", "replace").split("\n")


class Watch:
    """A thread that shows a run. total: updates of the whole run, None when its length is in seconds.

    on_checkpoint: called with (step, path) when a new checkpoint is complete.
    """

    def __init__(self, run: Run, total: int | None, on_checkpoint: Callable[[int, Path], None] | None = None):
        self.run, self.total, self.on_checkpoint = run, total, on_checkpoint
        self.offset = run.metrics.stat().st_size if run.metrics.is_file() else 0
        self.log, self.samples = Tail(run.log), Tail(run.samples)
        self.seen = {s for s in run.steps() if (run.checkpoints / f"step_{s}" / "manifest.json").is_file()}
        self.row: dict[str, Any] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self.progress = Progress(self.total, "updates", f"training {self.run.path.name}")
        self.progress.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._done.set()
        self._thread.join()
        self._show()
        self.progress.__exit__(*error)

    def say(self, text: str) -> None:
        self.progress.print(text)

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self._show()

    def _show(self) -> None:
        for line in self.log.read():
            self.say(line)
        for row, offset in rows(self.run.metrics, self.offset):
            self.offset = offset
            if row is None:
                continue
            new = figures(row)
            self.row |= new
            shown = {"loss": f"{new['train/loss']:.4f}", "tok/s": f"{new['train/tokens_per_s']:,.0f}"}
            shown["mfu"] = f"{100 * new['train/mfu']:.1f} %"
            if "val/nll" in self.row:
                shown["val"] = f"{self.row['val/nll']:.4f}"
            self.progress.update(row["step"], time=row["time_ms"] / 1000, **shown)
            if "val/nll" in new:
                bpb = f", {new['val/bpb']:.4f} bits per byte" if "val/bpb" in new else ""
                self.say(
                    f"step {row['step']:,}: validation {new['val/nll']:.4f} nats, perplexity {new['val/ppl']:.2f}{bpb}"
                )
        for line in self.samples.read():
            self.say("  " + line)
        for step in sorted(set(self.run.steps()) - self.seen):
            path = self.run.checkpoints / f"step_{step}"
            if (path / "manifest.json").is_file():
                self.seen.add(step)
                if self.on_checkpoint is not None:
                    self.on_checkpoint(step, path)
