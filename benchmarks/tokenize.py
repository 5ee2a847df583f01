"""Tokenisation: encoders beside each other, BPE training, and the stage beside as many plain processes.

    python -m benchmarks.tokenize [--mb 400] [--workers 2] [--repeat 3] [--rows encoders,training,stage,memory]

Text: the six books of $NOVELLA_DATA (7 MB, Project Gutenberg), else the standard library's source. The stage's corpus
is that text as JSON lines of about 4,000 characters, repeated to --mb megabytes in files of 32 MB, with another first
word in every line. Everything is written below a temporary folder. The table goes to benchmarks/results/tokenize.md.

Encoders and trainers are timed in CPU seconds of the process, all threads together, so a figure is that of one core
even when the machine has other work. The stage is timed by the clock, as a whole job. Its floor is `plain`: W processes
that share the same files, line by line: json, encode by the same backend, collect, write Arrow, sha256; nothing else
(no cleaning, no split by hash, no records). `units` is the stage's own code in W processes without Ray: units / plain
is what our bookkeeping costs, ray / units what Ray costs. Runs alternate, and the best of --repeat counts.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.lib import corpus, vocab
from pipelines.lib.vocab import Encoder

RESULTS = Path(__file__).parent / "results" / "tokenize.md"
DATA = Path(os.environ.get("NOVELLA_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def text() -> str:
    books = DATA / "books"
    origin: corpus.Source = corpus.Files(str(books)) if books.is_dir() else corpus.Stdlib()
    plan = origin.plan(2**24)
    return "\n".join(d.text for d in corpus.sample(origin, plan, 1e12))


def best(f: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """(CPU seconds of the cheapest of `repeat` runs, result)."""
    seconds, result = float("inf"), None
    for _ in range(repeat):
        started = time.process_time()
        result = f()
        seconds = min(seconds, time.process_time() - started)
    return seconds, result


# ---- encoders --------------------------------------------------------------------------------------------------------


def encoders(repeat: int) -> list[str]:
    """One core, documents of 4,000 characters."""
    whole = text()[:2_000_000]
    documents = [whole[i : i + 4000] for i in range(0, len(whole), 4000)]
    n_bytes = len(whole.encode())
    lines = [
        "| tokenizer | backend | M tokens/s | MB/s | same ids |",
        "| --- | --- | ---: | ---: | --- |",
    ]

    def row(name: str, backend: str, encode: Callable[[], list[Any]], truth: list[Any] | None) -> list[Any]:
        seconds, ids = best(encode, repeat)
        n = sum(len(i) for i in ids)
        same = "reference" if truth is None else "yes" if _same(ids, truth) else "NO"
        lines.append(f"| {name} | {backend} | {n / seconds / 1e6:.2f} | {n_bytes / seconds / 1e6:.1f} | {same} |")
        print(lines[-1], flush=True)
        return ids

    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Any] = {
            "bytes": vocab.Bytes().make(lambda: []),
            "characters": vocab.Chars().make(lambda: [whole]),
            "BPE 4,096, trained here": vocab.BPE(4096).make(lambda: [whole]),
        }
        for name, path in (
            ("GPT-2 BPE 50,257", "tiktoken/r50k_base.tiktoken"),
            ("cl100k BPE 100,257", "tiktoken/cl100k_base.tiktoken"),
        ):
            if (DATA / path).is_file():
                made[name] = vocab.load_tokenizer(DATA / path)
        made |= _sentencepiece_models(whole, Path(folder))
        for name, tokenizer in made.items():
            where = Path(folder) / name.replace(" ", "_")
            vocab.save_tokenizer(tokenizer, where)
            ours = Encoder(where)
            library = ours.tokenizer
            truth = row(
                name,
                "tokenizers encode_batch_fast",
                lambda library=library: [e.ids for e in library.encode_batch_fast(documents, add_special_tokens=False)],  # type: ignore[misc]
                None,
            )
            if ours.backend != "tokenizers":
                row(name, f"{ours.backend} (chosen)", lambda ours=ours: [ours(d) for d in documents], truth)  # type: ignore[misc]
            for other, encode in _others(name, where, documents, ours.backend):
                row(name, other, encode, truth)
    return lines


def _same(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _sentencepiece_models(whole: str, folder: Path) -> dict[str, Any]:
    import sentencepiece

    made = {}
    for kind in ("unigram", "bpe"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for line in whole[:2_000_000].split("\n") if line.strip()),
            model_prefix=str(folder / kind),
            vocab_size=4096,
            model_type=kind,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
            num_threads=1,
        )
        made[f"SentencePiece {kind} 4,096"] = vocab.from_sentencepiece(folder / f"{kind}.model")
    return made


def _others(name: str, where: Path, documents: list[str], chosen: str) -> list[tuple[str, Callable[[], list[Any]]]]:
    """Further backends that are installed and can hold this tokenizer."""
    tree = json.loads((where / "tokenizer.json").read_text(encoding="utf-8"))
    encoders: dict[str, Any] = {}
    for backend, make in (("tiktoken", vocab._tiktoken_backend), ("kitoken", vocab._kitoken_backend)):
        if backend != chosen:
            encoders[backend] = make(tree)
    pattern, _ = vocab._makes_parts(tree)
    if pattern in dict(vocab.PATTERNS.values()):
        quick, vocab.PATTERNS = vocab.PATTERNS, {key: (p, p) for key, (p, _) in vocab.PATTERNS.items()}
        try:
            encoders["tiktoken, pattern as published"] = vocab._tiktoken_backend(tree)
        finally:
            vocab.PATTERNS = quick
    if name == "BPE 4,096, trained here":
        import rustbpe

        model = rustbpe.Tokenizer()
        model.train_from_iterator(iter(["".join(documents)]), 4095, pattern=vocab.PATTERNS["gpt2"][0])
        return [*_rows(encoders, documents), ("rustbpe batch_encode", lambda: model.batch_encode(documents))]
    return _rows(encoders, documents)


def _rows(encoders: dict[str, Any], documents: list[str]) -> list[tuple[str, Callable[[], list[Any]]]]:
    return [
        (n, functools.partial(lambda e: [e(d) for d in documents], e)) for n, e in encoders.items() if e is not None
    ]


# ---- training --------------------------------------------------------------------------------------------------------


def training(repeat: int) -> list[str]:
    """4,096 ids by each library, from documents of 20,000 characters."""
    whole = text()
    documents = [whole[i : i + 20000] for i in range(0, len(whole), 20000)]
    lines = ["| trainer | seconds | MB/s | merges as the exact ones |", "| --- | ---: | ---: | ---: |"]
    pattern = vocab.PATTERNS["gpt2"][0]
    exact: set[bytes] = set()
    for trainer in ("exact", "tokenizers", "rustbpe"):
        seconds, merges = best(
            functools.partial(vocab.train_bpe, documents, 4095, pattern, trainer), 1 if trainer == "exact" else repeat
        )
        pieces = {a + b for a, b in merges}
        exact = exact or pieces
        lines.append(
            f"| {trainer} | {seconds:.2f} | {len(whole.encode()) / seconds / 1e6:.1f} "
            f"| {len(pieces & exact)} of {len(exact)} |"
        )
        print(lines[-1], flush=True)
    return lines


# ---- the stage -------------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, n_bytes: int) -> None:
    """The text as JSON lines in files of 32 MB, every line another."""
    whole = text()
    documents = [whole[i : i + 4000] for i in range(0, len(whole), 4000)]
    folder.mkdir()
    number = written = 0
    while written < n_bytes:
        with open(folder / f"{number:04d}.jsonl", "w", encoding="utf-8") as file:
            size = 0
            while size < min(2**25, n_bytes - written):
                line = json.dumps({"text": f"{written + size} {documents[(written + size) % len(documents)]}"}) + "\n"
                file.write(line)
                size += len(line)
        written += size
        number += 1


def plain_process(job: tuple[list[str], str, str, str, int | None]) -> tuple[int, float]:
    """What anyone would write: files in, one Arrow shard per 16 MB of lines out, its sha256 beside it."""
    import pyarrow as pa

    files, out, tokenizer, dtype, eot = job
    started = time.perf_counter()
    encode = Encoder(tokenizer, "tiktoken")._encode
    end = [] if eot is None else [eot]
    total = 0

    def write(name: str, ids: list[np.ndarray]) -> None:
        tokens = np.concatenate(ids)
        offsets = np.cumsum([0, *(len(i) for i in ids)])
        rows = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(tokens))
        path = f"{out}/{name}.arrow"
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, pa.schema([("tokens", rows.type)])) as writer:
            writer.write_batch(pa.record_batch([rows], names=["tokens"]))
        with open(path, "rb") as file:
            Path(path + ".sha256").write_text(hashlib.file_digest(file, "sha256").hexdigest())

    for file in files:
        with open(file, "rb") as lines:
            ids: list[np.ndarray] = []
            size = part = 0
            for line in lines:
                one = np.append(encode(json.loads(line)["text"]).astype(dtype), np.array(end, dtype))
                ids.append(one)
                total += len(one)
                size += len(line)
                if size >= 2**24:
                    write(f"{Path(file).stem}-{part}", ids)
                    ids, size, part = [], 0, part + 1
            if ids:
                write(f"{Path(file).stem}-{part}", ids)
    return total, time.perf_counter() - started


def unit_process(job: tuple[Any, list[int]]) -> tuple[int, float]:
    """The stage's own code for a share of its units."""
    from pipelines import tokenize

    started = time.perf_counter()
    records = [tokenize.tokenize_unit(job[0], unit) for unit in job[1]]
    return sum(e["tokens"] for r in records for s in r["shards"].values() for e in s), time.perf_counter() - started


