"""Whether test items stand in a corpus: `python -m pipelines.evaluate contamination TEXT bundle=FOLDER`.

reads   text=    a corpus as pipelines.tokenize reads it (a file, folder, glob, stdlib, a Hub data set), or
        data=    a folder of token shards, which is decoded with its tokenizer
        bundle=  task files of CORE;  files=  further ones: .json, .jsonl, or lm-eval YAML files with local data
writes  out=     JSON: for each task the share of its items that share a run of words with the corpus, which items, and
                 examples; one line per task is shown

python -m pipelines.evaluate contamination books/ bundle=eval_bundle
python -m pipelines.evaluate contamination data=data/stdlib files=my_tasks/sums.yaml

An item is contaminated if any run of n of its words stands in the corpus; n is the 5th percentile of the words of the
task's items, between 8 and 13, and a run that stands in more than 10 documents is a common phrase and does not count
(Brown et al., arXiv:2005.14165, appendix C). An item is its question with the right answer; of a file that is no task
of CORE, all texts of a record. Shorter items are not judged, and counted. Words are compared in lower case and without
punctuation. The corpus is read by a Ray Data job; where a document is parted between two workers, a run across the seam
is not seen.
"""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from models.spec import ConfigError, build, plain
from pipelines.lib.config import InputError, read_yaml
from pipelines.lib.corpus import Files, Hub, Slice, Source, source
from pipelines.lib.ngrams import Index, hashes_of, index_of, runs_of, size_for, words_of
from pipelines.lib.output import check_writable
from pipelines.lib.shards import file_sha256, write_json

FORMAT_VERSION = 1
UNIT_BYTES = 4 << 20
UNIT_TOKENS = 1 << 20
OVERLAP_TOKENS = 256  # a unit of tokens reads on for so many, so that few runs are cut


@dataclass(frozen=True)
class ContaminationConfig:
    """Look for test items in a corpus.

    text: the corpus: a file, folder, glob, stdlib, or {kind: hub, name: ...} as in pipelines.tokenize
    data: the corpus as a folder of token shards, instead
    split: which split of data
    bundle: CORE's task files: a folder, a .zip file, an http(s) address, or public
    cache: folder below which archives are unpacked, once
    files: more task files: .json, .jsonl, or YAML files of lm-eval with `dataset_path: json`
    n: words in a run at most
    least: words in a run at least; shorter items are not judged
    common: a run in more documents than this is a common phrase and does not count
    examples: shown and written for each task
    workers: processes; by default one per CPU, 0 works in this process without Ray
    out: the JSON file
    """

    text: str | Source | None = None
    data: str | None = None
    split: str = "train"
    bundle: str | None = None
    cache: str = "data/core"
    files: tuple[str, ...] = ()
    n: int = 13
    least: int = 8
    common: int = 10
    examples: int = 3
    workers: int | None = None
    out: str = "contamination.json"

    def __post_init__(self) -> None:
        if (self.text is None) == (self.data is None):
            raise ConfigError("a corpus is needed: text=FILE or FOLDER, or data=FOLDER of token shards, one of them")
        if self.bundle is None and not self.files:
            raise ConfigError("nothing to look for: give bundle=FOLDER of CORE's task files, or files=")
        if not 1 <= self.least <= self.n:
            raise ConfigError(f"least={self.least} must be at least 1 and at most n={self.n}")
        if self.common < 1 or self.examples < 0:
            raise ConfigError(f"common={self.common} must be at least 1, examples={self.examples} not negative")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers={self.workers} must not be negative; 0 works in this process")


# ---- the items -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Items:
    """The items of one task. lines: where each stands in its file, from 1.  texts: what is looked for."""

    name: str
    path: Path
    lines: Sequence[int]
    texts: Sequence[str]


def open_items(config: ContaminationConfig) -> list[Items]:
    """The tasks to look for; a file that serves several tasks is one. Raises InputError."""
    from pipelines.lib.jobs import storage_path

    found: list[Items] = []
    if config.bundle is not None:
        from pipelines.lib.core.archive import bundle_folder
        from pipelines.lib.core.prompts import solved
        from pipelines.lib.core.tasks import open_bundle, read_items

        tasks = open_bundle(bundle_folder(config.bundle, storage_path(config.cache)).folder)
        for path in dict.fromkeys(task.path for task in tasks):
            sharing = [task for task in tasks if task.path == path]
            read_items(sharing[0])  # names what is wrong with a line
            rows = list(records(path))
            texts = [solved(sharing[0], row) for _, row in rows]
            found.append(Items("/".join(task.label for task in sharing), path, [line for line, _ in rows], texts))
    for text in config.files:
        for path in data_files(storage_path(text)):
            rows = list(records(path))
            found.append(Items(path.stem, path, [line for line, _ in rows], ["\n".join(strings(r)) for _, r in rows]))
    for items in found:
        if not items.texts:
            raise InputError(f"{items.path}: no item in it")
    return found


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, record) of a .jsonl file, or (number, record) of a .json list. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: it cannot be read ({error})") from None
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), 1)
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error})") from None
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise InputError(f"{path} line {number}: not JSON ({error})") from None


