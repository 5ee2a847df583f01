"""Turn text into token shards, which every training stage reads.

reads   source=     stdlib, a file, folder or pattern, a Hub data set (pipelines.lib.corpus)
        tokenizer=  bpe (trained here), bytes, chars, or any existing tokenizer (pipelines.lib.vocab)
writes  out=        manifest.json, tokenizer/, train-*.arrow, val-*.arrow (pipelines.lib.shards)

Killed at any moment, the same command goes on: finished shards are kept and the result is bitwise the same.
Three more commands:

    python -m pipelines.tokenize compare TEXT TOKENIZER ...         tokens and bits per byte of several tokenizers
    python -m pipelines.tokenize convert FOLDER out=FOLDER          to and from nanoGPT's train.bin, .npy, .npz
    python -m pipelines.tokenize streams FOLDER ... out=FOLDER      the aligned tokens of several folders as ids

How the work is shared out: the driver lists slices of the corpus and groups them into units; Ray Data carries only
the numbers of the units. A task reads its unit, encodes it, writes and hashes its own shards, and leaves a small record
when they are whole. So nothing large passes through Ray, memory does not grow with the corpus, and going on after a
kill means to leave out the units that have a record.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import functools
import hashlib
import heapq
import inspect
import io
import json
import math
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from models.spec import ConfigError, build, flatten, plain
from pipelines.lib import corpus, vocab
from pipelines.lib.cluster import usable_cpus
from pipelines.lib.config import InputError, command, describe, read_yaml, write_yaml
from pipelines.lib.corpus import Document, Plan, Slice, Source, Stdlib
from pipelines.lib.output import shown
from pipelines.lib.progress import Progress
from pipelines.lib.shards import (
    MANIFEST,
    TOKEN_BYTES,
    TokenFolder,
    check_file,
    dtype_for,
    file_sha256,
    folder_sha256,
    make_folder,
    read_manifest,
    write_atomically,
    write_json,
    write_manifest,
    write_shard,
)
from pipelines.lib.vocab import BPE, Encoder, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pipelines.lib.estimate import Estimate

FORMAT_VERSION = 1
SETTINGS = "config.yaml"
RECORDS = "records"
LOCK = ".lock"
UNIT_BYTES = 16 * 2**20  # of text: about a second of work, 4 M tokens, a shard of 8 MB
SMALL_UNIT_BYTES = 2**20
UNITS = 64  # a small corpus is cut into about so many units, so that many workers have something to do
SHARD_TOKENS = 1 << 24  # a unit that turns out larger (a packed file, a stream) fills several shards
HASHES = 1 << 64
ESTIMATE_MB = 4  # of text that an estimate trains a tokenizer on
ESTIMATE_S = 3.0  # of encoding, after which an estimate looks at no further unit


@dataclass(frozen=True)
class TokenizeConfig:
    """What to tokenize, how, and where to.

    source: where text comes from: a kind, or a file, folder or pattern
    tokenizer: how text becomes ids: a kind, or a tokenizer's file, folder or Hub name
    out: folder for the shards
    split: documents draws whole documents for validation; tail takes the last val_fraction of the characters
    val_fraction: share of the documents (or characters) for validation; 0 for no validation split
    val_documents: number of documents for validation, instead of val_fraction
    seed: which documents are drawn for validation
    end_of_text: end each document with the tokenizer's end-of-text token; by default if it has one
    shard_mb: text per shard in megabytes (2^20 bytes); by default 16, less for a corpus below 1 GB
    workers: processes; by default one per CPU, 0 works in this process without Ray
    track: where the run is logged
    """

    source: Source | str = field(default_factory=Stdlib)
    tokenizer: Vocabulary | str = field(default_factory=BPE)
    out: str = "data/stdlib"
    split: Literal["documents", "tail"] = "documents"
    val_fraction: float = 0.05
    val_documents: int | None = None
    seed: int = 0
    end_of_text: bool | None = None
    shard_mb: float | None = None
    workers: int | None = None
    track: Literal["mlflow", "none"] = "mlflow"

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", corpus.source(self.source))
        object.__setattr__(self, "tokenizer", vocab.vocabulary(self.tokenizer))
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"val_fraction={self.val_fraction} must be at least 0 and below 1")
        if self.val_documents is not None and self.val_documents < 0:
            raise ConfigError(f"val_documents={self.val_documents} must not be negative")
        if self.val_documents is not None and self.split == "tail":
            raise ConfigError("val_documents has no effect with split=tail; give val_fraction")
        if self.shard_mb is not None and self.shard_mb <= 0:
            raise ConfigError(f"shard_mb={self.shard_mb} must be above 0")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers={self.workers} must not be negative; 0 works in this process")

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is written."""
        tree = plain(self)
        return {k: v for k, v in tree.items() if k not in ("out", "workers", "track")}


