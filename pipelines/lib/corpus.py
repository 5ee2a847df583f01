"""Sources of text: where documents come from, in slices that any process can read alone.

A stage's `source` setting is a name, a path or a mapping, one of `Source.kinds`:

    source=stdlib                                  the running Python's standard library: source and docstrings
    source=notes.txt   source=DIR   source="a/*.jsonl.zst"
    source={kind: files, path: DIR, separator: "<|endoftext|>", text_column: content}
    source={kind: hub, name: HuggingFaceFW/fineweb-edu, config: sample-10BT, split: "train[:0.1%]"}

`source.plan(bytes)` lists slices (a file, a byte range of it, row groups, a shard of a data set) without reading text;
`source.read(slice, counts)` yields its documents. A slice always yields the same documents with the same ids, whoever
reads it and whatever was read before, which is what lets a killed tokenisation continue and repeat itself exactly.

What happens to awkward input; everything dropped or changed is counted under the name in brackets:

    UTF-8 with some bad bytes       each bad byte sequence becomes U+FFFD [replaced_characters]
    a file that is not UTF-8        Windows-1252 / Latin-1, if more bytes are bad than good [latin1_files]
    UTF-16 with a byte-order mark   decoded [utf16_files]
    a file that is no text          left out: NUL bytes, or more than 5 % control characters [not_text_files]
    byte-order mark                 removed [byte_order_marks]
    CR LF and CR                    LF (newlines: keep leaves them) [documents_with_cr]
    empty, or white space only      left out [empty_documents]
    JSON line that does not parse   left out [bad_lines]
    row without text                left out [rows_without_text]
    half a surrogate pair in JSON   U+FFFD [replaced_characters]
    a text file larger than a slice one document, read in pieces that begin where words do, so that ids do not change;
                                    without a space in a megabyte it is cut anyway [cut_runs]
    the end-of-text token's letters stay ordinary text (pipelines.lib.vocab) [documents_with_end_of_text_letters]
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import glob
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple

from models.spec import ConfigError, Part, near
from pipelines.lib import hub
from pipelines.lib.config import InputError

PIECE = 8 * 2**20  # bytes of a text that are decoded at once
SEAM_SEARCH = 2**20  # bytes after a slice's nominal begin in which a place to begin is looked for
LONGEST_LINE = 2**29  # bytes of one JSON line
HEAD = 2**20  # bytes that decide whether a file is text, and its encoding if it is read in parts
# A piece may begin at white space after an ASCII letter or digit: pipelines.lib.vocab.SEAM, in bytes.
BYTE_SEAM = re.compile(rb"(?<=[0-9A-Za-z])(?=[ \n\t\r])")
COMPRESSED = (".gz", ".zst")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet", ".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst")


class Document(NamedTuple):
    """A document, or a piece of a long one.

    id: stable name, the same for all pieces.  begins, ends: whether the document does so with this piece.
    n_bytes: of the text in UTF-8, once it is clean.
    """

    id: str
    text: str
    begins: bool = True
    ends: bool = True
    n_bytes: int = 0


@dataclass(frozen=True)
class Slice:
    """Work for one process.  form: which reader.  path, name: the file and its stable name.  size: bytes, about.

    begin, end: byte range of text and jsonl, row groups of parquet, shards or rows of a data set; end 0: all of it.
    last: no later slice continues this file.
    """

    form: str
    path: str
    name: str
    size: int
    begin: int = 0
    end: int = 0
    last: bool = True


@dataclass
class Plan:
    """What there is to read.  identity: names and sizes that tell whether a source has changed.  counts: left out."""

    slices: list[Slice]
    identity: list[Any]
    counts: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(s.size for s in self.slices)

    def limited(self, max_mb: float | None) -> Plan:
        """The first slices that make up max_mb megabytes (2^20 bytes); all of them for None."""
        if max_mb is None:
            return self
        kept, size = [], 0.0
        for s in self.slices:
            if size >= max_mb * 2**20:
                break
            kept.append(s)
            size += s.size
        return Plan(kept, [*self.identity, max_mb], self.counts, self.left_out)

    def units(self, size: int) -> list[list[Slice]]:
        """Slices in order, grouped until a group has at least `size` bytes: the same for any number of workers."""
        units: list[list[Slice]] = [[]]
        filled = 0
        for s in self.slices:
            if filled >= size:
                units.append([])
                filled = 0
            units[-1].append(s)
            filled += s.size
        return [u for u in units if u]


# ---- the kinds -------------------------------------------------------------------------------------------------------


class Source(Part):
    """Where documents come from."""

    kinds: ClassVar[dict[str, type]]

    def plan(self, slice_bytes: int) -> Plan:
        """Slices of about slice_bytes. Raises InputError if there is nothing to read."""
        raise NotImplementedError

    def read(self, piece: Slice, counts: Counter[str]) -> Iterator[Document]:
        """The documents of one slice; what is dropped or changed is added to `counts`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Stdlib(Source):
    """The source code of the running Python's standard library (a document per file, tests left out), and the
    docstrings of its compiled modules. About 11 MB; on every machine.

    max_mb: stop after so many megabytes (2^20 bytes)
    """

    max_mb: float | None = None
    SKIP: ClassVar[frozenset[str]] = frozenset(
        {
            "test",
            "tests",
            "idle_test",
            "site-packages",
            "dist-packages",
            "__pycache__",
            "_bundled",
            "idlelib",
            "lib2to3",
        }
    )

    def plan(self, slice_bytes: int) -> Plan:
        import sysconfig

        root = Path(sysconfig.get_paths()["stdlib"])
        slices = []
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(d for d in folders if d not in self.SKIP and not d.startswith("config-"))
            for file in sorted(f for f in files if f.endswith(".py")):
                path = Path(folder, file)
                slices.append(Slice("text", str(path), path.relative_to(root).as_posix(), path.stat().st_size))
        slices.sort(key=lambda s: s.name)
        modules = [Slice("docstrings", name, f"docstrings/{name}", 2**14) for name in _compiled_modules()]
        if not slices:
            raise InputError(f"source=stdlib: no Python files in {root}; name another source")
        version = "python " + ".".join(map(str, sys.version_info[:3]))
        plan = Plan([*slices, *modules], [version, *((s.name, s.size) for s in slices)])
        return plan.limited(self.max_mb)

    def read(self, piece: Slice, counts: Counter[str]) -> Iterator[Document]:
        if piece.form == "docstrings":
            yield from cleaned([Document(piece.name, _docstrings(piece.path))], counts)
        else:
            yield from cleaned(read_text(piece, counts), counts)


