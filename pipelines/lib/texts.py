"""Texts as sequences of a model's tokens, with the bytes behind them, ready for pipelines.lib.scoring.

`open_text` reads any source of pipelines.lib.corpus, `open_data` a split of a token folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.spec import kind_of, plain
from pipelines.lib.config import InputError
from pipelines.lib.corpus import Source

if TYPE_CHECKING:
    from pipelines.lib.shards import Tokens

BASELINE_BYTES = 16 << 20  # of a text, that gzip and xz are measured on; xz takes about 10 s for them


class Stream:
    """A split of a token folder as one sequence."""

    def __init__(self, tokens: Tokens, first: int | None = None):
        self.tokens, self.n = tokens, min(tokens.n_tokens, first or tokens.n_tokens)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.tokens.window(part.start, part.stop - part.start)

    def blocks(self, size: int = 1 << 20) -> Iterator[np.ndarray]:
        """All of it in order, `size` tokens at a time."""
        for start in range(0, self.n, size):
            yield self[start : min(start + size, self.n)]


@dataclass
class Text:
    """A text as tokens, ready to be scored.

    name: in tables and metrics.  sequences: each begins with a token that is not scored.  table: bytes behind each
    id, [V] (zeros: not known).  n_bytes: of the text that is scored.  head: the text itself, as much of it as the
    baselines take; head_ids: its tokens.  fingerprint: sha256.  notes: how it was made into tokens.  largest: id.
    """

    name: str
    sequences: Sequence[Any]
    table: np.ndarray
    n_bytes: int | None
    head: bytes
    head_ids: np.ndarray | None
    fingerprint: str
    notes: dict[str, Any]
    largest: int
    stream: Tokens | None = None

    @property
    def n_targets(self) -> int:
        return sum(max(0, len(s) - 1) for s in self.sequences)

    def documents(self, window: Any) -> np.ndarray | int:
        """Which document each target of a window belongs to."""
        if self.stream is None:
            return window.sequence
        return self.stream.documents(window.first + 1, window.end - window.first)[0]


def read_documents(source: Source, text_mb: float | None) -> Iterator[tuple[bool, str]]:
    """(whether a document begins here, text): the pieces of a source's documents."""
    counts: Counter[str] = Counter()
    left = sys.maxsize if text_mb is None else round(text_mb * 2**20)
    plan = source.plan(1 << 62)
    for piece in plan.slices:
        for document in source.read(piece, counts):
            text = document.text
            if document.n_bytes > left:
                text = text.encode()[:left].decode(errors="ignore")  # a character that the limit cuts is left out
            yield document.begins, text
            left -= document.n_bytes
            if left <= 0:
                return
    changed = {k: n for k, n in (plan.counts + counts).items() if n}
    if changed:
        words = [f"{n:,} {what.replace('_', ' ')}" for what, n in changed.items()]
        print(f"text: {', '.join(words)}", flush=True)


def open_tokenizer(folder: Path) -> Any:
    from pipelines.lib.vocab import load_tokenizer

    try:
        return load_tokenizer(folder)
    except InputError as error:
        raise InputError(f"{folder}: text and tasks need the model's tokenizer ({error})") from None


def encoder_of(tokenizer: Any, folder: Path) -> Any:
    """The fast encoder of pipelines.lib.vocab for a loaded tokenizer: special tokens in a text are letters to it."""
    import tempfile

    from pipelines.lib.vocab import Encoder

    if (folder / "tokenizer.json").is_file():
        return Encoder(folder)
    with tempfile.TemporaryDirectory() as made:
        tokenizer.backend_tokenizer.save(f"{made}/tokenizer.json")
        return Encoder(made)


def open_text(setting: str | Source, model: Path, text_mb: float | None = None) -> Text:
    """A text source as tokens of the model's tokenizer. Raises InputError if it is empty or has nothing to score."""
    from pipelines.lib.corpus import Files, Hub, source
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.vocab import token_bytes

    origin = source(setting)
    if isinstance(origin, Files):
        origin = replace(origin, path=str(storage_path(origin.path)))
    elif isinstance(origin, Hub) and storage_path(origin.name).exists():
        origin = replace(origin, name=str(storage_path(origin.name)))
    tokenizer = open_tokenizer(model)
    encode, table = encoder_of(tokenizer, model), token_bytes(tokenizer).astype(np.int64)
    prefix = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    pieces: list[list[np.ndarray]] = []
    total, digest, head, head_ids = 0, hashlib.sha256(), bytearray(), []
    for begins, text in read_documents(origin, text_mb):
        ids, data = encode(text).astype(np.uint32), text.encode()
        if begins or not pieces:
            pieces.append([] if prefix is None else [np.array([prefix], np.uint32)])
            digest.update(b"\0")
        pieces[-1].append(ids)
        digest.update(data)
        total += len(data)
        if len(head) < BASELINE_BYTES:
            head += data
            head_ids.append(ids)
    shown = setting if isinstance(setting, str) else json.dumps(plain(setting))
    if not total:
        raise InputError(f"text={shown}: no text in it")
    sequences = [s for s in (np.concatenate(p) for p in pieces) if len(s)]  # a normaliser may leave nothing of a text
    n_tokens = sum(len(s) for s in sequences) - (len(sequences) if prefix is not None else 0)
    if not sum(len(s) - 1 for s in sequences):
        raise InputError(
            f"text={shown}: {n_tokens} token(s) in {len(sequences)} document(s); at least 2 are needed, for the "
            "tokenizer has no beginning- or end-of-text token to predict the first one from"
        )
    in_tokens = int(sum(table[p].sum() for s in pieces for p in (s if prefix is None else s[1:])))
    first = 0 if prefix is not None else int(sum(table[s[0]] for s in sequences))
    flattery(in_tokens, total, len(sequences))
    notes = {
        "source": plain(setting),
        "documents": len(sequences),
        "tokens_in_all": n_tokens,
        "bytes_in_all": total,
        "bytes_in_tokens": in_tokens,
        "begins_with": None if prefix is None else tokenizer.convert_ids_to_tokens(prefix),
        "ends_of_documents": "not scored",
        "tokenizer_backend": encode.backend,
    }
    ids = np.concatenate(head_ids)
    digest.update(b"" if prefix is None else str(prefix).encode())
    return Text(
        short_name(origin),
        sequences,
        table,
        total - first,
        bytes(head),
        ids,
        digest.hexdigest(),
        notes,
        int(max(s.max() for s in sequences)),
    )


