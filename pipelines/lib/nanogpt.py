"""Token files of others: nanoGPT's train.bin / val.bin / meta.pkl, and numpy's .npy / .npz, read where they lie.

`open_foreign(path)` gives the same TokenFolder as our own shards, with a manifest made up from what is there:

    layout                          splits                          documents              vocabulary
    train.bin, val.bin [meta.pkl]   by file name                    at end-of-text tokens  meta.pkl, else GPT-2's
    *.npy [offsets_<name>.npy]      `val` in the name: val          offsets_<name>.npy     largest id + 1
    *.npz                           its arrays, named as above      array offsets[_<name>] largest id + 1
    one .bin, .npy or .npz file     train                           as above               as above

Nothing is copied, except arrays in compressed .npz archives, which cannot be mapped. A pickle is read by an unpickler
that knows plain containers, text and numbers, and no function or class whatsoever.
`to_nanogpt` writes nanoGPT's layout, `from_foreign` turns any of these into our shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.lib.config import InputError
from pipelines.lib.shards import (
    CHUNK_BYTES,
    TOKEN_BYTES,
    Shard,
    TokenFolder,
    Tokens,
    dtype_for,
    file_sha256,
    fingerprint,
    folder_sha256,
    make_folder,
    write_atomically,
    write_manifest,
    write_shard,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GPT2_VOCAB_SIZE = 50257
GPT2_EOT = 50256
MAX_META_BYTES = 64 * 2**20
MAX_UNPACKED_BYTES = 4 * 2**30  # a compressed .npz is unpacked in memory; more than this is refused
WHOLE_HASH_BYTES = 2**30  # larger files are fingerprinted by 256 samples of 1 MiB


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_foreign(path: Path) -> TokenFolder:
    """Tokens in a layout of others as a TokenFolder. Raises InputError that names the file and its fault."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder of tokens; make one with `python -m pipelines.tokenize`")
    meta: dict[str, Any] = {}
    if path.is_file():
        found = {"train": [path]}
    else:
        if (path / "records").is_dir():
            raise InputError(f"{path}: tokenisation did not finish; run the same pipelines.tokenize command to resume")
        found = _token_files(path)
    beside = _beside(path)
    if (beside / "meta.pkl").is_file():
        meta = read_meta(beside / "meta.pkl")
    splits: dict[str, list[Shard]] = {name: [] for name in found}
    dtypes = {}
    for split, files in found.items():
        for file in files:
            for name, shard, dtype in _shards_of(file, split, meta):
                splits.setdefault(name, []).append(shard)
                dtypes[shard.path, shard.member] = dtype
    if len(set(dtypes.values())) > 1:
        raise InputError(f"{path}: files of different token types {sorted({str(d) for d in dtypes.values()})}")
    if not dtypes:
        raise InputError(f"{path}: no token array found")
    is_bin = all(Path(p).suffix == ".bin" for p, _ in dtypes)
    eot_id = meta.get("eot_id", GPT2_EOT if is_bin and not meta else None)
    tokens = {
        name: Tokens(tuple(shards), next(iter(dtypes.values())), None, eot_id)
        for name, shards in splits.items()
        if shards
    }
    low, high = _id_range(tokens)
    vocab_size = meta.get("vocab_size") or max(GPT2_VOCAB_SIZE if is_bin else 0, high + 1)
    if low < 0 or high >= vocab_size:
        raise InputError(f"{path}: token ids {low} to {high} found, but the vocabulary has ids 0 to {vocab_size - 1}")
    tokenizer_dir = beside / "tokenizer" if (beside / "tokenizer").is_dir() else None
    manifest: dict[str, Any] = {
        "layout": "nanogpt" if is_bin else "numpy",
        "dtype": str(dtype),
        "eot_id": eot_id,
        "tokenizer": {
            "folder": tokenizer_dir and tokenizer_dir.name,
            "sha256": folder_sha256(tokenizer_dir) if tokenizer_dir else _meta_sha256(meta),
            "vocab_size": vocab_size,
            "kind": "chars" if "stoi" in meta else meta.get("tokenizer"),
        },
        "source": {"kind": "tokens", "path": str(path)},
        "splits": {
            name: {
                "tokens": t.n_tokens,
                "documents": t.n_documents,
                "bytes": None,
                "shards": [
                    {
                        "file": Path(s.path).name,
                        "tokens": s.tokens,
                        "documents": s.documents,
                        "sha256": _content_hash(t, i),
                    }
                    for i, s in enumerate(t.shards)
                ],
            }
            for name, t in tokens.items()
        },
    }
    manifest["fingerprint"] = fingerprint(manifest)
    return TokenFolder(
        path, manifest, tokens, manifest["fingerprint"], vocab_size, tokenizer_dir, _meta_token_bytes(meta, vocab_size)
    )


