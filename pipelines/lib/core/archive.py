"""The public bundle of CORE's task files, or any zip archive of that layout: fetched, checked and unpacked.

Nothing of an archive is trusted: a member that leads out of the folder, a link, too many files or too many bytes end
the work before anything is kept; bytes are counted while they are written, whatever the archive says of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pipelines.lib.config import InputError
from pipelines.lib.progress import Progress
from pipelines.lib.shards import file_sha256, write_json

PUBLIC = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
# As others recorded it for a download of 12 June 2026; a bundle that differs is used, and the difference said.
KNOWN_SHA256 = {PUBLIC: "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"}
DOWNLOAD_BYTES = 2 << 30
UNPACKED_BYTES = 4 << 30
MEMBERS = 10_000
TIMEOUT_S = 60.0
CHUNK = 1 << 20
SOURCE = "source.json"  # written last: an unpacked archive without it was cut off


class Bundle(NamedTuple):
    """folder: with core.yaml.  source: where it came from.  sha256: of the archive; None for a folder."""

    folder: Path
    source: str
    sha256: str | None


def bundle_folder(setting: str, cache: Path, sha256: str | None = None) -> Bundle:
    """The folder of a bundle. setting: a folder, a .zip file, an http(s) address, or `public`.

    cache: archives are unpacked below it, once.  sha256: what the archive must have.  Raises InputError.
    """
    from pipelines.lib.jobs import storage_path

    address = PUBLIC if setting == "public" else setting
    is_remote = address.startswith(("http://", "https://"))
    path = None if is_remote else storage_path(address)
    if path is not None and path.is_dir():
        if sha256 is not None:
            raise InputError(f"bundle_sha256: it belongs to an archive, and bundle={setting} is a folder")
        return Bundle(path, str(path), None)
    if path is not None and not path.is_file():
        raise InputError(f"bundle={setting}: no such folder or .zip; bundle=public downloads {PUBLIC}")
    mark = hashlib.sha256(address.encode()).hexdigest() if path is None else file_sha256(path)
    target = cache / f"{PurePosixPath(address).stem[:40]}-{mark[:8]}"
    if (found := _unpacked(target)) is None:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".bundle-") as made:
            archive = path or download(address, Path(made) / "archive.zip")
            digest = file_sha256(archive)
            _check_hash(address, digest, sha256)
            unpack(archive, Path(made) / "bundle")
            write_json(Path(made) / "bundle" / SOURCE, {"source": address, "sha256": digest})
            if target.exists():  # what a kill has left
                shutil.rmtree(target)
            os.replace(Path(made) / "bundle", target)
        found = _unpacked(target)
    assert found is not None
    _check_hash(address, found["sha256"], sha256)
    inside = [p.parent for p in (target / "core.yaml", *sorted(target.glob("*/core.yaml"))) if p.is_file()]
    if not inside:
        raise InputError(f"bundle={setting}: no core.yaml in this archive")
    return Bundle(inside[0], found["source"], found["sha256"])


def _unpacked(target: Path) -> dict[str, Any] | None:
    try:
        return json.loads((target / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check_hash(address: str, found: str, asked: str | None) -> None:
    if asked is not None and found != asked.lower():
        raise InputError(f"{address}: expected sha256 {asked}, found {found}; it is another archive")
    known = KNOWN_SHA256.get(address)
    if asked is None and known is not None and found != known:
        print(f"warning: {address} has sha256 {found}, not the known {known}; scores may differ from published ones")


def download(address: str, target: Path, limit: int = DOWNLOAD_BYTES) -> Path:
    """Fetch an http(s) address into a file. Raises InputError for no answer, and for more than `limit` bytes."""
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer, open(target, "wb") as file:
            total = int(answer.headers.get("Content-Length") or 0) or None
            if total is not None and total > limit:
                raise InputError(f"{address}: {total:,} bytes; at most {limit:,} are taken")
            done = 0
            with Progress(total and total // CHUNK, "MB", "download") as progress:
                while block := answer.read(CHUNK):
                    done += len(block)
                    if done > limit:
                        raise InputError(f"{address}: more than {limit:,} bytes; no more are taken")
                    file.write(block)
                    progress.update(done // CHUNK)
    except (OSError, ValueError) as error:  # urllib's own errors are OSErrors
        reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", None) or error
        raise InputError(f"{address}: it cannot be fetched ({reason}); give bundle=FOLDER of a copy") from None
    if total is not None and done != total:
        raise InputError(f"{address}: {done:,} of {total:,} bytes came; try again")
    return target


def unpack(archive: Path, target: Path, limit: int = UNPACKED_BYTES, members: int = MEMBERS) -> None:
    """A zip archive's files into a new folder. Raises InputError for one that is damaged, or not safe to unpack."""
    try:
        with zipfile.ZipFile(archive) as pack:
            entries = [entry for entry in pack.infolist() if not entry.is_dir()]
            if len(entries) > members or sum(entry.file_size for entry in entries) > limit:
                raise InputError(f"{archive.name}: more than {members:,} files or {limit:,} bytes; not unpacked")
            for entry in entries:
                _check_name(archive, entry)
            left = limit
            for entry in entries:
                path = target / entry.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                with pack.open(entry) as source, open(path, "xb") as file:
                    while block := source.read(CHUNK):
                        left -= len(block)
                        if left < 0:
                            raise InputError(f"{archive.name}: more than {limit:,} bytes when unpacked; it lies")
                        file.write(block)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{archive.name}: not a zip archive that can be unpacked ({error})") from None


def _check_name(archive: Path, entry: zipfile.ZipInfo) -> None:
    """Raise InputError for a member that is a link or would lie outside the folder."""
    name = PurePosixPath(entry.filename)
    odd = name.is_absolute() or ".." in name.parts or "\\" in entry.filename or ":" in name.parts[0]
    if odd or stat.S_ISLNK(entry.external_attr >> 16):
        raise InputError(f"{archive.name}: the member {entry.filename!r} leads out of the folder; not unpacked")
