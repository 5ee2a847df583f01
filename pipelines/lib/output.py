"""Where results go: whether they can be written there, asked before the work, and how a path is shown to people."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from pipelines.lib.config import InputError


def check_writable(path: Path, setting: str) -> None:
    """Raise InputError, naming the setting, if a file could not be written at `path`. Leaves nothing behind."""
    made: list[Path] = []
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        for folder in reversed([p for p in path.parents if not p.exists()]):
            folder.mkdir()
            made.append(folder)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"{setting}: {error.strerror}") from None
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def shown(path: Path) -> str:
    """A path as a user would type it: relative to where they stand, if it lies below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
