"""CORE, 22 tasks of in-context learning, for any model: `python -m pipelines.evaluate core RUN bundle=FOLDER`.

reads   run=     a run folder, a checkpoint, or any local Hugging Face folder of a causal language model
        bundle=  the task files: a folder with core.yaml, eval_meta_data.csv and eval_data/, a .zip, an address, or
                 `public`, which downloads the public one
writes  out=     results.json, core/TASK.json: accuracy, chance and centred score of each task, CORE, their standard
                 errors, prompts that were cut (default RUN/evaluation/NAME/); the figures also go to MLflow

python -m pipelines.evaluate core runs/demo bundle=eval_bundle
python -m pipelines.evaluate core gpt2_folder limit=500 workers=4

centred = (accuracy - chance) / (1 - chance); CORE is the mean over all tasks of the bundle, and has no value for some
of them only. Items, examples and prompts are those of DCLM (arXiv:2406.11794) as nanochat asks them, so figures compare
with published ones; examples are drawn from the whole file, also with limit=. Killed at any moment, the same command
goes on: finished tasks are kept. The figures do not depend on workers=, and in float32 not on batch_tokens=.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.spec import ConfigError
from pipelines.lib.config import InputError
from pipelines.lib.core.aggregate import Outcome, centred, core, core_stderr
from pipelines.lib.core.archive import bundle_folder
from pipelines.lib.core.tasks import Task, open_bundle, read_items
from pipelines.lib.core.workers import Answer, Block, Job, blocks_of, in_process, on_ray
from pipelines.lib.output import check_writable
from pipelines.lib.results import Measuring, about, context_of, earlier, open_model, open_subject, track, where, write
from pipelines.lib.shards import file_sha256, write_json

TASKS = "core"  # folder of finished tasks beside results.json


@dataclass(frozen=True)
class CoreConfig(Measuring):
    """Measure CORE.

    bundle: the task files: a folder, a .zip file, an http(s) address, or public
    bundle_sha256: what an archive must have; another one is refused
    cache: folder below which archives are unpacked, once
    tasks: only these tasks of the bundle, by label (commas between)
    limit: items per task; null: all
    context: tokens the model sees at most; null: what it was trained for
    batch_tokens: tokens computed together, padding included; null: 4,096 on a CPU, 65,536 elsewhere
    workers: Ray tasks at a time; 0 works in this process
    """

    bundle: str = "public"
    bundle_sha256: str | None = None
    cache: str = "data/core"
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    context: int | None = None
    batch_tokens: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        self.positive("limit", "context", "batch_tokens", "threads")
        if self.context == 1:
            raise ConfigError("context=1: a prompt and an answer need 2 tokens at least")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers} is negative; 0 works in this process")


@dataclass(frozen=True)
class Done:
    """A finished task. correct: per item.  seconds: of all workers together.  The others as in scorer.Judged."""

    key: str
    correct: tuple[bool, ...]
    cut: int
    long: int
    merged: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "correct": "".join("01"[c] for c in self.correct)}

    @classmethod
    def read(cls, path: Path, key: str) -> Done | None:
        """The record at `path`, if it is of this key; None for another one or what is none."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree["key"] == key:
                return cls(**{**tree, "correct": tuple(c == "1" for c in tree["correct"])})
        return None