def _compiled_modules() -> list[str]:
    """Modules of the standard library that have no Python source, and no leading underscore."""
    import importlib.machinery
    import importlib.util

    found = []
    for name in sorted(n for n in sys.stdlib_module_names if not n.startswith("_")):
        with contextlib.suppress(Exception):  # some modules of the list are not on this platform
            spec = importlib.util.find_spec(name)
            if spec and (spec.origin == "built-in" or isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)):
                found.append(name)
    return found


def _docstrings(name: str) -> str:
    """The docstrings of a compiled module, its functions, classes and their methods, in order of name.

    Only what is compiled, and no hooks: a debugger or Ray may have put functions of its own into `sys`.
    """
    import importlib
    import inspect

    try:
        module = importlib.import_module(name)
    except Exception:  # a module whose C library is missing has nothing to say
        return ""
    lines = [f"{name}\n\n{inspect.getdoc(module) or ''}"]
    for key, value in sorted(vars(module).items()):
        is_fixed = not key.startswith("_") and not key.endswith("hook")
        if not is_fixed or not (inspect.isbuiltin(value) or inspect.isclass(value)):
            continue
        if getattr(value, "__module__", None) not in (name, "builtins", None):
            continue
        lines.append(f"{name}.{key}\n\n{inspect.getdoc(value) or ''}")
        if inspect.isclass(value):
            for method, f in sorted(vars(value).items()):
                if not method.startswith("_") and isinstance(getattr(f, "__doc__", None), str):
                    lines.append(f"{name}.{key}.{method}\n\n{inspect.cleandoc(f.__doc__)}")
    return "\n\n\n".join(lines)