def stage(mb: int, workers: int, repeat: int) -> list[str]:
    """Whole jobs after start-up: Ray is up, the tokenizer made, processes spawned within the time of each."""
    from pipelines import tokenize
    from pipelines.lib.cluster import ensure_ray

    lines = [
        f"{mb} MB of JSON lines, {workers} workers, GPT-2-pattern BPE of 4,096 ids by tiktoken.",
        "",
        "| who | seconds, best (all) | M tokens/s | MB/s | of plain |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as root:
        here = Path(root)
        write_corpus(here / "corpus", mb * 10**6)
        config = tokenize.resolve(
            tokenize.TokenizeConfig(source=str(here / "corpus"), out=str(here / "ray"), track="none", workers=workers)
        )
        units, plan = tokenize.plan_units(config.source, config)  # type: ignore[arg-type]
        (here / "ray").mkdir()
        encoder, eot = tokenize._prepare_tokenizer(config, config.source, plan)  # type: ignore[arg-type]
        job = tokenize.Job(config.source, "", units, encoder.backend, "uint16", eot, 0, int(0.05 * tokenize.HASHES))  # type: ignore[arg-type]
        ensure_ray(num_cpus=max(2, workers))
        files = sorted(str(p) for p in (here / "corpus").iterdir())
        context = multiprocessing.get_context("spawn")
        fresh = iter(range(1000))

        def new_out() -> Path:
            out = here / f"out{next(fresh)}"
            (out / "records").mkdir(parents=True)
            (out / "tokenizer").symlink_to(here / "ray" / "tokenizer")
            return out

        def plain() -> tuple[int, float]:
            out = new_out()
            jobs = [(files[i::workers], str(out), str(here / "ray/tokenizer"), "uint16", eot) for i in range(workers)]
            with context.Pool(workers) as pool:
                done = pool.map(plain_process, jobs)
            return sum(n for n, _ in done), 0.0

        def as_units() -> tuple[int, float]:
            import dataclasses as dc

            this = dc.replace(job, out=str(new_out()))
            with context.Pool(workers) as pool:
                done = pool.map(unit_process, [(this, list(range(i, len(units), workers))) for i in range(workers)])
            return sum(n for n, _ in done), 0.0

        def ray() -> tuple[int, float]:
            import dataclasses as dc

            this = dc.replace(job, out=str(new_out()))
            n, peak, inside = 0, 0.0, 0.0
            for record in tokenize.on_ray(this, range(len(units)), workers):
                n += sum(e["tokens"] for shards in record["shards"].values() for e in shards)
                peak, inside = max(peak, record.get("peak_mb", 0)), inside + record["seconds"]
            print(f"  ray: tasks {inside:.1f} s of {workers} workers, worker peak {peak:.0f} MB", flush=True)
            return n, peak

        times: dict[str, list[float]] = {}
        result: dict[str, tuple[int, float]] = {}
        for _ in range(repeat):
            for name, f in (("plain", plain), ("units", as_units), ("ray", ray)):
                started = time.perf_counter()
                result[name] = f()
                times.setdefault(name, []).append(time.perf_counter() - started)
                print(f"  {name}: {times[name][-1]:.1f} s, {result[name][0]:,} tokens", flush=True)
        size = sum(os.path.getsize(f) for f in files)
        for name, all_times in times.items():
            seconds = min(all_times)
            shown = ", ".join(f"{t:.1f}" for t in all_times)
            lines.append(
                f"| {name} | {seconds:.2f} ({shown}) | {result[name][0] / seconds / 1e6:.2f} "
                f"| {size / seconds / 1e6:.1f} | {100 * min(times['plain']) / seconds:.0f} % |"
            )
        lines += ["", f"Peak memory of a Ray worker: {result['ray'][1]:.0f} MB (2^20 bytes)."]
    return lines


def memory(mb: int) -> list[str]:
    """Peak resident size of the whole stage in one process (workers=0), for a corpus and ten times of it."""
    code = (
        "import sys; from pipelines.tokenize import main, peak_memory_mb; "
        "main(sys.argv[1:]); print('PEAK', peak_memory_mb())"
    )
    lines = ["| corpus | peak of the driver, workers=0 |", "| ---: | ---: |"]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as root:
        for n in (mb // 10, mb):
            write_corpus(Path(root) / str(n), n * 10**6)
            words = [
                f"source={root}/{n}",
                f"out={root}/out{n}",
                "track=none",
                "workers=0",
                "shard_mb=4",
                "tokenizer=bytes",
            ]
            done = subprocess.run(
                [sys.executable, "-c", code, *words, "tokenizer=bytes"], capture_output=True, text=True, check=True
            )
            lines.append(f"| {n} MB | {float(done.stdout.split('PEAK')[1]):.0f} MB |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", default="encoders,training,stage,memory")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parts = {
        "encoders": ("Encoders, one core, documents of 4,000 characters", lambda: encoders(options.repeat)),
        "training": ("BPE training, one core, 4,096 ids", lambda: training(options.repeat)),
        "stage": ("The stage", lambda: stage(options.mb, options.workers, options.repeat)),
        "memory": ("Memory", lambda: memory(options.mb)),
    }
    out = []
    for name in options.rows.split(","):
        title, f = parts[name]
        print(f"## {title}", flush=True)
        out += [f"## {title}", "", *f(), ""]
    import importlib.metadata as meta

    names = ("tiktoken", "tokenizers", "sentencepiece", "rustbpe", "pyarrow", "ray", "numpy")
    head = [
        "# Tokenisation",
        "",
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        + ", ".join(f"{n} {meta.version(n)}" for n in names)
        + f". Load average at the end: {os.getloadavg()[0]:.1f}.",
        "",
        "Command: `python -m benchmarks.tokenize " + " ".join(sys.argv[1:]) + "`",
        "",
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join([*head, *out]).rstrip() + "\n", encoding="utf-8")
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    from benchmarks.tokenize import main  # so that spawned processes find the functions by name

    main()
