"""Bundles as archives: unpacked once, from a file and from an address; nothing that leads out or lies is kept."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.lib.config import InputError
from pipelines.lib.core import archive
from pipelines.lib.core.archive import bundle_folder, download, unpack
from pipelines.lib.core.tasks import open_bundle
from tests.pipelines.core.bundle import write_bundle


@pytest.fixture
def packed(tmp_path):
    """A .zip of a bundle inside a folder, as the public one is."""
    source = write_bundle(tmp_path / "served" / "eval_bundle", 4)
    path = tmp_path / "served" / "pack.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        for file in sorted(source.rglob("*")):
            pack.write(file, file.relative_to(source.parent))
    return path


@pytest.fixture
def address(packed):
    """A server on this machine, and what it was asked for."""

    class Quiet(SimpleHTTPRequestHandler):
        asked: list[str] = []

        def log_message(self, *words):
            self.asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(packed.parent)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/pack.zip", Quiet.asked
    server.shutdown()
    server.server_close()


def test_a_file_is_unpacked_once_and_its_hash_kept(packed, tmp_path, monkeypatch):
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    found = bundle_folder(str(packed), tmp_path / "cache")
    assert found.sha256 == digest and open_bundle(found.folder)[0].label == "letters"
    monkeypatch.setattr(archive, "unpack", lambda *_: pytest.fail("unpacked again"))
    assert bundle_folder(str(packed), tmp_path / "cache", digest.upper()) == found
    with pytest.raises(InputError, match="expected sha256 0000"):
        bundle_folder(str(packed), tmp_path / "cache", "0" * 64)
    assert bundle_folder(str(found.folder), tmp_path / "cache").sha256 is None


def test_an_address_is_fetched_once(address, packed, tmp_path):
    url, asked = address
    found = bundle_folder(url, tmp_path / "cache")
    assert found.sha256 == hashlib.sha256(packed.read_bytes()).hexdigest() and found.source == url
    assert len(open_bundle(found.folder)) == 5
    bundle_folder(url, tmp_path / "cache")
    assert len(asked) == 1
    assert [p.name[:5] for p in (tmp_path / "cache").iterdir()] == ["pack-"]  # nothing is left of the download


def test_the_public_bundle_is_an_address_and_another_hash_than_the_known_one_is_said(
    address, tmp_path, monkeypatch, capsys
):
    url, _ = address
    monkeypatch.setattr(archive, "PUBLIC", url)
    monkeypatch.setattr(archive, "KNOWN_SHA256", {url: "1" * 64})
    bundle_folder("public", tmp_path / "cache")
    assert "not the known 1111" in capsys.readouterr().out


def test_what_does_not_answer_or_is_too_large_is_one_line(address, tmp_path):
    url, _ = address
    with pytest.raises(InputError, match=r"cannot be fetched .*404.*give bundle=FOLDER"):
        bundle_folder(url.replace("pack", "none"), tmp_path / "cache")
    with pytest.raises(InputError, match="at most 100 are taken"):
        download(url, tmp_path / "x", limit=100)
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(InputError, match=r"no such folder or \.zip"):
        bundle_folder(str(tmp_path / "none"), tmp_path / "cache")


def member(name: str, data: bytes = b"x", link: bool = False):
    info = zipfile.ZipInfo(name)
    info.external_attr = (0o120777 if link else 0o100644) << 16
    return info, data


@pytest.mark.parametrize(
    "entry",
    [
        member("../out"),
        member("/abs"),
        member("a/../../out"),
        member("C:/x"),
        member("a\\..\\out"),
        member("link", b"/etc", True),
    ],
    ids=lambda entry: entry[0].filename,
)
def test_members_that_lead_out_are_not_unpacked(entry, tmp_path):
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as pack:
        pack.writestr("good", "x")
        pack.writestr(*entry)
    with pytest.raises(InputError, match="leads out of the folder"):
        bundle_folder(str(path), tmp_path / "cache")
    assert {p.name for p in tmp_path.iterdir()} == {"bad.zip", "cache"} and not list((tmp_path / "cache").iterdir())


def test_too_many_files_or_bytes_and_no_archive_are_one_line(tmp_path):
    path = tmp_path / "large.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        for i in range(5):
            pack.writestr(f"{i}", bytes(1000))
    for options in ({"limit": 4000}, {"members": 4}):
        with pytest.raises(InputError, match="not unpacked"):
            unpack(path, tmp_path / "out", **options)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="not a zip archive"):
        unpack(path, tmp_path / "out")


def test_bytes_are_counted_whatever_the_archive_says_of_itself(tmp_path):
    """The size in the directory is forged; Python's reader then stops early or sees a wrong checksum."""
    path = tmp_path / "forged.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("a", bytes(100_000))
    forged = path.read_bytes().replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    path.write_bytes(forged)
    with pytest.raises(InputError):
        unpack(path, tmp_path / "out", limit=50_000)
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*")) <= 50_000


def test_an_archive_without_a_bundle_is_said(tmp_path):
    path = Path(tmp_path / "other.zip")
    with zipfile.ZipFile(path, "w") as pack:
        pack.writestr("readme", "x")
    with pytest.raises(InputError, match=r"no core\.yaml in this archive"):
        bundle_folder(str(path), tmp_path / "cache")
