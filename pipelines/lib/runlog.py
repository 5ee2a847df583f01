"""What a training worker writes for people and for later comparison: metrics.jsonl, log.txt, samples.txt.

Only rank 0 is given paths. The driver reads these files along (pipelines.lib.watch) and shows and tracks what they say,
so it does not matter on which machine the worker runs, nor whether a driver is watching at all.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

from pipelines.lib.jsonl import append, rows


class Metrics:
    """metrics.jsonl: one row per logged step, each step once, also when a killed run repeats its last steps."""

    def __init__(self, path: Path | None):
        self.path, self.last = path, -1
        if path is not None:
            for row, _ in rows(path):
                if row is not None and "step" in row:
                    self.last = max(self.last, int(row["step"]))

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Add a row, unless this step (repeated after a kill, with the same figures) is there already."""
        if self.path is None or step <= self.last:
            return
        rounded = {k: float(f"{v:.9g}") if isinstance(v, float) else v for k, v in figures.items()}
        append(self.path, {"step": step, "time_ms": int(time.time() * 1000), **rounded})
        self.last = step


class Log:
    """log.txt: one line per event, for people."""

    def __init__(self, path: Path | None):
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def __call__(self, message: str) -> None:
        if self._file is not None:
            self._file.write(time.strftime("%H:%M:%S ") + " ".join(message.split()) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_samples(path: Path) -> list[dict[str, str | int]]:
    """The samples of a run as rows: step, prompt, text (the prompt with its continuation)."""
    if not path.is_file():
        return []
    pieces = re.split(r"^--- step (\d+) \| (.*)$\n", path.read_text(encoding="utf-8"), flags=re.M)
    return [
        {"step": int(step), "prompt": json.loads(prompt), "text": text.removesuffix("\n\n")}
        for step, prompt, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True)
    ]


def write_sample(path: Path, step: int, prompt: str, text: str) -> None:
    """samples.txt: a heading and the continued prompt; every step once."""
    heading = f"--- step {step} | {json.dumps(prompt, ensure_ascii=False)}\n"
    if path.is_file() and heading in path.read_text(encoding="utf-8"):
        return
    with open(path, "ab") as f:
        f.write((heading + prompt + text + "\n\n").encode("utf-8", "replace"))
        f.flush()
        os.fsync(f.fileno())