# ---- one unit of work, in any process --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a unit must know; plain data, so that it reaches a worker as JSON.

    threshold: a document whose hash is below it is for validation.  tail_at: the number of the first character for
    validation, instead.  first_characters: characters before each unit, for tail_at.
    """

    source: Source
    out: str
    units: list[list[Slice]]
    backend: str
    dtype: str
    eot_id: int | None
    seed: int
    threshold: int = 0
    tail_at: int | None = None
    first_characters: tuple[int, ...] = ()


@functools.lru_cache(maxsize=1)
def _encoder(folder: str, backend: str) -> Encoder:
    return Encoder(folder, backend)


class Shards:
    """The shards of one split that one unit writes: NAME-UNIT.arrow, and NAME-UNIT.PART.arrow for what is too much."""

    def __init__(self, job: Job, split: str, unit: int) -> None:
        self.job, self.split, self.unit = job, split, unit
        self.entries: list[dict[str, Any]] = []
        self._clear()

    def _clear(self) -> None:
        self.pieces: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.n_tokens = self.n_bytes = 0

    def add(self, ids: np.ndarray, n_bytes: int) -> None:
        self.pieces.append(ids.astype(self.job.dtype, copy=False))
        self.lengths.append(len(ids))
        self.n_tokens += len(ids)
        self.n_bytes += n_bytes
        if self.n_tokens >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        if not self.n_tokens:
            return
        part = f".{len(self.entries):03d}" if self.entries else ""
        path = Path(self.job.out) / f"{self.split}-{self.unit:05d}{part}.arrow"
        offsets = np.cumsum([0, *self.lengths])
        self.entries.append(write_shard(path, np.concatenate(self.pieces), offsets, self.n_bytes))
        self._clear()


def tokenize_unit(job: Job, unit: int) -> dict[str, Any]:
    """Read, encode and write one unit; returns its record, which is also left in out/records when all is on disk."""
    started = time.perf_counter()
    encoder = _encoder(str(Path(job.out) / "tokenizer"), job.backend)
    encoder.cuts = 0
    counts: Counter[str] = Counter()
    shards = {name: Shards(job, name, unit) for name in ("train", "val")}
    eot = [job.eot_id] if job.eot_id is not None else []
    audited = False
    for document, split in _documents(job, unit, counts):
        if not audited:
            audited = True
            if not encoder.audit(document.text):
                raise InputError(
                    f"{document.id}: {encoder.backend} and tokenizers encode it differently; please report it"
                )
        ids = encoder(document.text)
        if document.ends:
            counts[f"{split}_documents"] += 1
            counts["documents_with_end_of_text_letters"] += vocab.END_OF_TEXT in document.text
            if eot:
                ids = np.append(ids.astype(job.dtype, copy=False), np.array(eot, job.dtype))
        shards[split].add(ids, document.n_bytes)
    for shard in shards.values():
        shard.flush()
    counts["cut_runs"] += encoder.cuts
    record = {
        "unit": unit,
        "shards": {name: shard.entries for name, shard in shards.items()},
        "counts": {name: n for name, n in sorted(counts.items()) if n},
    }
    write_json(_record_path(job, unit), record)
    return {**record, "seconds": time.perf_counter() - started}


def _record_path(job: Job, unit: int) -> Path:
    return Path(job.out) / RECORDS / f"{unit:05d}.json"


def _documents(job: Job, unit: int, counts: Counter[str]) -> Iterator[tuple[Document, str]]:
    """The documents of a unit and the split of each; at the tail's begin a document is parted in two."""
    at = job.first_characters[unit] if job.tail_at is not None else 0
    for piece in job.units[unit]:
        for document in job.source.read(piece, counts):
            if job.tail_at is None:
                yield document, "val" if document_hash(job.seed, document.id) < job.threshold else "train"
                continue
            end = at + len(document.text)
            if at < job.tail_at < end:
                cut = job.tail_at - at
                first, rest = document.text[:cut], document.text[cut:]
                yield document._replace(text=first, n_bytes=len(first.encode()), ends=False), "train"
                yield document._replace(text=rest, n_bytes=len(rest.encode()), begins=False), "val"
            else:
                yield document, "train" if end <= job.tail_at else "val"
            at = end


