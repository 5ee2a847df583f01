"""Token shards: written once by `pipelines.tokenize`, memory-mapped by every stage that reads tokens.

A folder of shards:

    manifest.json            what is here: tokenizer, source, counts, size and sha256 of every file, one fingerprint
    tokenizer/               a copy of the tokenizer, as a Hugging Face folder
    token_bytes.npy          int32 [V]: how many bytes of text each id stands for (0: a special token)
    train-00000.arrow ...    one Arrow IPC file per shard and split

A shard is an Arrow IPC file with one record batch and one column `tokens: large_list<uint16 | uint32>`, a row per
document (its end-of-text token, if any, is the row's last). So `pyarrow.ipc.open_file` reads it as a table, while we
need no Arrow at all: the values of all rows lie in one piece in the file, as do the int64 row offsets, and the manifest
records both places. So the same reader serves nanoGPT's `.bin` and numpy's `.npy` (pipelines.lib.nanogpt).

    folder = TokenFolder.open("data/stdlib", verify="sha256")
    train = folder.split("train")
    train.batch(np.array([0, 4096]), 1025)          # [2, 1025] int64

Whatever is damaged is named in one line (file, what was expected, what was found) by `InputError`.
"""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.lib.config import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKEN_BYTES = "token_bytes.npy"
CHUNK_BYTES = 1 << 22  # hashing and scanning read this much at a time


# ---- writing ---------------------------------------------------------------------------------------------------------


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest token type that holds ids below vocab_size: uint16 up to 65536 ids, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_shard(path: Path, tokens: np.ndarray, offsets: np.ndarray, n_bytes: int) -> dict[str, Any]:
    """Write one shard under a temporary name and rename it, so that `path` is whole or absent.

    tokens: [N] uint16 or uint32.  offsets: [documents + 1] int64, document d is tokens[offsets[d]:offsets[d+1]].
    n_bytes: UTF-8 bytes of the text behind the tokens.  Returns the shard's entry for the manifest.
    """
    import pyarrow as pa

    values = pa.Array.from_buffers(pa.from_numpy_dtype(tokens.dtype), len(tokens), [None, pa.py_buffer(tokens)])
    rows = pa.LargeListArray.from_arrays(pa.array(np.asarray(offsets, np.int64)), values)
    schema = pa.schema([pa.field("tokens", rows.type, nullable=False)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([rows], schema=schema))
    buffer = sink.getvalue()
    column = pa.ipc.open_file(pa.BufferReader(buffer)).get_batch(0).column(0)  # zero-copy: addresses inside `buffer`
    entry = {
        "file": path.name,
        "tokens": len(tokens),
        "documents": len(offsets) - 1,
        "bytes": int(n_bytes),
        "max_id": int(tokens.max(initial=0)),
        "byte_offset": column.values.buffers()[1].address - buffer.address if len(tokens) else 0,
        "offsets_byte_offset": column.buffers()[1].address - buffer.address,
        "size": buffer.size,
        "sha256": hashlib.sha256(buffer).hexdigest(),
    }
    write_atomically(path, buffer)
    return entry


def make_folder(path: Path) -> list[Path]:
    """Make a folder for output. Returns the folders that were not there before, deepest first. Raises InputError."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: no folder can be made here ({error.strerror}); give another out=") from None
    return missing


def write_atomically(path: Path, data: Any, sync: bool = False) -> None:
    """Write bytes under a temporary name beside `path`, then rename. A kill leaves the old file or the new one.

    sync: wait until the disk has them, so that a power cut does the same.
    Raises InputError that names path and bytes when the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"no space left for the {len(memoryview(data))} bytes of {path}; free some, then give the same command"
            ) from None
        raise