@dataclass(frozen=True)
class Files(Source):
    """Files of text: txt (md, rst, py), jsonl and parquet; txt and jsonl also as .gz and .zst.

    path: a file, a folder (read with its sub-folders) or a glob pattern
    text_column: the field of JSON lines, the column of parquet files
    separator: parts a text file into documents; by default a file is one document
    newlines: lf makes CR LF and CR one LF
    max_mb: stop after so many megabytes (2^20 bytes)
    """

    path: str
    text_column: str = "text"
    separator: str | None = None
    newlines: Literal["lf", "keep"] = "lf"
    max_mb: float | None = None

    def __post_init__(self) -> None:
        if self.separator == "":
            raise ConfigError("separator must not be empty")

    def plan(self, slice_bytes: int) -> Plan:
        root, files, is_folder = self._files()
        plan = Plan([], [])
        for path in files:
            name = path.relative_to(root).as_posix()
            state = path.stat()
            form = form_of(path)
            if form is None and is_folder:  # a file that was asked for by name is read as text
                plan.counts["other_files"] += 1
                plan.left_out.append(name)
                continue
            plan.identity.append((name, state.st_size, state.st_mtime_ns))
            if state.st_size == 0:
                plan.counts["empty_documents"] += 1
                continue
            whole = Slice(form or "text", str(path), name, state.st_size)
            if whole.form == "parquet":
                plan.slices += _parquet_slices(whole, self.text_column, slice_bytes)
            elif path.suffix in COMPRESSED:
                plan.slices.append(whole)
            elif whole.form == "jsonl" or self._can_be_parted(whole, slice_bytes, plan):
                plan.slices += _ranges(whole, slice_bytes)
            elif name not in plan.left_out:
                plan.slices.append(whole)
        if not plan.slices:
            why = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in plan.counts.items()) or "no files"
            raise InputError(f"source {self.path}: nothing to read ({why}); it reads {', '.join(SUFFIXES)}")
        self._check_column(plan)
        return plan.limited(self.max_mb)

    def _files(self) -> tuple[Path, list[Path], bool]:
        """(the folder that names are relative to, the files in order of name, whether a whole folder was asked for)."""
        path = Path(self.path).expanduser()
        if path.is_file():
            return path.parent.absolute(), [path.absolute()], False
        if path.is_dir():
            root = path.absolute()
            files = [Path(folder, f) for folder, _, names in os.walk(root) for f in names if not f.startswith(".")]
            return root, sorted(files, key=lambda f: f.relative_to(root).parts), True
        if glob.has_magic(self.path):
            found = sorted(Path(p).absolute() for p in glob.glob(os.path.expanduser(self.path), recursive=True))
            found = [p for p in found if p.is_file()]
            if not found:
                raise InputError(f"source {self.path}: no file matches")
            return Path(os.path.commonpath([p.parent for p in found])), found, False
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = near(path.name, beside) if beside and len(beside) < 1000 else ""
        hint = hint if "did you mean" in hint else f"; a kind is one of {', '.join(Source.kinds)}"
        raise InputError(f"source {self.path}: no such file, folder or pattern{hint}")

    def _can_be_parted(self, whole: Slice, slice_bytes: int, plan: Plan) -> bool:
        """Whether a plain text file may be read in byte ranges: it is large, and a range can find where it begins."""
        if whole.size <= slice_bytes:
            return False
        with open(whole.path, "rb") as file:
            head = file.read(HEAD)
        if not looks_like_text(head):
            plan.counts["not_text_files"] += 1
            plan.left_out.append(whole.name)
            return False
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return False
        separator = (self.separator or "").encode()
        return not any(separator.startswith(separator[-i:]) for i in range(1, len(separator)))  # no overlap with itself

    def _check_column(self, plan: Plan) -> None:
        """The first JSON line must have the column: a wrong name is the likeliest mistake, and found at once."""
        first = next((s for s in plan.slices if s.form == "jsonl"), None)
        if first is None:
            return
        with _opened(first.path) as file:
            line = file.readline(LONGEST_LINE).removeprefix(codecs.BOM_UTF8)
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and self.text_column not in row:
                raise InputError(f"{first.path}: no text_column {self.text_column!r}{near(self.text_column, row)}")

    def read(self, piece: Slice, counts: Counter[str]) -> Iterator[Document]:
        if piece.form == "jsonl":
            documents = read_jsonl(piece, self.text_column, counts)
        elif piece.form == "parquet":
            documents = _read_parquet(piece, self.text_column, counts)
        elif self.separator is not None:
            documents = read_separated(piece, self.separator, counts, self.newlines)
        else:
            documents = read_text(piece, counts)
        yield from cleaned(documents, counts, self.newlines)