def _beside(path: Path) -> Path:
    """Where the meta.pkl and tokenizer/ of a token folder, or of one .bin file, would lie."""
    return path.parent if path.suffix == ".bin" and path.is_file() else path


def _token_files(folder: Path) -> dict[str, list[Path]]:
    """{split: files} of a folder of .bin or .npy / .npz files."""
    bins = {name: [folder / f"{name}.bin"] for name in ("train", "val", "test") if (folder / f"{name}.bin").is_file()}
    if bins:
        return bins
    files = sorted(p for p in folder.iterdir() if p.suffix in (".npy", ".npz") and not p.name.startswith("offsets_"))
    if not files:
        there = sorted(p.name for p in folder.iterdir())[:5]
        raise InputError(
            f"{folder}: no manifest.json, train.bin, .npy or .npz here; found {', '.join(there) or 'an empty folder'}; "
            "make shards with `python -m pipelines.tokenize`"
        )
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(_split_of(file.stem), []).append(file)
    return found


def _split_of(name: str) -> str:
    return next((split for split in ("val", "test") if split in name.lower()), "train")


def _shards_of(file: Path, split: str, meta: dict[str, Any]) -> Iterator[tuple[str, Shard, np.dtype]]:
    size = file.stat().st_size
    if file.suffix == ".bin":
        dtype = np.dtype("<u2" if meta.get("vocab_size", GPT2_VOCAB_SIZE) <= 65535 else "<u4")  # nanoGPT's own rule
        if size == 0 or size % dtype.itemsize:
            raise InputError(f"{file}: expected {dtype} tokens, {dtype.itemsize} bytes each, found {size} bytes")
        yield split, Shard(str(file.absolute()), size // dtype.itemsize, 0), dtype
    elif file.suffix == ".npy":
        with open(file, "rb") as stream:
            dtype, count = _array_header(stream, str(file))
            at = stream.tell()
        if size != at + count * dtype.itemsize:
            raise InputError(f"{file}: expected {at + count * dtype.itemsize} bytes, found {size}; copy it anew")
        offsets = file.with_name(f"offsets_{file.name}")
        documents, where = 0, None
        if offsets.is_file():
            with open(offsets, "rb") as stream:
                kind, rows = _array_header(stream, str(offsets))
                where = (str(offsets.absolute()), stream.tell())
            documents = _check_offsets(np.load(offsets, mmap_mode="r", allow_pickle=False), kind, rows, count, offsets)
        yield split, Shard(str(file.absolute()), count, at, documents, where), dtype
    elif file.suffix == ".npz":
        yield from _npz_shards(file)
    else:
        raise InputError(
            f"{file}: token files are .bin, .npy, .npz or a folder; for text use `python -m pipelines.tokenize`"
        )


def _array_header(stream: Any, where: str) -> tuple[np.dtype, int]:
    """(dtype, length) from the header of a .npy stream; the stream then stands at the first element."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise InputError(f"{where}: expected a .npy array, found {str(error).splitlines()[0]}") from None
    if len(shape) != 1 or dtype.kind not in "ui":
        raise InputError(f"{where}: expected one row of whole numbers, found {dtype} of shape {shape}")
    return dtype, int(shape[0])


def _check_offsets(offsets: np.ndarray, dtype: np.dtype, rows: int, tokens: int, where: object) -> int:
    """Number of documents of an offsets array (rows = documents + 1, from 0 to tokens, never falling)."""
    ok = dtype == np.dtype("<i8") and rows >= 1 and offsets[0] == 0 and offsets[-1] == tokens
    if not ok or bool((np.diff(offsets) < 0).any()):
        ends = f"{offsets[0]} .. {offsets[-1]}" if rows else "nothing"
        raise InputError(f"{where}: expected int64 offsets rising from 0 to {tokens}, found {dtype} {ends}")
    return rows - 1


def _npz_shards(file: Path) -> Iterator[tuple[str, Shard, np.dtype]]:
    """The arrays of one .npz. Stored arrays are mapped where they lie in the archive, compressed ones unpacked."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
            unpacked = sum(m.file_size for m in members.values() if m.compress_type != zipfile.ZIP_STORED)
            if unpacked > MAX_UNPACKED_BYTES:
                raise InputError(f"{file}: unpacks to {unpacked} bytes, at most {MAX_UNPACKED_BYTES}; save it unpacked")
            headers = {}
            for name, member in members.items():
                with archive.open(member) as stream:
                    dtype, count = _array_header(stream, f"{file}[{name}]")
                    headers[name] = dtype, count, stream.tell()
                    if member.file_size != stream.tell() + count * dtype.itemsize:
                        raise InputError(f"{file}[{name}]: expected {count} elements, found {member.file_size} bytes")
    except zipfile.BadZipFile as error:
        raise InputError(f"{file}: expected a .npz archive, found {error}; copy it anew") from None
    for name, (dtype, count, at) in headers.items():
        if name.startswith("offsets"):
            continue
        member = members[name]
        stored = member.compress_type == zipfile.ZIP_STORED
        offsets_name = next((n for n in (f"offsets_{name}", "offsets") if n in members), None)
        documents, where = 0, None
        if offsets_name is not None and members[offsets_name].compress_type == zipfile.ZIP_STORED:
            kind, rows, start = headers[offsets_name]
            where = (str(file.absolute()), _stored_at(file, members[offsets_name]) + start)
            with np.load(file, allow_pickle=False) as loaded:
                documents = _check_offsets(loaded[offsets_name], kind, rows, count, f"{file}[{offsets_name}]")
        shard = Shard(
            str(file.absolute()),
            count,
            _stored_at(file, member) + at if stored else 0,
            documents,
            where,
            None if stored else name,
        )
        yield _split_of(f"{file.stem} {name}"), shard, dtype


def _stored_at(file: Path, member: zipfile.ZipInfo) -> int:
    """Where the bytes of an uncompressed zip member begin: its local header has two lengths at 26 and 28."""
    with open(file, "rb") as stream:
        stream.seek(member.header_offset)
        header = stream.read(30)
    return member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _id_range(splits: dict[str, Tokens]) -> tuple[int, int]:
    low, high = 0, 0
    for tokens in splits.values():
        for i in range(len(tokens.shards)):
            array = tokens.array(i)
            for start in range(0, len(array), CHUNK_BYTES):
                piece = array[start : start + CHUNK_BYTES]
                low, high = min(low, int(piece.min())), max(high, int(piece.max()))
    return low, high


def _content_hash(tokens: Tokens, shard: int) -> str:
    """sha256 of a shard's tokens; of 256 evenly spread MiB of them where they are more than 1 GiB."""
    array = tokens.array(shard)
    digest = hashlib.sha256(str(array.nbytes).encode())
    if array.nbytes <= WHOLE_HASH_BYTES:
        digest.update(np.ascontiguousarray(array).data)
    else:
        n = 2**20 // array.itemsize
        for start in np.linspace(0, len(array) - n, 256).astype(np.int64):
            digest.update(np.ascontiguousarray(array[start : start + n]).data)
    return digest.hexdigest()


# ---- meta.pkl --------------------------------------------------------------------------------------------------------


class _PlainUnpickler(pickle.Unpickler):
    """Containers, text and numbers only: whatever names a function or a class is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise InputError(f"it asks for {module}.{name}, which could run code; a meta.pkl holds plain data only")

    def persistent_load(self, pid: Any) -> Any:
        raise InputError("it refers to outside objects; a meta.pkl holds plain data only")


def read_meta(path: Path) -> dict[str, Any]:
    """nanoGPT's meta.pkl: {vocab_size, stoi: {char: id}, itos: {id: char}}, extra keys kept. Raises InputError."""
    size = path.stat().st_size
    if size > MAX_META_BYTES:
        raise InputError(f"{path}: {size} bytes are too many for a meta.pkl (at most {MAX_META_BYTES})")
    try:
        meta = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except InputError as error:
        raise InputError(f"{path}: refused, {error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(f"{path}: expected a pickled dict, found {type(error).__name__}: {error}") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("vocab_size"), int) or meta["vocab_size"] < 1:
        raise InputError(f"{path}: expected a dict with a whole vocab_size, found {str(meta)[:80]}")
    itos = meta.get("itos")
    if itos is not None and not (isinstance(itos, dict) and all(isinstance(i, int) for i in itos)):
        raise InputError(f"{path}: itos must map ids to characters")
    return meta


def _meta_token_bytes(meta: dict[str, Any], vocab_size: int) -> np.ndarray | None:
    itos = meta.get("itos")
    if not itos:
        return None
    table = np.zeros(vocab_size, np.int32)
    for i, piece in itos.items():
        if 0 <= i < vocab_size:
            table[i] = len(piece if isinstance(piece, bytes) else str(piece).encode())
    return table


def _meta_sha256(meta: dict[str, Any]) -> str | None:
    if not meta:
        return None
    itos = sorted((i, repr(piece)) for i, piece in (meta.get("itos") or {}).items())
    return hashlib.sha256(json.dumps([meta["vocab_size"], itos]).encode()).hexdigest()


# ---- converters ------------------------------------------------------------------------------------------------------


def to_nanogpt(folder: TokenFolder, out: Path) -> dict[str, int]:
    """Write train.bin, val.bin and meta.pkl (with stoi and itos where every id is a character) below `out`.

    The type is nanoGPT's: uint16 up to 65535 ids, else uint32. The tokenizer is copied to out/tokenizer, since nanoGPT
    has no place for one. Returns {split: tokens}.
    """
    make_folder(out)
    dtype = np.dtype("<u2" if folder.vocab_size <= 65535 else "<u4")
    counts = {}
    for name, tokens in folder.splits.items():
        temporary = out / f".{name}.bin.tmp"
        with open(temporary, "wb") as file:
            for i in range(len(tokens.shards)):
                array = tokens.array(i)
                for start in range(0, len(array), CHUNK_BYTES):
                    file.write(array[start : start + CHUNK_BYTES].astype(dtype, copy=False).tobytes())
        temporary.replace(out / f"{name}.bin")
        counts[name] = tokens.n_tokens
    meta: dict[str, Any] = {"vocab_size": folder.vocab_size}
    if folder.manifest["eot_id"] is not None:
        meta["eot_id"] = folder.manifest["eot_id"]
    if folder.tokenizer_dir is not None:
        copy_files(folder.tokenizer_dir, out / "tokenizer")
        from pipelines.lib.vocab import characters, load_tokenizer

        chars = characters(load_tokenizer(folder.tokenizer_dir))
        if chars is None:
            meta["tokenizer"] = "huggingface"
        else:
            meta |= {"itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    write_atomically(out / "meta.pkl", pickle.dumps(meta, protocol=4))
    return counts


def from_foreign(
    folder: TokenFolder, out: Path, shard_tokens: int = 1 << 25, tokenizer: PreTrainedTokenizerFast | None = None
) -> dict[str, Any]:
    """Write tokens of another layout as our shards below `out` and return the manifest.

    Documents come from the offsets, else from end-of-text tokens, else the split is one document. A shard ends with
    the last document that fits into shard_tokens; a document longer than that is cut and counted once per piece.
    tokenizer: what made the tokens; without it the one beside them, or one made from meta.pkl's characters.
    Raises InputError if it gives other ids than what lies beside the tokens, or none is known.
    """
    from pipelines.lib import vocab

    beside, where = _tokenizer_beside(folder.path)
    if tokenizer is not None and beside is not None and tokenizer.get_vocab() != beside.get_vocab():
        raise InputError(
            f"{where} beside the tokens has {len(beside)} ids for other pieces of text than the tokenizer given "
            f"({len(tokenizer)} ids); leave tokenizer= out to use what lies there"
        )
    made = tokenizer or beside
    if made is None:
        raise InputError(f"{folder.path}: no tokenizer beside the tokens; name one with tokenizer=FOLDER")
    high = _id_range(folder.splits)[1]
    if high >= len(made):
        raise InputError(f"the tokenizer has {len(made)} ids, but {folder.path} holds token id {high}")
    make_folder(out)
    made.save_pretrained(str(out / "tokenizer"))
    table = vocab.token_bytes(made)
    buffer = io.BytesIO()
    np.save(buffer, table)
    write_atomically(out / TOKEN_BYTES, buffer.getvalue())
    dtype = dtype_for(len(made))
    splits: dict[str, Any] = {}
    for name, tokens in folder.splits.items():
        entries = []
        for number, (begin, end, ends) in enumerate(_cuts(tokens, shard_tokens)):
            piece = tokens.window(begin, end - begin)
            if folder.splits[name].dtype != dtype:
                piece = piece.astype(dtype)
            n_bytes = int(table[piece].sum(dtype=np.int64))
            offsets = np.concatenate([[0], ends - begin]).astype(np.int64)
            path = out / f"{name}-{number:05d}.arrow"
            entries.append(write_shard(path, np.ascontiguousarray(piece), offsets, n_bytes))
        splits[name] = {"shards": entries}
    return write_manifest(
        out,
        {
            "dtype": str(dtype),
            "eot_id": folder.manifest["eot_id"],
            "tokenizer": {
                "folder": "tokenizer",
                "sha256": folder_sha256(out / "tokenizer"),
                "vocab_size": len(made),
                "kind": "chars" if vocab.characters(made) else "hf",
            },
            "token_bytes": {
                "file": TOKEN_BYTES,
                "size": (out / TOKEN_BYTES).stat().st_size,
                "sha256": file_sha256(out / TOKEN_BYTES),
            },
            "source": folder.manifest["source"],
            "splits": splits,
        },
    )


def _tokenizer_beside(path: Path) -> tuple[PreTrainedTokenizerFast | None, Path]:
    """(the tokenizer in a folder of tokens, where it was found): tokenizer/, or the characters of meta.pkl."""
    from pipelines.lib import vocab

    folder, meta = _beside(path) / "tokenizer", _beside(path) / "meta.pkl"
    if folder.is_dir():
        return vocab.load_tokenizer(folder), folder
    itos = (read_meta(meta).get("itos") if meta.is_file() else None) or {}
    is_characters = all(isinstance(c, str) and len(c) == 1 for c in itos.values())
    if not itos or not is_characters or sorted(itos) != list(range(len(itos))):
        return None, meta
    return vocab.chars_tokenizer([itos[i] for i in range(len(itos))]), meta


def _cuts(tokens: Tokens, shard_tokens: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(first token, end, document ends) of each shard to write; the ends rise to `end`."""
    ends_at = []
    if tokens.n_documents:
        for i in range(len(tokens.shards)):
            ends_at.append(tokens._document_offsets(i)[1:] + int(tokens.first[i]))
    elif tokens.eot_id is not None:
        for start in range(0, tokens.n_tokens, CHUNK_BYTES):
            piece = tokens.window(start, min(CHUNK_BYTES, tokens.n_tokens - start))
            ends_at.append(np.flatnonzero(piece == tokens.eot_id) + 1 + start)
    ends = np.unique(np.concatenate([*ends_at, [tokens.n_tokens]]).astype(np.int64))  # empty documents go
    begin, row = 0, 0
    while begin < tokens.n_tokens:
        limit = min(begin + shard_tokens, tokens.n_tokens)
        stop = int(np.searchsorted(ends, limit, "right"))  # the documents that end by then
        inside = ends[row:stop] if stop > row else np.array([limit])
        yield begin, int(inside[-1]), inside
        begin, row = int(inside[-1]), stop


def copy_files(source: Path, target: Path) -> None:
    """Copy the plain files of one folder (a tokenizer) into another."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            write_atomically(target / file.name, file.read_bytes())