def key_of(task: Task, weights: Mapping[str, str], tokenizer: str, context: int, dtype: str, n_items: int) -> str:
    """sha256 of all that decides a task's answers."""
    asked = [task.label, file_sha256(task.path), task.kind, task.shots, task.delimiter, n_items]
    text = json.dumps([asked, weights, tokenizer, context, dtype], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def run_core(config: CoreConfig) -> int:
    """Measure, write results.json, show a table, track. Returns the exit code."""
    from pipelines.lib.jobs import storage_path

    subject = open_subject(config)
    bundle = bundle_folder(config.bundle, storage_path(config.cache), config.bundle_sha256)
    labels = [label.strip() for text in config.tasks for label in text.split(",") if label.strip()]
    tasks = open_bundle(bundle.folder, labels)
    whole = len(tasks) == len(open_bundle(bundle.folder))
    sizes = {task.label: len(read_items(task)) for task in tasks}
    asked = {label: min(n, config.limit or n) for label, n in sizes.items()}
    model = open_model(subject, config)
    context = context_of(model, config.context)
    head = about(subject, model, config)
    del model
    reader = subject.folder / "tokenizer.json"
    words = file_sha256(reader) if reader.is_file() else "none"
    keys = {t.label: key_of(t, subject.weights, words, context, head["model"]["dtype"], asked[t.label]) for t in tasks}
    chances = {task.label: task.chance for task in tasks}
    fingerprint = hashlib.sha256(json.dumps([keys, chances], sort_keys=True).encode()).hexdigest()
    out = where(config, subject, ["core", *labels], fingerprint)
    old = earlier(out / "results.json", fingerprint, config.overwrite)
    if old is not None:
        show(old)
        print(f"{out / 'results.json'} has these figures since {old['date']}; overwrite=true measures them again")
        return 0
    check_writable(out / "results.json", f"out={out}")
    began = time.perf_counter()
    job = Job(subject.folder, config.device, config.dtype, config.threads, context, config.batch_tokens)
    done, asked_now = answer_all(job, tasks, asked, keys, out / TASKS, config)
    seconds = time.perf_counter() - began
    results = {
        **head,
        "text": {},
        "tasks": figures(tasks, done, sizes, whole),
        "core": {
            "bundle": bundle._asdict() | {"folder": str(bundle.folder)},
            "context": context,
            "limit": config.limit,
            "files": {task.label: file_sha256(task.path) for task in tasks},
            "items": sum(asked.values()),
            "items_this_time": asked_now,
            "wall_seconds": round(seconds, 2),
            "items_per_second": round(asked_now / seconds, 2) if asked_now else None,
        },
        "cut_prompts": sum(d.cut for d in done.values()),
        "fingerprint": fingerprint,
    }
    write(out / "results.json", results)
    show(results)
    track(config, subject, results, out)
    print(f"wrote {out / 'results.json'}")
    return 0


def answer_all(
    job: Job, tasks: Sequence[Task], asked: Mapping[str, int], keys: Mapping[str, str], folder: Path, config: CoreConfig
) -> tuple[dict[str, Done], int]:
    """Every task's answers, and how many items were asked for them now; finished tasks are read from `folder`."""
    from pipelines.lib.progress import Progress

    done: dict[str, Done] = {}
    for task in tasks:
        record = None if config.overwrite else Done.read(folder / f"{task.label}.json", keys[task.label])
        if record is not None:
            done[task.label] = record
    pending = [task for task in tasks if task.label not in done]
    if done:
        print(f"going on: {len(done)} of {len(tasks)} tasks are finished", flush=True)
    blocks = [block for task in pending for block in blocks_of(task, asked[task.label])]
    found: dict[str, list[Answer]] = {task.label: [] for task in pending}
    total, finished = sum(block.last - block.first for block in blocks), 0
    with Progress(total, "items", "CORE") as progress:

        def report(items: float) -> None:
            progress.update(finished + int(items))

        for answer in _answers(job, blocks, config.workers, report):
            if answer.error is not None:
                raise InputError(answer.error)
            task, mine = answer.block.task, found[answer.block.task.label]
            mine.append(answer)
            finished += answer.block.last - answer.block.first
            progress.update(finished, on=task.label)
            if sum(a.block.last - a.block.first for a in mine) == asked[task.label]:
                done[task.label] = _joined(mine, keys[task.label])
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / f"{task.label}.json", done[task.label].as_json())
    return {task.label: done[task.label] for task in tasks}, total


def _answers(job: Job, blocks: Sequence[Block], workers: int, report: Any) -> Iterator[Answer]:
    if blocks:
        yield from (on_ray(job, blocks, workers) if workers else in_process(job, blocks, report))