def short_name(origin: Source) -> str:
    """A source's name in tables, metrics and folders: a file's or folder's stem, a data set's name, or its kind."""
    from glob import has_magic

    parts = [p for p in Path(getattr(origin, "path", getattr(origin, "name", ""))).parts if not has_magic(p)]
    name = parts[-1].partition(".")[0] if parts else kind_of(origin)
    return re.sub(r"[^\w-]+", "_", name).lower() or "text"


def open_data(path: str | Path, split: str, model: Path, first: int | None = None) -> Text:
    """A split of a token folder, as training sees it; its `first` tokens only, if given.

    Raises InputError for a folder or split that is not there, or was made with another tokenizer than the model's.
    """
    from pipelines.lib.shards import MANIFEST, TokenFolder, check_file, file_sha256
    from pipelines.lib.vocab import token_bytes

    folder = TokenFolder.open(path)
    tokens = folder.split(split)
    if (folder.path / MANIFEST).is_file():
        for entry in folder.manifest["splits"][split]["shards"]:  # the other splits may be large, and do not matter
            check_file(folder.path, entry, "sha256")
    stream = Stream(tokens, first)
    if len(stream) < 2:
        raise InputError(f"{folder.path}: split {split!r} has {len(stream)} token to score; at least 2 are needed")
    theirs = folder.tokenizer_dir / "tokenizer.json" if folder.tokenizer_dir else None
    ours = model / "tokenizer.json"
    if theirs and theirs.is_file() and ours.is_file() and file_sha256(theirs) != file_sha256(ours):
        raise InputError(
            f"{folder.path} was made with another tokenizer than the model's ({theirs} and {ours} differ); "
            "give the text itself: text=..."
        )
    owner = folder.tokenizer_dir or (model if ours.is_file() else None)  # nanoGPT's files name no tokenizer
    tokenizer = open_tokenizer(owner) if owner is not None else None
    known = folder.token_bytes()
    if known is None and tokenizer is not None:
        known = token_bytes(tokenizer)
    largest = max(int(block.max()) for block in stream.blocks())
    table = np.zeros(largest + 1, np.int64)
    n_bytes = None
    if known is not None and largest < len(known):
        table = np.asarray(known, np.int64)
        in_tokens = sum(int(table[block].sum()) for block in stream.blocks())
        n_bytes = in_tokens - int(table[stream[0:1]].sum())
        if tokens.n_bytes and len(stream) == tokens.n_tokens:
            flattery(in_tokens, tokens.n_bytes, tokens.n_documents)
    notes = {
        "source": str(folder.path),
        "split": split,
        "documents": tokens.n_documents,
        "tokens_in_all": tokens.n_tokens,
        "begins_with": None,
        "ends_of_documents": "scored, as in training",
    }
    head, head_ids = _decoded(tokenizer, stream, table)
    return Text(split, [stream], table, n_bytes, head, head_ids, folder.fingerprint, notes, largest, stream=tokens)


def flattery(in_tokens: int, n_bytes: int, documents: int) -> None:
    """Say so if tokens stand for another number of bytes than their text has (one a document is a dummy space)."""
    if abs(in_tokens - n_bytes) > 0.005 * n_bytes + documents:
        print(
            f"warning: the tokens of this text stand for {in_tokens:,} bytes of its {n_bytes:,}: the tokenizer alters "
            "text or has no tokens for some of it, so bits per byte are no fair measure of the model"
        )


def _decoded(tokenizer: Any, stream: Stream, table: np.ndarray) -> tuple[bytes, np.ndarray | None]:
    """The text of a split and its tokens, without ends of documents, as much of it as the baselines take."""
    if tokenizer is None or not table.any():
        return b"", None
    parts, size = [], 0
    for block in stream.blocks(1 << 16):
        parts.append(block[table[block] > 0].astype(np.uint32))
        size += int(table[block].sum())
        if size >= BASELINE_BYTES:
            break
    ids = np.concatenate(parts)
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)).encode(), ids