@dataclass(frozen=True)
class Hub(Source):
    """A data set of the Hugging Face Hub, streamed; or a local folder in the form of one.

    name: as on the Hub, or a folder
    config: which configuration of it
    split: as in `datasets`, slices too: train, train[:0.1%], validation[100:200]
    text_column: the column with the text
    revision: branch, tag or commit
    newlines: lf makes CR LF and CR one LF
    """

    name: str
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    revision: str | None = None
    newlines: Literal["lf", "keep"] = "lf"

    def __post_init__(self) -> None:
        parse_split(self.split)

    def _check_name(self) -> None:
        """Raises InputError at once for a name that the Hub does not have, or when there is no Hub."""
        if Path(self.name).expanduser().exists() or hub.is_offline():
            return  # offline, `datasets` looks into its own cache
        answer = hub.ask("dataset", self.name)
        if answer == "missing":
            close = difflib.get_close_matches(self.name, hub.loaded_names("dataset"), 1)
            near_name = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"source {self.name}: neither a folder nor a data set of the Hub{near_name}")
        if answer == "unreachable":
            raise InputError(
                f"source {self.name}: no such folder, and the Hub cannot be reached; "
                "HF_HUB_OFFLINE=1 uses a data set that was loaded before"
            )

    def _stream(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        base = parse_split(self.split)[0]
        with _as_input_error(f"source {self.name}"):
            return datasets.load_dataset(self.name, self.config, split=base, revision=self.revision, streaming=True)

    def plan(self, slice_bytes: int) -> Plan:
        import datasets

        base, begin, end = parse_split(self.split)
        self._check_name()
        with _as_input_error(f"source {self.name}"):
            builder = datasets.load_dataset_builder(self.name, self.config, revision=self.revision)
        files = getattr(builder.config, "data_files", None) or {}
        known = sorted({str(k) for k in (*files, *(builder.info.splits or {}))})
        if known and base not in known:
            raise InputError(f"source {self.name}: no split {base!r}{near(base, known)}")
        stream = self._stream()
        first = next(iter(stream.take(1)), None)
        if first is None:
            raise InputError(f"source {self.name} split {self.split}: no rows")
        if self.text_column not in first:
            raise InputError(f"source {self.name}: no text_column {self.text_column!r}{near(self.text_column, first)}")
        mine = files.get(base)
        identity: list[Any] = [self.name, str(builder.config.name), str(getattr(builder, "hash", None))]
        if mine is not None:
            identity += [[Path(str(f)).name, *map(str, m)] for f, m in zip(mine, mine.origin_metadata, strict=False)]
        n_bytes = _rows_and_bytes(builder, base)[1]
        shards = max(1, stream.num_shards)
        if begin is None and end is None:
            each = max(1, (n_bytes or shards * slice_bytes) // shards)
            slices = [Slice("hub", self.name, f"{base}/{i}", each, i, shards, i == shards - 1) for i in range(shards)]
            return Plan(slices, identity)
        # A slice of rows is one stream: only the rows themselves tell where a row number lies.
        low, high = self._row_range(builder, base, begin, end)
        return Plan([Slice("hub_rows", self.name, base, slice_bytes, low, high)], [*identity, low, high])

    def _row_range(self, builder: Any, base: str, begin: Bound, end: Bound) -> tuple[int, int]:
        total = _rows_and_bytes(builder, base)[0]
        if total is None and any(b is not None and (b[1] or b[0] < 0) for b in (begin, end)):
            total = sum(1 for _ in self._stream().select_columns([]))  # no size on record: count once
        numbers = []
        for bound, default in ((begin, 0), (end, total)):
            value: float | None = default if bound is None else bound[0]
            if bound is not None and bound[1]:
                assert total is not None
                value = round(total * bound[0] / 100)  # as `datasets` rounds by default
            if value is not None and value < 0:
                assert total is not None
                value += total
            numbers.append(None if value is None else int(value))
        low, high = numbers[0] or 0, numbers[1]
        if high is None:
            high = sys.maxsize
        if total is not None:
            high = min(high, total)
        if high <= low:
            raise InputError(f"source {self.name}: split {self.split} has no rows (of {total})")
        return low, high

    def read(self, piece: Slice, counts: Counter[str]) -> Iterator[Document]:
        stream = self._stream()
        if piece.form == "hub":
            rows = stream.shard(num_shards=piece.end, index=piece.begin)
            first = 0
        else:
            rows = stream.skip(piece.begin).take(piece.end - piece.begin)
            first = piece.begin
        with _as_input_error(f"source {self.name}"):
            documents = (
                Document(f"{piece.name}:{i}", text)
                for i, row in enumerate(rows, first)
                if (text := _text_of(row.get(self.text_column), counts)) is not None
            )
            yield from cleaned(documents, counts, self.newlines)


Source.kinds = {"stdlib": Stdlib, "files": Files, "hub": Hub}


def source(setting: Source | str) -> Source:
    """A `source` setting as a kind: the name of one, or a path or pattern of files."""
    if isinstance(setting, Source):
        return setting
    if setting == "stdlib":
        return Stdlib()
    if setting in Source.kinds and not Path(setting).exists():
        option = {"files": "path: FILES", "hub": "name: DATASET"}[setting]
        raise ConfigError(f"source={setting}: more is needed, as in source={{kind: {setting}, {option}}}")
    return Files(setting)


def _of_word(word: str) -> Source:
    """`{kind: WORD, ...}` where WORD is no kind: files, so that `source=notes/ source.separator=...` sets an option.

    A word that can only be a slip of the pen for a kind is refused.
    """
    if not Path(word).exists() and (close := near(word, Source.kinds)).startswith("; did you"):
        raise ConfigError(f"source kind {word!r} does not exist{close}")
    return source(word)


Source.of_word = staticmethod(_of_word)


# ---- cleaning --------------------------------------------------------------------------------------------------------


def cleaned(documents: Iterable[Document], counts: Counter[str], newlines: str = "lf") -> Iterator[Document]:
    """Documents without byte-order marks, carriage returns, half surrogates; empty ones left out."""
    for document in documents:
        text = document.text
        if text.startswith("\ufeff"):
            text = text[1:]
            counts["byte_order_marks"] += 1
        if newlines == "lf" and "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            counts["documents_with_cr"] += document.begins
        try:
            n_bytes = len(text.encode())
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            counts["replaced_characters"] += text.count("\ufffd") - document.text.count("\ufffd")
            n_bytes = len(text.encode())
        if document.begins and document.ends and (not text or text.isspace()):
            counts["empty_documents"] += 1
            continue
        yield document._replace(text=text, n_bytes=n_bytes)


def _text_of(value: Any, counts: Counter[str]) -> str | None:
    if isinstance(value, str):
        return value
    counts["rows_without_text"] += 1
    return None


# ---- plain text ------------------------------------------------------------------------------------------------------


def looks_like_text(head: bytes) -> bool:
    """No NUL bytes (unless UTF-16 says so by its mark), and at most 5 % other control characters."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return True
    head = head[: HEAD // 16]
    controls = sum(head.count(bytes([b])) for b in (*range(1, 9), 11, *range(14, 27), *range(28, 32), 127))
    return b"\0" not in head and controls <= len(head) * 0.05


def encoding_of(data: bytes) -> str:
    """utf-8, utf-16 or cp1252 for bytes that are text. Bytes that are mostly not UTF-8 are Windows-1252."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)  # a character cut at the end is no fault
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        bad = text.count("\ufffd")
        good = sum(1 for c in text if c > "\x7f") - bad
        return "cp1252" if bad > good else "utf-8"
    return "utf-8"


def decode(data: bytes, encoding: str, counts: Counter[str]) -> str:
    """Bytes as text; what cannot be decoded is replaced and counted."""
    if encoding == "utf-16":
        return data.decode("utf-16", "replace")
    if encoding == "cp1252":
        try:
            return data.decode("cp1252")
        except UnicodeDecodeError:  # five bytes have no meaning in Windows-1252; Latin-1 knows all
            return data.decode("latin-1")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        counts["replaced_characters"] += text.count("\ufffd") - data.count("\ufffd".encode())
        return text


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if it is .gz or .zst. Damage is named with the file, by InputError."""
    import zstandard

    try:
        if path.endswith(".gz"):
            with gzip.open(path, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]
        elif path.endswith(".zst"):
            with open(path, "rb") as packed:
                reader = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(
                    packed, read_across_frames=True
                )
                with io.BufferedReader(reader, 2**20) as unpacked:  # type: ignore[type-var]
                    yield unpacked  # type: ignore[misc]
        else:
            with open(path, "rb") as file:
                yield file
    except FileNotFoundError:
        raise InputError(f"{path}: was here when the work was planned, and is gone") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
        raise InputError(f"{path}: expected a whole readable file, found {error}") from None


def read_text(piece: Slice, counts: Counter[str]) -> Iterator[Document]:
    """A text file, or a byte range of one, as one document in pieces of at most about 8 MiB.

    A piece begins at a seam (BYTE_SEAM), where the ids of a tokenizer do not depend on what stands before. A file has
    one encoding, found on its first 8 MiB (1 MiB if it is read in ranges).
    """
    with _opened(piece.path) as file:
        block = file.read(HEAD if piece.end else PIECE)
        if piece.begin == 0 and not looks_like_text(block):
            counts["not_text_files"] += 1
            return
        encoding = encoding_of(block)
        if piece.begin == 0 and encoding != "utf-8":
            counts["latin1_files" if encoding == "cp1252" else "utf16_files"] += 1
        if encoding == "utf-16":  # has no byte seams
            yield Document(piece.name, decode(block + file.read(), encoding, counts))
            return
        left = sys.maxsize
        if piece.end:  # a range: from the seam after its begin to the seam after its end
            start = seam_after(file, piece.begin) if piece.begin else 0
            left = left if piece.last else seam_after(file, piece.end, counts) - start
            file.seek(start)
            block = file.read(min(PIECE, left))
        left -= len(block)
        begins = piece.begin == 0
        while True:
            more = file.read(min(PIECE, left))
            left -= len(more)
            cut = _last_seam(block, counts) if more else len(block)
            ends = piece.last and not more
            if cut or ends:
                yield Document(piece.name, decode(block[:cut], encoding, counts), begins, ends)
                begins = False
            if not more:
                return
            block = block[cut:] + more


def seam_after(file: BinaryIO, begin: int, counts: Counter[str] | None = None) -> int:
    """The first place at or after byte `begin` where a piece may begin; without one in a megabyte, `begin` itself
    (moved to the next character)."""
    file.seek(begin - 1)
    block = file.read(SEAM_SEARCH)
    seam = BYTE_SEAM.search(block)
    if seam:
        return begin - 1 + seam.start()
    if counts is not None:
        counts["cut_runs"] += 1
    skip = next((i for i, b in enumerate(block[1:5]) if b & 0xC0 != 0x80), 0)
    return begin + skip


def _last_seam(block: bytes, counts: Counter[str]) -> int:
    """The last seam of a block that goes on; without one in its last megabyte, the last whole character's end."""
    seams = [seam.start() for seam in BYTE_SEAM.finditer(block, max(0, len(block) - SEAM_SEARCH))]
    if seams:
        return seams[-1]
    counts["cut_runs"] += 1
    end = len(block)
    while end > 0 and block[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if end > 0 and block[end - 1] >= 0xC0 else len(block)


def read_separated(piece: Slice, separator: str, counts: Counter[str], newlines: str = "lf") -> Iterator[Document]:
    """A text file as documents parted by a literal string; a range has the documents that begin in it.

    newlines: lf lets each line break of the separator be CR LF in the file, since the documents lose their CR as well.
    """
    literal = re.escape(separator.encode())
    mark = re.compile(literal.replace(b"\\\n", b"\r?\n") if newlines == "lf" else literal)
    longest = len(separator.encode()) + (separator.count("\n") if newlines == "lf" else 0)
    stop = piece.end if piece.end else sys.maxsize
    with _opened(piece.path) as file:
        head = file.read(HEAD)
        if not looks_like_text(head):
            counts["not_text_files"] += 1
            return
        encoding = encoding_of(head)
        if encoding == "utf-16":
            whole = (head + file.read()).decode("utf-16", "replace")
            whole = whole.replace("\r\n", "\n") if newlines == "lf" else whole
            for i, text in enumerate(whole.split(separator)):
                yield Document(f"{piece.name}:{i}", text)
            counts["utf16_files"] += 1
            return
        counts["latin1_files"] += encoding == "cp1252" and piece.begin == 0
        at = max(0, piece.begin - longest)  # a separator that ends in the range may begin before it
        file.seek(at)
        buffer, scanned, inside = b"", 0, piece.begin == 0
        while True:
            data = file.read(PIECE)
            buffer += data
            while found := mark.search(buffer, scanned):
                if inside:
                    yield Document(f"{piece.name}:{at}", decode(buffer[: found.start()], encoding, counts))
                at += found.end()
                buffer, scanned, inside = buffer[found.end() :], 0, at >= piece.begin
                if at >= stop:
                    return
            if not data:
                if inside and buffer:
                    yield Document(f"{piece.name}:{at}", decode(buffer, encoding, counts))
                return
            scanned = max(0, len(buffer) - longest + 1)
            if not inside:  # nothing before the first separator is ours
                at += scanned
                buffer, scanned = buffer[scanned:], 0


def _ranges(whole: Slice, slice_bytes: int) -> list[Slice]:
    """A file in byte ranges of about slice_bytes."""
    n = max(1, round(whole.size / slice_bytes))
    edges = [whole.size * i // n for i in range(n + 1)]
    if n == 1:
        return [whole]
    return [
        Slice(whole.form, whole.path, whole.name, b - a, a, b, i == n - 1)
        for i, (a, b) in enumerate(itertools.pairwise(edges))
    ]


# ---- rows ------------------------------------------------------------------------------------------------------------


def form_of(path: Path) -> str | None:
    """text, jsonl or parquet by a file's endings; None for endings that we do not know."""
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        return None
    bare = name.removesuffix(".gz").removesuffix(".zst")
    return "jsonl" if bare.endswith(".jsonl") else "parquet" if bare.endswith(".parquet") else "text"


def read_jsonl(piece: Slice, column: str, counts: Counter[str]) -> Iterator[Document]:
    """The lines that begin in the range; a document's id is its line's byte offset."""
    with _opened(piece.path) as file:
        at = piece.begin
        if at:
            file.seek(at - 1)
            at += len(file.readline()) - 1  # the line that begins before us belongs to the range before
        while not piece.end or at < piece.end:
            line = file.readline(LONGEST_LINE)
            if not line:
                return
            begin, at = at, at + len(line)
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_LINE)
                    at += len(line)
                counts["bad_lines"] += 1
                continue
            if begin == 0:
                counts["byte_order_marks"] += line.startswith(codecs.BOM_UTF8)
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                counts["bad_lines"] += 1
                continue
            text = _text_of(row.get(column) if isinstance(row, dict) else None, counts)
            if text is not None:
                yield Document(f"{piece.name}:{begin}", text)


def _parquet_slices(whole: Slice, column: str, slice_bytes: int) -> list[Slice]:
    """Row groups, so many together as make about slice_bytes of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(whole.path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            names = schema.names
            index = names.index(column) if column in names else -1
            kind = schema.field(column).type if index >= 0 else None
            leaf = [metadata.schema.column(i).path for i in range(len(metadata.schema))].index(column) if kind else -1
            sizes = [
                metadata.row_group(i).column(leaf).total_uncompressed_size if leaf >= 0 else 0
                for i in range(metadata.num_row_groups)
            ]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{whole.path}: expected a parquet file, found {str(error).splitlines()[0]}") from None
    if kind is None:
        raise InputError(f"{whole.path}: no text_column {column!r}{near(column, names)}")
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputError(f"{whole.path}: column {column!r} holds {kind}, not text")
    slices: list[Slice] = []
    begin, filled = 0, 0
    for i, size in enumerate(sizes):
        filled += size
        if filled >= slice_bytes or i == len(sizes) - 1:
            slices.append(Slice("parquet", whole.path, whole.name, max(filled, 1), begin, i + 1))
            begin, filled = i + 1, 0
    return slices


def _read_parquet(piece: Slice, column: str, counts: Counter[str]) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(piece.path) as file:
            for group in range(piece.begin, piece.end):
                row = 0
                for batch in file.iter_batches(1024, row_groups=[group], columns=[column], use_threads=False):
                    for value in batch.column(0).to_pylist():
                        text = _text_of(value, counts)
                        if text is not None:
                            yield Document(f"{piece.name}:{group}.{row}", text)
                        row += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{piece.path}: expected a whole parquet file, found {str(error).splitlines()[0]}") from None


# ---- data sets -------------------------------------------------------------------------------------------------------

Bound = tuple[float, bool] | None  # (number, whether it is per cent)


def parse_split(split: str) -> tuple[str, Bound, Bound]:
    """`train[10%:20%]` -> ("train", (10, True), (20, True)). Raises ConfigError."""
    match = re.fullmatch(r"([\w.-]+)(?:\[(-?[\d.]+%?)?:(-?[\d.]+%?)?\])?", split.strip())
    if match is None:
        raise ConfigError(f"split={split!r}: expected a name or a slice such as train[:0.1%] or train[1000:2000]")
    bounds: list[Bound] = []
    for text in match.groups()[1:]:
        try:
            bounds.append(None if text is None else (float(text.rstrip("%")), text.endswith("%")))
        except ValueError:
            raise ConfigError(f"split={split!r}: {text!r} is no number") from None
    for bound in bounds:
        if bound is not None and bound[1] and abs(bound[0]) > 100:
            raise ConfigError(f"split={split!r}: {bound[0]:g}% is more than all of it")
        if bound is not None and not bound[1] and not bound[0].is_integer():
            raise ConfigError(f"split={split!r}: rows are whole numbers (or per cent, with %)")
    return match[1], bounds[0], bounds[1]


def _rows_and_bytes(builder: Any, split: str) -> tuple[int | None, int | None]:
    """(rows, bytes) of a split as its card records them or its parquet files say; None where neither does."""
    info = (builder.info.splits or {}).get(split)
    if info is not None and info.num_examples:
        return info.num_examples, info.num_bytes or None
    files = [str(f) for f in (getattr(builder.config, "data_files", None) or {}).get(split, [])]
    if files and all(f.endswith(".parquet") for f in files):
        import fsspec
        import pyarrow.parquet as pq

        rows = n_bytes = 0
        for name in files:
            with fsspec.open(name, "rb") as file:
                metadata = pq.ParquetFile(file).metadata
                rows += metadata.num_rows
                n_bytes += sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        return rows, n_bytes
    return None, None


@contextlib.contextmanager
def _as_input_error(what: str) -> Iterator[None]:
    """What `datasets` and the Hub raise (missing data set, split, network), as one line."""
    try:
        yield
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # a dozen classes of four libraries
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what}: {text[:300]}") from None


# ---- sampling --------------------------------------------------------------------------------------------------------


def sample(origin: Source, plan: Plan, n_bytes: float) -> Iterator[Document]:
    """Documents worth about n_bytes, from up to 64 evenly spaced slices; everything if the plan is not larger."""
    counts: Counter[str] = Counter()
    if plan.size <= n_bytes:
        for piece in plan.slices:
            yield from origin.read(piece, counts)
        return
    n = min(64, len(plan.slices))
    chosen = [plan.slices[len(plan.slices) * i // n] for i in range(n)]
    left = n_bytes
    for i, piece in enumerate(chosen):
        quota = left / (len(chosen) - i)
        for document in origin.read(piece, counts):
            yield document
            quota -= len(document.text)
            left -= len(document.text)
            if quota <= 0:
                break