def _joined(answers: Sequence[Answer], key: str) -> Done:
    """The blocks of one task, in the order of its items."""
    parts = [a.judged for a in sorted(answers, key=lambda a: a.block.first) if a.judged is not None]
    return Done(
        key,
        tuple(c for part in parts for c in part.correct),
        sum(part.cut for part in parts),
        sum(part.long for part in parts),
        sum(part.merged for part in parts),
        round(sum(a.seconds for a in answers), 3),
    )


def figures(
    tasks: Sequence[Task], done: Mapping[str, Done], sizes: Mapping[str, int], whole: bool
) -> dict[str, dict[str, Any]]:
    """The entries of `tasks` in results.json: core/TASK for each, and core itself if the whole bundle was asked."""
    entries: dict[str, dict[str, Any]] = {}
    outcomes = {t.label: Outcome(done[t.label].correct, t.chance, t.path) for t in tasks}
    for task in tasks:
        record, outcome = done[task.label], outcomes[task.label]
        entries[f"core/{task.label}"] = {
            "metrics": {
                "acc": _metric(outcome.accuracy, outcome.stderr),
                "centred": _metric(centred(outcome.accuracy, task.chance), outcome.centred_stderr),
            },
            "chance": task.chance,
            "documents": len(record.correct),
            "documents_in_all": sizes[task.label],
            "num_fewshot": task.shots,
            "cut": record.cut,
            "long": record.long,
            "merged": record.merged,
            "seconds": record.seconds,
        }
    if whole:
        value = core({k: o.accuracy for k, o in outcomes.items()}, {k: o.chance for k, o in outcomes.items()}, outcomes)
        entries["core"] = {
            "metrics": {"core": _metric(value, core_stderr(outcomes.values()))},
            "documents": sum(len(d.correct) for d in done.values()),
            "documents_in_all": sum(sizes.values()),
            "cut": sum(d.cut for d in done.values()),
        }
    return entries


def _metric(value: float, stderr: float | None) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "higher_is_better": True}


def show(results: Mapping[str, Any]) -> None:
    """The figures as a table on stdout."""
    from rich import box
    from rich.table import Table

    from pipelines.lib.terminal import print_table, with_error

    model, told = results["model"], results["core"]
    table = Table(title=f"{model['run'] or model['folder']} step {model['step']}", box=box.SIMPLE, title_justify="left")
    for column in ("task", "accuracy", "chance", "centred", "items", "shots", "cut", "items/s"):
        table.add_column(column, justify="left" if column == "task" else "right")
    entries = dict(results["tasks"])
    total = entries.pop("core", None)
    for name, row in entries.items():
        items = str(row["documents"])
        if row["documents_in_all"] != row["documents"]:
            items += f" of {row['documents_in_all']}"
        acc, score = (with_error(m["value"], m["stderr"]) for m in row["metrics"].values())
        rate = f"{row['documents'] / row['seconds']:.1f}" if row["seconds"] else ""
        label = name.removeprefix("core/")
        table.add_row(label, acc, f"{row['chance']:.3f}", score, items, str(row["num_fewshot"]), str(row["cut"]), rate)
    print_table(table)
    if total is not None:
        metric = total["metrics"]["core"]
        print(f"CORE {with_error(metric['value'], metric['stderr'])} over {len(entries)} tasks", end="; ")
    else:
        print("no CORE: only some tasks of the bundle were asked", end="; ")
    speed = f", {told['items_per_second']:,.1f} items/s" if told["items_per_second"] else ""
    print(f"{told['items_this_time']:,} items in {told['wall_seconds']:,.1f} s{speed}")
    print(f"cut: prompts longer than the {told['context']:,} tokens of the context, whose beginning was dropped")
    if any(row["documents"] > 1 and row["metrics"]["acc"]["value"] in (0.0, 1.0) for row in entries.values()):
        print("±: standard errors; where all or none are right, 1 / (items + 1), as far as Wilson's interval reaches")
    for word, what in (
        ("long", "answers longer than the context, scored in windows"),
        ("merged", "prompts whose last token the answer changes, scored from that token on"),
    ):
        if count := sum(row[word] for row in entries.values()):
            print(f"{count:,} {what}")