def document_hash(seed: int, name: str) -> int:
    """A number below 2^64 that depends on the seed and the document's name alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "big")


# ---- the units, by Ray Data or here ----------------------------------------------------------------------------------


def in_process(job: Job, pending: Sequence[int]) -> Iterator[dict[str, Any]]:
    for unit in pending:
        yield tokenize_unit(job, unit)


def on_ray(job: Job, pending: Sequence[int], workers: int) -> Iterator[dict[str, Any]]:
    """The units as a Ray Data job: a dataset of unit numbers, mapped by tasks that write their shards themselves.

    Ray Data takes 0.15 s from the end of a task to the next one's begin (measured; its scheduling loop), so a task does
    several units: many at first, single ones at last (`shares`), for all workers to end together.
    """
    import logging

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that its bars are off
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    shared = ray.put(json.dumps(plain(dc.replace(job, units=[]))))
    rows = [
        {"units": json.dumps({unit: [list(dc.astuple(s)) for s in job.units[unit]] for unit in share})}
        for share in shares(pending, workers)
    ]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    work = functools.partial(_tokenize_row, job=shared)
    done = data.map(work, compute=ray.data.TaskPoolStrategy(size=workers), num_cpus=1)
    for row in done.iter_rows():
        for record in json.loads(row["records"]):
            if "error" in record:
                raise InputError(record["error"])
            yield record


def shares(pending: Sequence[int], workers: int) -> list[list[int]]:
    """Consecutive units for one task each: a share is the 2 * workers-th part of what is left, at least one unit."""
    left, found = list(pending), []
    while left:
        n = max(1, len(left) // (2 * workers))
        found.append(left[:n])
        left = left[n:]
    return found


def _tokenize_row(row: dict[str, Any], job: Any) -> dict[str, Any]:
    """A row {units: {number: slices}} -> {records}, both as JSON. Bad input comes back as a word, not as a trace.

    Where Ray gives the task to another worker, because the first one was killed, finished units are not done again.
    """
    units = {int(n): [Slice(*values) for values in slices] for n, slices in json.loads(row["units"]).items()}
    this = dc.replace(_job_tree(job), units=cast(Any, units))
    records: list[dict[str, Any]] = []
    try:
        for unit in units:
            path = _record_path(this, unit)
            records.append(json.loads(path.read_bytes()) if path.is_file() else tokenize_unit(this, unit))
        records[-1]["peak_mb"] = peak_memory_mb()
    except InputError as error:
        records = [{"error": str(error)}]
    return {"records": json.dumps(records)}


def _job_tree(reference: Any) -> Job:
    import ray

    return build(Job, json.loads(ray.get(reference)))


def peak_memory_mb() -> float:
    """The largest resident size that this process has had, in megabytes (2^20 bytes)."""
    import resource

    with contextlib.suppress(OSError):  # Linux; the figure of getrusage has the parent's size from before exec in it
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


# ---- the stage -------------------------------------------------------------------------------------------------------


def run(config: TokenizeConfig) -> Path:
    """Tokenize a corpus; returns the folder of shards. Raises InputError, ConfigError."""
    config = resolve(config)
    origin = cast(Source, config.source)
    out = Path(config.out)
    units, plan = plan_units(origin, config)
    state = {"format_version": FORMAT_VERSION, **config.identity(), "corpus": _digest(plan.identity)}
    if not _is_new(out, state, config):
        _print_summary(out, config, plan, None)
        return out
    with _lock(out) as made, _terminable():
        if not _is_new(out, state, config):  # another process has just finished it
            _print_summary(out, config, plan, None)
            return out
        with _undone(out, made):
            if _begun_by(out, state):
                for leftover in [*out.glob(".*.tmp"), *(out / RECORDS).glob(".*.tmp")]:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
            else:
                _clear(out)
            write_atomically(out / SETTINGS, write_yaml({**state, "out": str(out)}).encode())
            (out / RECORDS).mkdir(exist_ok=True)
            encoder, eot_id = _prepare_tokenizer(config, origin, plan)
            job = Job(origin, str(out), units, encoder.backend, dtype_for(encoder.vocab_size).name, eot_id, config.seed)
            job = _with_split(job, config, plan)
        records = _finished(job)
        pending = [unit for unit in range(len(units)) if unit not in records]
        if records:
            print(f"{out}: going on, {len(records)} of {len(units)} units are done", flush=True)
        figures = _work(job, config, plan, pending, records)
        manifest = _merge(job, config, plan, [records[unit] for unit in range(len(units))], encoder, made)
    _print_summary(out, config, plan, figures)
    _track(config, manifest, figures)
    return out


def resolve(config: TokenizeConfig) -> TokenizeConfig:
    """Paths made absolute, so that every worker means the same files."""
    from pipelines.lib.jobs import storage_path

    origin, tokenizer = config.source, config.tokenizer
    if isinstance(origin, corpus.Files):
        origin = dc.replace(origin, path=str(storage_path(origin.path)))
    elif isinstance(origin, corpus.Hub) and Path(origin.name).expanduser().exists():
        origin = dc.replace(origin, name=str(storage_path(origin.name)))
    path = getattr(tokenizer, "path", None)
    if path is not None and (not isinstance(tokenizer, vocab.HuggingFace) or storage_path(path).exists()):
        tokenizer = dc.replace(cast(Any, tokenizer), path=str(storage_path(path)))
    return dc.replace(config, source=origin, tokenizer=tokenizer, out=str(storage_path(config.out)))


def plan_units(origin: Source, config: TokenizeConfig) -> tuple[list[list[Slice]], Plan]:
    """The units of a corpus; a small corpus gets smaller units. Nothing here depends on the number of workers."""
    size = int((config.shard_mb or 0) * 2**20) or UNIT_BYTES
    plan = origin.plan(size)
    if config.shard_mb is None and plan.size < UNIT_BYTES * UNITS:
        size = max(SMALL_UNIT_BYTES, plan.size // UNITS)
        plan = origin.plan(size)
    wants_val = config.split == "documents" and (config.val_fraction > 0 or (config.val_documents or 0) > 0)
    if wants_val and config.val_documents != 0 and _is_one_document(origin, plan):
        raise InputError(
            f"{plan.slices[0].path} is one document, so no document can be set apart for validation; "
            "give split=tail for the end of it, source.separator to part it, or val_fraction=0"
        )
    return plan.units(size), plan


def _is_one_document(origin: Source, plan: Plan) -> bool:
    is_text = isinstance(origin, corpus.Files) and origin.separator is None
    return is_text and len({s.path for s in plan.slices}) == 1 and plan.slices[0].form == "text"


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()


def _is_new(out: Path, state: dict[str, Any], config: TokenizeConfig) -> bool:
    """Whether there is work to do in `out`. Raises InputError if it holds something else, or other settings' work."""
    if out.is_file():
        raise InputError(f"out={out} is a file; a folder is needed")
    if not out.is_dir() or not any(p.name != LOCK for p in out.iterdir()):
        return True
    if not (out / SETTINGS).is_file():
        raise InputError(f"out={out} exists and holds other files; choose another out=, or empty it")
    before, now = flatten(_settings_of(out)), flatten(json.loads(json.dumps(state)))
    differing = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if differing and _holds_nothing(out):
        return True
    if differing == ["corpus"]:
        raise InputError(
            f"out={out} was made when the source had other files or sizes; choose another out=, or delete it"
        )
    if differing:
        pairs = ", ".join(f"{k}={before.get(k)} (now {now.get(k)})" for k in differing if k != "corpus")
        raise InputError(f"out={out} was made with {pairs}; choose another out=, or delete it")
    if not (out / MANIFEST).is_file():
        return True
    TokenFolder.open(out, verify="size")  # what is reused must be whole
    return False


