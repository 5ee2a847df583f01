"""Files of one JSON object a line, written by one process that may be killed while another reads along.

A line counts once its newline is there. So a reader never sees half a line, and a writer that starts after a kill first
closes the half line that its predecessor left (`append`), which readers then skip as damaged. JSON has no NaN and no
infinities: where a figure is one, as where a step was skipped, stands null, and `figures` reads it as NaN.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 20  # one read of the tail: about 3,000 metric lines


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line in a single write; NaN and infinities become null, what is no JSON type its text."""
    line = (json.dumps(finite(row), default=str, allow_nan=False) + "\n").encode()
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)  # "a": goes to the end, whatever was read before


def finite(tree: Any) -> Any:
    """A tree as strict JSON has it: NaN and infinities become null."""
    if isinstance(tree, Mapping):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """What a row says in numbers; null is NaN. Its step, its time and what is text are left out."""
    return {
        key: math.nan if value is None else float(value)
        for key, value in row.items()
        if key not in ("step", "time_ms") and (value is None or isinstance(value, int | float))
    }


def rows(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """The whole lines from byte `offset` on, each with the offset after it; None is a line that is no JSON object.

    A file that is missing gives nothing. One that has become shorter than `offset` is read from its beginning.
    """
    try:
        with open(path, "rb") as file:
            if offset > os.fstat(file.fileno()).st_size:
                offset = 0
            file.seek(offset)
            rest = b""
            while block := file.read(READ_BYTES):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    offset += len(line) + 1
                    if line.strip():
                        yield _parse(line), offset
    except FileNotFoundError:
        return


def row_at(path: Path, step: int) -> dict[str, Any] | None:
    """The newest row of that step, searched from the end of the file in blocks; None if there is none.

    Steps may stand in any order only within one block; rows before the first smaller step are not looked at.
    """
    try:
        with open(path, "rb") as file:
            end, rest = file.seek(0, os.SEEK_END), b""
            while end:
                start = max(0, end - READ_BYTES)
                file.seek(start)
                lines = (file.read(end - start) + rest).split(b"\n")
                rest = lines[0] if start else b""
                found = [row for row in map(_parse, lines[1 if start else 0 :]) if row and "step" in row]
                for row in reversed(found):
                    if row["step"] == step:
                        return row
                if found and min(row["step"] for row in found) < step:
                    return None
                end = start
    except FileNotFoundError:
        pass
    return None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # damaged JSON or bytes that are no UTF-8
        return None
    return row if isinstance(row, dict) else None