def write_json(path: Path, tree: Any) -> None:
    write_atomically(path, (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode())


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Complete `manifest` (format_version, fingerprint, totals) and write it, last of all: it makes a folder valid."""
    for split in manifest["splits"].values():
        for total in ("tokens", "documents", "bytes"):
            split[total] = sum(shard[total] for shard in split["shards"])
    manifest = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint(manifest), **manifest}
    write_json(folder / MANIFEST, manifest)
    return manifest


def fingerprint(manifest: dict[str, Any]) -> str:
    """One sha256 over what a model sees: token type, end-of-text id, tokenizer, and every shard in order.

    File names, paths, dates and the source's description do not enter, so a moved or renamed folder keeps it.
    """
    identity = {
        "dtype": manifest["dtype"],
        "eot_id": manifest["eot_id"],
        "tokenizer": manifest["tokenizer"]["sha256"],
        "splits": {
            name: [[shard["tokens"], shard["documents"], shard["sha256"]] for shard in split["shards"]]
            for name, split in sorted(manifest["splits"].items())
        },
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


# ---- hashing ---------------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def folder_sha256(folder: Path) -> str:
    """sha256 over the names and contents of the files in `folder` (not recursive, hidden files left out)."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        digest.update(f"{path.name}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One run of tokens in a file.

    path: the file.  tokens: how many.  byte_offset: where the first one lies.
    offsets: (file, byte offset) of the int64 [documents + 1] row offsets, or None when documents are not marked.
    member: name inside a compressed .npz, which cannot be mapped and is read into memory instead.
    """

    path: str
    tokens: int
    byte_offset: int
    documents: int = 0
    offsets: tuple[str, int] | None = None
    member: str | None = None


@dataclass
class Tokens:
    """One split as one long array of tokens, memory-mapped shard by shard.

    n_tokens, n_documents: totals.  n_bytes: UTF-8 bytes of the text behind the tokens, None if not known.
    dtype: of the tokens on disk.  eot_id: the id that ends a document, None if documents are not ended by one.
    Pickles by path: a copy in another process maps the files again.
    """

    shards: tuple[Shard, ...]
    dtype: np.dtype
    n_bytes: int | None = None
    eot_id: int | None = None
    n_tokens: int = field(init=False)
    n_documents: int = field(init=False)

    def __post_init__(self) -> None:
        self.first = np.cumsum([0, *(s.tokens for s in self.shards)])  # first token of each shard, and the end
        self.first_document = np.cumsum([0, *(s.documents for s in self.shards)])
        self.n_tokens, self.n_documents = int(self.first[-1]), int(self.first_document[-1])
        self._mapped: dict[int, np.ndarray] = {}
        self._offsets: dict[int, np.ndarray] = {}
        self._first: list[int] = self.first.tolist()  # plain numbers: indexing an array costs a microsecond

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("shards", "dtype", "n_bytes", "eot_id")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def __len__(self) -> int:
        return self.n_tokens

    def array(self, shard: int) -> np.ndarray:
        """The tokens of one shard, [N] in the dtype on disk, mapped read-only."""
        if shard not in self._mapped:
            s = self.shards[shard]
            if s.member is not None:
                with np.load(s.path, allow_pickle=False) as archive:
                    self._mapped[shard] = archive[s.member]
            elif s.tokens == 0:
                self._mapped[shard] = np.empty(0, self.dtype)
            else:
                mapped = np.memmap(s.path, self.dtype, "r", offset=s.byte_offset, shape=(s.tokens,))
                self._mapped[shard] = mapped.view(np.ndarray)  # a plain array slices 3 times faster than np.memmap
        return self._mapped[shard]

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens start .. start + length, [length] in the dtype on disk; a view where one shard holds them all."""
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise IndexError(f"tokens {start} to {start + length} are outside 0 to {self.n_tokens}")
        shard = min(int(np.searchsorted(self.first, start, "right")) - 1, max(len(self.shards) - 1, 0))
        pieces = []
        while length > 0:
            begin = start - int(self.first[shard])
            piece = self.array(shard)[begin : begin + length]
            pieces.append(piece)
            start, length, shard = start + len(piece), length - len(piece), shard + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def batch(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows at `starts`: [B] -> [B, length] int64."""
        starts = np.asarray(starts, np.int64)
        out = np.empty((len(starts), length), np.int64)
        shards = (np.searchsorted(self.first, starts, "right") - 1).tolist()
        for row, (start, shard) in enumerate(zip(starts.tolist(), shards, strict=True)):
            if 0 <= shard < len(self.shards) and start + length <= self._first[shard + 1]:
                begin = start - self._first[shard]
                out[row] = self.array(shard)[begin : begin + length]  # copies and widens in one pass
            else:
                out[row] = self.window(start, length)
        return out

    def documents(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Which document each token of one window belongs to: (doc_ids [length], positions [length]), both int64.

        positions count from 0 at the later of the document's beginning and the window's, so they are below `length`
        whatever the length of the documents. doc_ids number the documents of the split; where the files mark no
        documents they are counted from 0 inside the window, at the tokens that follow an end-of-text token (with no
        such token either, the window is one document).
        """
        tokens = np.arange(start, start + length, dtype=np.int64)
        if all(s.offsets is not None for s in self.shards):
            ids = np.empty(length, np.int64)
            begins = np.empty(length, np.int64)
            for s, begin, end in self._spans(start, length):
                offsets, base = self._document_offsets(s), int(self.first[s])
                low = int(np.searchsorted(offsets, begin - base, "right")) - 1
                high = int(np.searchsorted(offsets, end - 1 - base, "right"))
                rows = slice(begin - start, end - start)
                local = np.searchsorted(offsets[low + 1 : high + 1], tokens[rows] - base, "right") + low
                ids[rows] = local + self.first_document[s]
                begins[rows] = offsets[local] + base
        else:
            window = self.window(start, length)
            ends = window == self.eot_id if self.eot_id is not None else np.zeros(length, bool)
            ids = np.concatenate([[0], np.cumsum(ends)[:-1]]).astype(np.int64)[:length]
            begins = start + np.searchsorted(ids, ids)
        return ids, tokens - np.maximum(begins, start)

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, [n] in the dtype on disk."""
        if not 0 <= index < self.n_documents:
            raise IndexError(f"document {index} is outside 0 to {self.n_documents}")
        shard = int(np.searchsorted(self.first_document, index, "right")) - 1
        offsets, row = self._document_offsets(shard), index - int(self.first_document[shard])
        return self.array(shard)[offsets[row] : offsets[row + 1]]

    def document_ends(self, shard: int) -> np.ndarray | None:
        """Where the documents of one shard end, [documents] tokens from the split's begin; None: not marked."""
        if self.shards[shard].offsets is None:
            return None
        return self._document_offsets(shard)[1:] + int(self.first[shard])

    def _document_offsets(self, shard: int) -> np.ndarray:
        if shard not in self._offsets:
            s = self.shards[shard]
            assert s.offsets is not None
            path, at = s.offsets
            mapped = np.memmap(path, "<i8", "r", offset=at, shape=(s.documents + 1,))
            self._offsets[shard] = mapped.view(np.ndarray)
        return self._offsets[shard]

    def _spans(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first token, end) of every shard that the window touches."""
        if start < 0 or start + length > self.n_tokens:
            raise IndexError(f"tokens {start} to {start + length} are outside 0 to {self.n_tokens}")
        end = start + length
        shard = int(np.searchsorted(self.first, start, "right")) - 1
        while start < end:
            stop = min(end, int(self.first[shard + 1]))
            if stop > start:
                yield shard, start, stop
            start, shard = stop, shard + 1


@dataclass
class TokenFolder:
    """A folder of tokens, opened and checked: `manifest` says what is in it, `split(name)` reads it.

    path: the folder (or single file).  manifest: as written, or made up for the layouts of others.
    fingerprint: sha256 over tokens, tokenizer and end-of-text id.  vocab_size: ids are below it.
    tokenizer_dir: a Hugging Face tokenizer folder, None if the layout has none.
    """

    path: Path
    manifest: dict[str, Any]
    splits: dict[str, Tokens]
    fingerprint: str
    vocab_size: int
    tokenizer_dir: Path | None = None
    _token_bytes: np.ndarray | None = None

    @classmethod
    def open(cls, path: str | Path, verify: Literal["size", "sha256"] = "size") -> TokenFolder:
        """Open a folder of shards, a nanoGPT folder, or .npy / .npz / .bin token files.

        verify: "size" looks at the length of every file and hashes the small ones; "sha256" reads every shard (about
        1.8 GB/s on one core with SHA instructions) and so also finds a flipped bit.
        Raises InputError that names the file, what was expected and what was found.
        """
        path = Path(path)
        if (path / MANIFEST).is_file():
            return cls._open_shards(path, verify)
        from pipelines.lib.nanogpt import open_foreign

        return open_foreign(path)

    @classmethod
    def _open_shards(cls, path: Path, verify: str) -> TokenFolder:
        manifest = read_manifest(path)
        tokenizer, dtype = manifest["tokenizer"], np.dtype(manifest["dtype"]).newbyteorder("<")
        tokenizer_dir = None
        if tokenizer.get("folder"):
            tokenizer_dir = path / tokenizer["folder"]
            expect(
                tokenizer_dir, "sha256 of the tokenizer's files", tokenizer["sha256"], _tokenizer_hash(tokenizer_dir)
            )
        token_bytes = None
        if manifest.get("token_bytes"):
            check_file(path, manifest["token_bytes"], "sha256")
            token_bytes = np.load(path / manifest["token_bytes"]["file"], allow_pickle=False)
        entries = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashlib lets go of the GIL
            list(pool.map(lambda entry: check_file(path, entry, verify), entries))
        for entry in entries:
            if entry["max_id"] >= tokenizer["vocab_size"]:
                raise InputError(
                    f"{path / entry['file']}: token id {entry['max_id']} found, but the tokenizer has only "
                    f"{tokenizer['vocab_size']} ids; tokenize again with the right tokenizer"
                )
        splits = {
            name: Tokens(
                tuple(
                    Shard(
                        path=str((path / s["file"]).absolute()),
                        tokens=s["tokens"],
                        byte_offset=s["byte_offset"],
                        documents=s["documents"],
                        offsets=(str((path / s["file"]).absolute()), s["offsets_byte_offset"]),
                    )
                    for s in split["shards"]
                ),
                dtype,
                split["bytes"],
                manifest["eot_id"],
            )
            for name, split in manifest["splits"].items()
        }
        return cls(path, manifest, splits, manifest["fingerprint"], tokenizer["vocab_size"], tokenizer_dir, token_bytes)

    def split(self, name: str) -> Tokens:
        """One split. Raises InputError if there is none of that name or it is empty."""
        tokens = self.splits.get(name)
        if tokens is None or tokens.n_tokens == 0:
            there = ", ".join(f"{k} ({v.n_tokens} tokens)" for k, v in self.splits.items())
            hint = "; tokenize with val_fraction or val_documents for a validation split" if name == "val" else ""
            raise InputError(f"{self.path}: no tokens in split {name!r}; there is {there or 'none'}{hint}")
        return tokens

    def token_bytes(self) -> np.ndarray | None:
        """int32 [vocab_size]: bytes of text that each id stands for, 0 for special tokens; None if not known."""
        return self._token_bytes


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards, its own fingerprint checked. Raises InputError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            found = fingerprint(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a manifest of token shards, found {error!r}; tokenize again") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: expected format_version {FORMAT_VERSION}, found {version!r}; tokenize again")
    expect(path, "fingerprint", manifest.get("fingerprint"), found)
    return manifest


def check_file(folder: Path, entry: dict[str, Any], verify: str) -> None:
    """One file against its manifest entry: size, and with verify="sha256" its content. Raises InputError."""
    path = folder / entry["file"]
    if not path.is_file():
        raise InputError(f"{path}: expected {entry['size']} bytes, found no file; tokenize again")
    expect(path, "size in bytes", entry["size"], path.stat().st_size)
    if verify == "sha256":
        expect(path, "sha256", entry["sha256"], file_sha256(path))


def expect(path: Path, what: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise InputError(
            f"{path}: expected {what} {expected}, found {found}; the file is damaged or exchanged: tokenize again, or "
            "copy it anew"
        )


def _tokenizer_hash(folder: Path) -> str:
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the tokenizer's folder, found none; tokenize again")
    return folder_sha256(folder)