def _settings_of(out: Path) -> dict[str, Any]:
    """The settings that `out` was begun with, as plain data; {} without any."""
    path = out / SETTINGS
    tree = read_yaml(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None
    return {k: v for k, v in tree.items() if k != "out"} if isinstance(tree, dict) else {}


def _begun_by(out: Path, state: dict[str, Any]) -> bool:
    return flatten(_settings_of(out)) == flatten(json.loads(json.dumps(state)))


def _is_ours(path: Path) -> bool:
    """Whether a file or folder in `out` is one that this stage writes."""
    name = path.name
    is_shard = name.startswith(("train-", "val-")) and name.endswith(".arrow")
    is_temporary = name.startswith(".") and name.endswith(".tmp")
    return is_shard or is_temporary or name in (SETTINGS, RECORDS, LOCK, MANIFEST, TOKEN_BYTES, "tokenizer")


def _holds_nothing(out: Path) -> bool:
    """Whether a start left only what this stage can throw away: settings, perhaps a tokenizer, no finished unit."""
    is_start = {"source", "tokenizer", "corpus", "split"} <= _settings_of(out).keys()
    is_empty = not (out / MANIFEST).exists() and not any((out / RECORDS).glob("*.json"))
    return is_start and is_empty and all(map(_is_ours, out.iterdir()))


def _clear(out: Path) -> None:
    """Delete what this stage has written into `out`, but for the lock."""
    for path in [p for p in out.iterdir() if _is_ours(p) and p.name != LOCK]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def _undone(out: Path, made: Sequence[Path]) -> Iterator[None]:
    """A start that fails leaves nothing, unless units of an earlier one are there. made: folders to delete then.

    A start that is stopped or killed leaves the tokenizer, for the same command to go on with.
    """
    try:
        yield
    except Exception:
        if not any((out / RECORDS).glob("*.json")):
            _discard(out, made)
        raise


def _discard(out: Path, made: Sequence[Path]) -> None:
    """Delete what this stage has written into `out`, and those of the folders `made` (deepest first) left empty."""
    _clear(out)
    (out / LOCK).unlink(missing_ok=True)
    for folder in made:
        with contextlib.suppress(OSError):  # someone else's files
            folder.rmdir()


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[list[Path]]:
    """One driver at a time in a folder; a dead driver's lock is no lock. Yields the folders made for it."""
    from filelock import FileLock, Timeout

    made = make_folder(out)
    try:
        with FileLock(out / LOCK, timeout=0):
            yield made
    except Timeout:
        raise InputError(
            f"out={out}: another process is tokenizing into it; wait for it, or choose another out="
        ) from None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the stage in order: what is finished is kept, and the line that goes on is printed."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        before = None
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; finished shards are kept, and the same command goes on", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _prepare_tokenizer(config: TokenizeConfig, origin: Source, plan: Plan) -> tuple[Encoder, int | None]:
    """The tokenizer in out/tokenizer: made (trained, converted, copied) once, and then the one that is used."""
    out, kind = Path(config.out), cast(Vocabulary, config.tokenizer)
    folder = out / "tokenizer"
    if not folder.is_dir():
        started, seen, used = time.perf_counter(), 0, 0

        def texts() -> Iterator[str]:
            n_bytes = getattr(kind, "sample_mb", 0) * 2**20 if kind.reads_corpus == "sample" else float("inf")
            threshold = int(config.val_fraction * HASHES) if config.split == "documents" else 0
            nonlocal seen, used
            for document in corpus.sample(origin, plan, n_bytes):
                seen += 1
                if kind.reads_corpus == "everything" or document_hash(config.seed, document.id) >= threshold:
                    used += 1
                    yield document.text  # validation documents do not train a tokenizer

        made = kind.make(texts)
        if kind.reads_corpus != "nothing" and not used:
            if not seen:
                raise InputError(f"the corpus is empty: no document of {_source_name(config)} holds text")
            raise InputError(
                f"no training documents: the {seen} of {_source_name(config)} fell to validation with "
                f"val_fraction={config.val_fraction}, seed={config.seed}; give val_documents, or split=tail"
            )
        table = vocab.save_tokenizer(made, folder)
        write_atomically(out / TOKEN_BYTES, vocab.array_bytes(table))
        asked = getattr(kind, "vocab_size", len(made))
        note = f" (asked for {asked}: the sample has no more pairs to merge)" if len(made) < asked else ""
        print(f"tokenizer: {len(made)} ids{note}, {time.perf_counter() - started:.1f} s", flush=True)
    elif not (out / TOKEN_BYTES).is_file():
        write_atomically(out / TOKEN_BYTES, vocab.array_bytes(vocab.token_bytes(vocab.load_tokenizer(folder))))
    counts: Counter[str] = Counter()
    first = next((d.text for s in plan.slices[:8] for d in origin.read(s, counts)), "")
    encoder = Encoder(folder, sample=[first[: vocab.CHUNK]])
    eot_id = vocab.end_of_text_id(vocab.load_tokenizer(folder))
    if config.end_of_text and eot_id is None:
        raise InputError(
            f"end_of_text=true, but the tokenizer {vocab_name(kind)} has no end-of-text token; leave it out"
            + (" or give tokenizer={kind: chars, end_of_text: true}" if isinstance(kind, vocab.Chars) else "")
        )
    return encoder, None if config.end_of_text is False else eot_id


def vocab_name(kind: Vocabulary) -> str:
    tree = plain(kind)
    return f"{tree['kind']} {tree.get('path', '')}".strip()


def _with_split(job: Job, config: TokenizeConfig, plan: Plan) -> Job:
    """The job with its rule for validation; a number of documents, or a tail, needs one reading of the corpus first."""
    if config.split == "tail":
        if config.val_fraction == 0:
            return job
        counts: Counter[str] = Counter()
        lengths = [sum(len(d.text) for s in unit for d in job.source.read(s, counts)) for unit in job.units]
        first = np.cumsum([0, *lengths])
        return dc.replace(
            job, tail_at=int(int(first[-1]) * (1 - config.val_fraction)), first_characters=tuple(map(int, first[:-1]))
        )
    if config.val_documents is None:
        return dc.replace(job, threshold=int(config.val_fraction * HASHES))
    if config.val_documents == 0:
        return job
    counts = Counter()
    every = (
        document_hash(job.seed, d.id) for unit in job.units for s in unit for d in job.source.read(s, counts) if d.ends
    )
    smallest = heapq.nsmallest(config.val_documents + 1, every)
    if len(smallest) <= config.val_documents:
        raise InputError(
            f"val_documents={config.val_documents} leaves nothing to train on: there are {len(smallest)} documents"
        )
    return dc.replace(job, threshold=smallest[-1])


def _finished(job: Job) -> dict[int, dict[str, Any]]:
    """{unit: record} of the units whose shards are on disk, whole by their sha256; other records are removed."""
    records = {}
    for path in sorted((Path(job.out) / RECORDS).glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
            for entry in [e for entries in record["shards"].values() for e in entries]:
                check_file(Path(job.out), entry, "sha256")
            records[int(record["unit"])] = record
        except (ValueError, KeyError, InputError):
            path.unlink()
    return records


def _work(
    job: Job, config: TokenizeConfig, plan: Plan, pending: Sequence[int], records: dict[int, dict[str, Any]]
) -> dict[str, float]:
    """Do the pending units, adding to `records`; returns the figures of this run."""
    from pipelines.lib.cluster import ensure_ray

    workers = usable_cpus() if config.workers is None else config.workers
    if workers and pending:
        ensure_ray(num_cpus=max(2, workers))
        import ray

        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        workers = min(cpus if config.workers is None else workers, len(pending))
    results = on_ray(job, pending, workers) if workers and pending else in_process(job, pending)
    count = Count([sum(s.size for s in unit) for unit in job.units])
    peak = 0.0
    with Progress(sum(count.sizes[unit] for unit in pending) >> 20, "MB", "tokenize") as progress:
        with _watched(job, pending, count, progress) if workers else contextlib.nullcontext():
            for record in results:
                peak = max(peak, record.pop("peak_mb", 0.0))
                records[record["unit"]] = record
                count.add(record, progress)
    seconds = time.perf_counter() - count.started
    return {
        "tokens": count.tokens,
        "documents": count.documents,
        "bytes": count.bytes,
        "seconds": seconds,
        "tokens_per_s": count.tokens / max(seconds, 1e-9),
        "documents_per_s": count.documents / max(seconds, 1e-9),
        "workers": workers,
        "worker_peak_mb": peak,
        "driver_peak_mb": peak_memory_mb(),
    }


class Count:
    """What is done so far, each unit once whoever reports it. sizes: bytes of each unit. Safe between threads."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.seen, self.lock = sizes, set[int](), threading.Lock()
        self.tokens = self.documents = self.bytes = self.done = 0
        self.started = time.perf_counter()

    def add(self, record: dict[str, Any], progress: Progress) -> None:
        with self.lock:
            if record["unit"] in self.seen:
                return
            self.seen.add(record["unit"])
            entries = [e for shards in record["shards"].values() for e in shards]
            self.tokens += sum(e["tokens"] for e in entries)
            self.bytes += sum(e["bytes"] for e in entries)
            self.documents += sum(record["counts"].get(f"{split}_documents", 0) for split in ("train", "val"))
            self.done += self.sizes[record["unit"]]
            rate = self.tokens / (time.perf_counter() - self.started)
            figures: dict[str, Any] = {"tokens/s": f"{rate:,.0f}"}
            progress.update(self.done >> 20, **figures)


@contextlib.contextmanager
def _watched(job: Job, pending: Sequence[int], count: Count, progress: Progress) -> Iterator[None]:
    """Show progress from the records as they appear: a Ray task reports only when all its units are done."""
    ended = threading.Event()

    def watch() -> None:
        waiting = set(pending)
        while waiting and not ended.wait(0.5):
            for unit in sorted(waiting):
                with contextlib.suppress(OSError, ValueError):
                    count.add(json.loads(_record_path(job, unit).read_bytes()), progress)
                    waiting.discard(unit)

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _merge(
    job: Job,
    config: TokenizeConfig,
    plan: Plan,
    records: Iterable[dict[str, Any]],
    encoder: Encoder,
    made: Sequence[Path] = (),
) -> dict[str, Any]:
    """The manifest from the records, in the order of the units. Raises InputError if a split asked for is empty."""
    out = Path(job.out)
    splits: dict[str, dict[str, Any]] = {"train": {"shards": []}, "val": {"shards": []}}
    counts = Counter(plan.counts)
    for record in records:
        for name, entries in record["shards"].items():
            splits[name]["shards"] += entries
        counts.update(record["counts"])
    n = {name: sum(e["tokens"] for e in split["shards"]) for name, split in splits.items()}
    documents = counts.pop("train_documents", 0) + counts.pop("val_documents", 0)
    wants_val = config.val_documents != 0 and (config.val_fraction > 0 or config.val_documents is not None)
    if not n["train"] or (wants_val and not n["val"]):
        _discard(out, made)  # nothing here can be used, and the settings must change
        if not sum(n.values()):
            said = ", ".join(f"{k} {name.replace('_', ' ')}" for name, k in counts.items())
            raise InputError(
                f"the corpus is empty: no document of {_source_name(config)} holds text ({said or 'no text'})"
            )
        what = "validation" if n["train"] else "training"
        raise InputError(
            f"no {what} documents: all {documents} of {_source_name(config)} fell to the other split with "
            f"val_fraction={config.val_fraction}, seed={config.seed}; give val_documents=1 or more, or split=tail"
        )
    if not wants_val:
        del splits["val"]
    manifest = write_manifest(
        out,
        {
            "dtype": job.dtype,
            "eot_id": job.eot_id,
            "tokenizer": {
                "folder": "tokenizer",
                "sha256": folder_sha256(out / "tokenizer"),
                "vocab_size": encoder.vocab_size,
                "kind": plain(config.tokenizer)["kind"],
                "backend": encoder.backend,
                **({"sizes": encoder.sizes} if encoder.sizes else {}),
            },
            "token_bytes": {
                "file": TOKEN_BYTES,
                "size": (out / TOKEN_BYTES).stat().st_size,
                "sha256": file_sha256(out / TOKEN_BYTES),
            },
            "source": {**plain(config.source), "identity": _digest(plan.identity)},
            "documents": documents,
            "counts": {name: k for name, k in sorted(counts.items()) if k},
            "left_out": plan.left_out[:20],
            "splits": splits,
        },
    )
    shutil.rmtree(out / RECORDS)
    return manifest


def estimate(config: TokenizeConfig) -> Estimate:
    """What a corpus will take: units spread over it are tokenized, by the same code, into a folder that goes again.

    A tokenizer that learns from the corpus learns from a few megabytes of it.
    """
    from pipelines.lib.estimate import GIB, Estimate

    config = resolve(config)
    origin, kind = cast(Source, config.source), cast(Vocabulary, config.tokenizer)
    units, plan = plan_units(origin, config)
    if not units:
        raise InputError(f"the corpus is empty: {_source_name(config)} has no text")
    notes = []
    with tempfile.TemporaryDirectory(prefix="novella-estimate-") as scratch:
        small = dc.replace(config, out=scratch)
        sample = _spread(plan, ESTIMATE_MB * 2**20)
        read = min(plan.size, getattr(kind, "sample_mb", math.inf) * 2**20)
        if kind.reads_corpus == "sample":
            small = dc.replace(small, tokenizer=dc.replace(cast(Any, kind), sample_mb=ESTIMATE_MB))
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            encoder, eot_id = _prepare_tokenizer(small, origin, sample)
        made_s = time.perf_counter() - began
        if kind.reads_corpus != "nothing" and read > sample.size:
            made_s *= read / sample.size
            notes.append(f"the tokenizer was trained on {sample.size / 2**20:.1f} MB instead of {read / 2**20:.0f}")
        job = Job(origin, scratch, units, encoder.backend, dtype_for(encoder.vocab_size).name, eot_id, config.seed)
        (Path(scratch) / RECORDS).mkdir()
        size, tokens, seconds, n_bytes = _sampled(job)
        tokenizer_bytes = sum(p.stat().st_size for p in (Path(scratch) / "tokenizer").rglob("*") if p.is_file())
    scale = plan.size / size
    workers = usable_cpus() if config.workers is None else config.workers
    at_once = max(1, min(workers, usable_cpus(), len(units)))
    if config.split == "tail" or config.val_documents:
        notes.append("the corpus is read once more to find where validation begins; that is not counted")
    if scale > 1:
        notes.append(f"{size / 2**20:.1f} of {plan.size / 2**20:.1f} MB were tokenized")
    return Estimate(
        tokens=round(tokens * scale),
        seconds=made_s + seconds * scale / at_once,
        memory_gb=peak_memory_mb() / 2**10,
        disk_gb=(n_bytes * scale + tokenizer_bytes) / GIB,
        parts={
            "source": f"{plan.size / 2**20:,.1f} MB in {len(units)} units",
            "making the tokenizer": f"{made_s:.1f} s",
        },
        workers=max(1, workers),
        notes=tuple(notes),
    )


def _spread(plan: Plan, size: int) -> Plan:
    """Slices spread evenly over a plan that make up about so many bytes."""
    n = max(1, min(len(plan.slices), round(len(plan.slices) * size / max(1, plan.size))))
    return Plan([plan.slices[len(plan.slices) * i // n] for i in range(n)], plan.identity)


def _sampled(job: Job) -> tuple[int, int, float, int]:
    """Source bytes, tokens, seconds and bytes written of a few units, spread over all."""
    _encoder(str(Path(job.out) / "tokenizer"), job.backend)  # opening it is no part of a unit
    n, size, tokens, seconds, n_bytes = len(job.units), 0, 0, 0.0, 0
    for unit in dict.fromkeys(n * i // min(n, 8) for i in range(min(n, 8))):
        record = tokenize_unit(job, unit)
        entries = [e for found in record["shards"].values() for e in found]
        size += sum(s.size for s in job.units[unit])
        tokens += sum(e["tokens"] for e in entries)
        n_bytes += sum(e["size"] for e in entries)
        seconds += record["seconds"]
        if seconds > ESTIMATE_S:
            break
    return max(1, size), tokens, seconds, n_bytes


def _source_name(config: TokenizeConfig) -> str:
    tree = plain(config.source)
    return str(tree.get("path") or tree.get("name") or tree["kind"])


def _print_summary(out: Path, config: TokenizeConfig, plan: Plan, figures: dict[str, float] | None) -> None:
    manifest = read_manifest(out)
    print(f"{out}: tokens of {_source_name(config)}" + ("" if figures else ", made before and reused"))
    for name, split in manifest["splits"].items():
        ratio = split["bytes"] / max(split["tokens"], 1)
        print(
            f"  {name:6} {split['tokens']:>13,} tokens {len(split['shards']):>5} shards {split['bytes']:>14,} bytes of "
            f"text   {ratio:.2f} bytes/token"
        )
    tokenizer = manifest["tokenizer"]
    print(f"  {manifest['documents']:,} documents; {tokenizer['kind']} tokenizer with {tokenizer['vocab_size']:,} ids")
    _print_streams(manifest)
    for name, n in manifest["counts"].items():
        print(
            f"  {n:,} {name.replace('_', ' ')}" + (f": {', '.join(plan.left_out[:3])}" if name == "other_files" else "")
        )
    if figures and figures["tokens"]:
        print(
            f"  {figures['seconds']:.1f} s with {figures['workers'] or 'no'} workers by {tokenizer['backend']}: "
            f"{figures['tokens_per_s']:,.0f} tokens/s, {figures['documents_per_s']:,.0f} documents/s, "
            f"{figures['bytes'] / max(figures['seconds'], 1e-9) / 1e6:.1f} MB/s"
        )
    print(f"next: {next_command(out)}", flush=True)


def _print_streams(manifest: dict[str, Any]) -> None:
    """What a model must be told of ids that are several streams."""
    if sizes := manifest["tokenizer"].get("sizes"):
        print(f"  ids of {len(sizes)} streams: model.embedding={{kind: streams, sizes: {sizes}}}")


def next_command(out: Path) -> str:
    """The line for a shell that trains the smallest recipe on the shards in `out`."""
    return shlex.join(["python", "-m", "pipelines.train", "gpt_debug", f"data={shown(out)}", f"out=runs/{out.name}"])


def _track(config: TokenizeConfig, manifest: dict[str, Any], figures: dict[str, float]) -> None:
    """One MLflow run for the stage: its settings, its figures, and the data set that it made."""
    if config.track == "none":
        return
    from pipelines.lib.tracking import Tracker

    out = Path(config.out)
    made = [(out.name, manifest["fingerprint"], str(out), "made")]
    with Tracker.start(out, "tokenize", plain(config), kind=config.track, datasets=made, system_s=0) as tracker:
        totals = {f"{name}/tokens": float(split["tokens"]) for name, split in manifest["splits"].items()}
        tracker.metrics({**{f"tokenize/{name}": float(x) for name, x in figures.items()}, **totals})
        tracker.artifact(out / MANIFEST)


# ---- compare, convert, streams ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompareConfig:
    """Tokenizers on one text: tokens per byte, unigram bits per byte, speed.

    text: a file of text (or any source)
    tokenizers: kinds, files, folders or names; bpe and chars are made from this very text
    max_mb: read no more than so many megabytes of it
    """

    text: Source | str
    tokenizers: tuple[Vocabulary | str, ...] = ("bytes", "chars", "bpe")
    max_mb: float = 8


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Print a table, best first; returns its rows."""
    import tempfile

    origin = corpus.source(config.text)
    plan = origin.plan(UNIT_BYTES)
    text = "".join(d.text for d in corpus.sample(origin, plan, config.max_mb * 2**20))
    if not text:
        raise InputError(f"{config.text}: no text to compare on")
    rows = []
    for setting in config.tokenizers:
        kind = vocab.vocabulary(setting)
        with tempfile.TemporaryDirectory() as folder:
            made = kind.make(lambda: [text])
            made.save_pretrained(folder)
            encoder = Encoder(folder, sample=[text[: vocab.CHUNK]])
            row = vocab.compare_on(text, encoder, functools.partial(_decoded, made))
        rows.append({"tokenizer": vocab_name(kind), **row})
    rows.sort(key=lambda row: row["unigram_bits_per_byte"])
    print(f"{len(text.encode()):,} bytes of text; unigram bits/byte is the entropy of the text's own token frequencies")
    print(
        f"{'tokenizer':32} {'ids':>8} {'used':>7} {'tokens':>11} {'tokens/byte':>11} {'bytes/token':>11} "
        f"{'unigram bits/byte':>17} {'text back':>9} {'M tokens/s':>10} backend"
    )
    for row in rows:
        print(
            f"{row['tokenizer'][-32:]:32} {row['vocab_size']:>8,} {row['ids_used']:>7,} {row['tokens']:>11,} "
            f"{row['tokens_per_byte']:>11.4f} {row['bytes_per_token']:>11.3f} {row['unigram_bits_per_byte']:>17.4f} "
            f"{'yes' if row['round_trip'] else 'no':>9} {row['tokens_per_s'] / 1e6:>10.2f} {row['backend']}"
        )
    return rows


def _decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


@dataclass(frozen=True)
class ConvertConfig:
    """Token shards to nanoGPT's layout, or tokens of another layout to shards.

    source: shards, a folder of train.bin / val.bin / meta.pkl, or .npy / .npz token files
    out: new folder
    tokenizer: the tokenizer that made foreign tokens, where none lies beside them
    """

    source: str
    out: str
    tokenizer: str | None = None


def convert(config: ConvertConfig) -> Path:
    """Our shards become train.bin, val.bin and meta.pkl; anything else becomes shards."""
    from pipelines.lib import nanogpt
    from pipelines.lib.jobs import storage_path

    source, out = storage_path(config.source), storage_path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out={out} exists; give a new folder")
    folder = TokenFolder.open(source, verify="sha256")
    if (source / MANIFEST).is_file():
        if config.tokenizer is not None:
            raise InputError("tokenizer has no effect on shards, which bring their own; leave it out")
        counts = nanogpt.to_nanogpt(folder, out)
    else:
        tokenizer = None if config.tokenizer is None else vocab.vocabulary(config.tokenizer).make(lambda: [])
        manifest = nanogpt.from_foreign(folder, out, tokenizer=tokenizer)
        counts = {name: split["tokens"] for name, split in manifest["splits"].items()}
    print(f"{out}: " + ", ".join(f"{name} {n:,} tokens" for name, n in counts.items()))
    return out


@dataclass(frozen=True)
class StreamsConfig:
    """Token folders that hold the same places (characters, and beside them parts of speech) as one folder of ids.

    sources: folders of shards, or tokens of another layout; the first one gives the text and its tokenizer
    out: new folder
    """

    sources: tuple[str, ...]
    out: str


def join_streams(config: StreamsConfig) -> Path:
    """An id s_1 + V_1 (s_2 + V_2 (...)) for the tokens s_i of each place, for model.embedding=streams."""
    from pipelines.lib import streams
    from pipelines.lib.jobs import storage_path

    if len(config.sources) < 2:
        raise ConfigError(f"sources={list(config.sources)}: streams are two folders or more")
    out = storage_path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out={out} exists; give a new folder")
    folders = [TokenFolder.open(storage_path(source), verify="sha256") for source in config.sources]
    manifest = streams.join(folders, out)
    print(f"{out}: " + ", ".join(f"{name} {split['tokens']:,} tokens" for name, split in manifest["splits"].items()))
    _print_streams(manifest)
    return out


def _help(config: type, call: str) -> str:
    """--help of one of the further commands: what it does, its call, its settings."""
    does = inspect.cleandoc(config.__doc__ or "").splitlines()[0]
    return "\n".join([does, "", call, "", "settings and defaults:", *describe(config)])


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    wants_help = bool({"-h", "--help"} & set(words))
    if wants_help and words[:1] == ["convert"]:
        print(_help(ConvertConfig, "python -m pipelines.tokenize convert FOLDER out=FOLDER [tokenizer=...] [--debug]"))
        return 0
    if wants_help and words[:1] == ["compare"]:
        print(_help(CompareConfig, "python -m pipelines.tokenize compare TEXT TOKENIZER ... [max_mb=8] [--debug]"))
        return 0
    if wants_help and words[:1] == ["streams"]:
        print(_help(StreamsConfig, "python -m pipelines.tokenize streams FOLDER FOLDER ... out=FOLDER [--debug]"))
        return 0
    if words[:1] == ["streams"]:
        bare = [w for w in words[1:] if not w.startswith("-") and "=" not in w]
        rest = [w for w in words[1:] if w not in bare]
        return command(StreamsConfig, join_streams, [f"sources={json.dumps(bare)}"] * bool(bare) + rest)
    if words[:1] == ["convert"]:
        return command(ConvertConfig, convert, words[1:], positional="source")
    if words[:1] == ["compare"]:
        bare = [w for w in words[1:] if not w.startswith("-") and ("=" not in w or w.startswith("{"))]
        rest = [w for w in words[1:] if w not in bare]
        listed = ", ".join(w if w.startswith("{") else json.dumps(w) for w in bare[1:])
        given = [f"text={w}" for w in bare[:1]] + ([f"tokenizers=[{listed}]"] if listed else [])
        return command(CompareConfig, compare, [*given, *rest])
    return command(TokenizeConfig, run, words, estimate=estimate)


if __name__ == "__main__":
    from pipelines.tokenize import main  # so that what workers unpickle has an importable name

    raise SystemExit(main())