def strings(tree: Any) -> Iterator[str]:
    """All texts in a record, in order."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping | list):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from strings(value)


def data_files(path: Path) -> list[Path]:
    """The data of a task file: itself, or what an lm-eval YAML names beside it. Raises InputError."""
    if not path.is_file():
        raise InputError(f"files={path}: no such file")
    if path.suffix not in (".yaml", ".yml"):
        return [path]
    tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
    kwargs = tree.get("dataset_kwargs") if isinstance(tree, dict) else None
    named = (kwargs or {}).get("data_files")
    if tree.get("dataset_path") != "json" or not named:
        raise InputError(f"files={path}: only tasks with `dataset_path: json` and local `data_files` can be looked for")
    return [p if p.is_absolute() else path.parent / p for p in map(Path, strings(named))]


# ---- the corpus ------------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """Work for one task: slices of a source, or a range of tokens."""

    slices: list[Slice] = []
    first: int = 0
    last: int = 0


@dataclass(frozen=True)
class Corpus:
    """What is read. source: of text.  data, split: of tokens."""

    source: Source | None = None
    data: str | None = None
    split: str = "train"

    def units(self) -> list[Unit]:
        """The work, the same for any number of workers. Raises InputError."""
        if self.source is not None:
            return [Unit(slices) for slices in self.source.plan(UNIT_BYTES).units(UNIT_BYTES)]
        n = _tokens(str(self.data), self.split)[0].n_tokens
        return [Unit([], first, min(first + UNIT_TOKENS, n)) for first in range(0, n, UNIT_TOKENS)]

    def documents(self, unit: Unit) -> Iterator[tuple[str, str]]:
        """(name, text) of the documents of a unit, or of what stands of them in it."""
        if self.source is not None:
            counts: Counter[str] = Counter()
            name, parts = "", cast(list[str], [])
            for piece in (document for s in unit.slices for document in self.source.read(s, counts)):
                if parts and (piece.begins or piece.id != name):
                    yield name, "".join(parts)
                    parts = []
                name = piece.id
                parts.append(piece.text)
            if parts:
                yield name, "".join(parts)
            return
        tokens, tokenizer = _tokens(str(self.data), self.split)
        size = min(unit.last + OVERLAP_TOKENS, tokens.n_tokens) - unit.first
        window, (ids, _) = tokens.window(unit.first, size), tokens.documents(unit.first, size)
        for begin, end in zip(*_groups(ids), strict=True):
            if unit.first + begin < unit.last:
                yield f"document {ids[begin]}", tokenizer.decode(window[begin:end].tolist(), skip_special_tokens=True)


def _groups(ids: np.ndarray) -> tuple[list[int], list[int]]:
    """Where runs of equal ids begin and end."""
    begins = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist()] if len(ids) else []
    return begins, [*begins[1:], len(ids)][: len(begins)]


@functools.lru_cache(maxsize=1)
def _tokens(path: str, split: str) -> tuple[Any, Any]:
    """A split of a token folder, and its tokenizer. Raises InputError for one that has none."""
    from pipelines.lib.shards import TokenFolder
    from pipelines.lib.vocab import load_tokenizer

    folder = TokenFolder.open(path)
    if folder.tokenizer_dir is None:
        raise InputError(f"{path}: no tokenizer in it, so its tokens cannot be read as text; give text=")
    return folder.split(split), load_tokenizer(folder.tokenizer_dir)


@dataclass
class Found:
    """What a part of the corpus has of the index. runs: {(n, number): [documents, the first one's name]}."""

    documents: int = 0
    words: int = 0
    runs: dict[tuple[int, int], list[Any]] = field(default_factory=dict)

    def add(self, other: Found) -> None:
        self.documents += other.documents
        self.words += other.words
        for run, (count, name) in other.runs.items():
            self.runs.setdefault(run, [0, name])[0] += count


def scan(corpus: Corpus, unit: Unit, index: Index) -> Found:
    """Look one unit through."""
    found = Found()
    for name, text in corpus.documents(unit):
        words = words_of(text)
        found.documents += 1
        found.words += len(words)
        for n, numbers in index.found(words).items():
            for number in numbers.tolist():
                found.runs.setdefault((n, number), [0, name])[0] += 1
    return found


def on_ray(corpus: Corpus, units: Sequence[Unit], index: Index, workers: int) -> Iterator[Found]:
    """The units as a Ray Data job: rows name the units, the index is shared. Finds come back as JSON."""
    import logging

    from pipelines.lib.cluster import ensure_ray

    ensure_ray(num_cpus=max(2, workers))
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that its bars are off
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    shared = ray.put((plain(corpus), dict(index.runs)))
    rows = [{"unit": json.dumps([[plain(s) for s in unit.slices], unit.first, unit.last])} for unit in units]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    work = functools.partial(_scan_row, shared=shared)
    for row in data.map(work, compute=ray.data.TaskPoolStrategy(size=workers), num_cpus=1).iter_rows():
        tree = json.loads(row["found"])
        if "error" in tree:
            raise InputError(tree["error"])
        runs = {(int(n), int(number)): [count, name] for n, number, count, name in tree["runs"]}
        yield Found(tree["documents"], tree["words"], runs)


def _scan_row(row: dict[str, Any], shared: Any) -> dict[str, Any]:
    """A row {unit} -> {found}, both as JSON. Bad input comes back as a word, not as a trace."""
    import ray

    tree, runs = ray.get(shared)
    slices, first, last = json.loads(row["unit"])
    unit = Unit([Slice(**s) for s in slices], first, last)
    try:
        found = scan(build(Corpus, tree), unit, Index(runs))
    except InputError as error:
        return {"found": json.dumps({"error": str(error)})}
    flat = [[n, number, count, name] for (n, number), (count, name) in found.runs.items()]
    return {"found": json.dumps({"documents": found.documents, "words": found.words, "runs": flat})}


# ---- the command -----------------------------------------------------------------------------------------------------


def run_contamination(config: ContaminationConfig) -> int:
    """Scan, write the JSON file, show one line per task. Returns the exit code."""
    from pipelines.lib.cluster import usable_cpus
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.progress import Progress

    out = storage_path(config.out)
    tasks = open_items(config)
    words = {items.name: [words_of(text) for text in items.texts] for items in tasks}
    sizes = {name: size_for([len(w) for w in several], config.least, config.n) for name, several in words.items()}
    index = index_of({n: [w for name in words if sizes[name] == n for w in words[name]] for n in set(sizes.values())})
    corpus = open_corpus(config)
    units = corpus.units()
    check_writable(out, f"out={config.out}")
    workers = usable_cpus() if config.workers is None else config.workers
    began, found = time.perf_counter(), Found()
    parts = on_ray(corpus, units, index, workers) if workers else (scan(corpus, unit, index) for unit in units)
    with Progress(len(units), "units", "contamination") as progress:
        for done, part in enumerate(parts, 1):
            found.add(part)
            progress.update(done, words=f"{found.words:,}")
    report = {
        "format_version": FORMAT_VERSION,
        "corpus": {**plain(corpus), "documents": found.documents, "words": found.words},
        "tasks": {items.name: judged(items, words[items.name], sizes[items.name], found, config) for items in tasks},
        "rule": "an item with any run of n words in 1 to `common` documents; arXiv:2005.14165, appendix C",
        "config": plain(config),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.perf_counter() - began, 2),
    }
    write_json(out, report)
    show(report)
    print(f"wrote {out}")
    return 0


def open_corpus(config: ContaminationConfig) -> Corpus:
    """The corpus with absolute paths, so that every worker means the same files."""
    import dataclasses as dc

    from pipelines.lib.jobs import storage_path

    if config.text is None:
        return Corpus(None, str(storage_path(str(config.data))), config.split)
    origin = source(config.text)
    if isinstance(origin, Files):
        origin = dc.replace(origin, path=str(storage_path(origin.path)))
    elif isinstance(origin, Hub) and storage_path(origin.name).exists():
        origin = dc.replace(origin, name=str(storage_path(origin.name)))
    return Corpus(origin)


def judged(
    items: Items, words: Sequence[Sequence[str]], n: int, found: Found, config: ContaminationConfig
) -> dict[str, Any]:
    """One task's entry: how many items are contaminated, which, and examples."""
    dirty: list[int] = []
    examples: list[dict[str, Any]] = []
    short = 0
    for line, item in zip(items.lines, words, strict=True):
        if len(item) < n:
            short += 1
            continue
        ((_, numbers),) = runs_of(hashes_of(item), [n])
        met = ((i, found.runs.get((n, number))) for i, number in enumerate(numbers.tolist()))
        hits = [(i, hit) for i, hit in met if hit is not None and hit[0] <= config.common]
        if hits:
            dirty.append(line)
            if len(examples) < config.examples:
                i, (count, name) = hits[0]
                text = " ".join(item[i : i + n])
                examples.append({"line": line, "words": text, "document": name, "documents": count, "runs": len(hits)})
    count = len(words) - short
    return {
        "file": str(items.path),
        "sha256": file_sha256(items.path),
        "n": n,
        "items": len(words),
        "judged": count,
        "too_short": short,
        "contaminated": len(dirty),
        "share": len(dirty) / count if count else None,
        "contaminated_lines": dirty,
        "examples": examples,
    }


def show(report: Mapping[str, Any]) -> None:
    """One line per task, and its examples."""
    corpus = report["corpus"]
    print(f"{corpus['documents']:,} documents, {corpus['words']:,} words in {report['seconds']:.1f} s")
    for name, row in report["tasks"].items():
        share = "nothing to judge" if row["share"] is None else f"{100 * row['share']:6.2f} %"
        few = f", {row['too_short']:,} too short" if row["too_short"] else ""
        print(f"{name:36} {share}  {row['contaminated']:,} of {row['judged']:,} items, runs of {row['n']} words{few}")
        for example in row["examples"]:
            print(f"    line {example['line']}: «{example['words']}» in {example['document']}")
