"""Measure a model: bits per byte of any text, tasks of the lm-evaluation-harness, CORE, the conformance suite.

reads   run=   a run folder, a checkpoint, or any local Hugging Face folder of a causal language model
        text=, data=, tasks=   what to measure on; none of them: the validation split that the run was trained beside
writes  out=   results.json: figures with standard errors, config, versions, sha256 of the weights
               (default RUN/evaluation/NAME/); the figures also go to the run's MLflow run

python -m pipelines.evaluate runs/demo
python -m pipelines.evaluate runs/demo text=book.txt stride=64
python -m pipelines.evaluate runs/demo tasks=arc_easy,my_tasks/ limit=200
python -m pipelines.evaluate core runs/demo bundle=eval_bundle       (CORE: 22 tasks, their mean over chance)
python -m pipelines.evaluate contamination books/ bundle=eval_bundle     (which test items stand in a corpus)
python -m pipelines.evaluate parity runs/demo endpoint=http://127.0.0.1:8000     (the same scores, however asked)
python -m pipelines.evaluate check gpt        (or a run, a folder, a recipe, a preset: every promise of the design)

How text is scored. Each document is one sequence that begins with the tokenizer's beginning-of-text token (else its
end-of-text token; else the document's first token is not scored and its bytes do not count); the end of a document is
not scored. data= is one stream of tokens as in training, ends of documents included. Windows of `context` tokens slide
by `stride`, and every token is scored once. Bits per byte = nats / ln 2 / UTF-8 bytes of the text itself.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from models.spec import ConfigError, fields, plain
from pipelines.lib import checking, contamination, parity
from pipelines.lib.checking import CheckConfig, run_check
from pipelines.lib.config import InputError, command, describe
from pipelines.lib.contamination import ContaminationConfig, run_contamination
from pipelines.lib.core import command as core_command
from pipelines.lib.core.command import CoreConfig, run_core
from pipelines.lib.corpus import Source
from pipelines.lib.output import check_writable
from pipelines.lib.parity import ParityConfig, run_parity
from pipelines.lib.results import (
    FORMAT_VERSION,
    LONGEST_CONTEXT,
    Measuring,
    Subject,
    about,
    context_of,
    earlier,
    open_model,
    open_subject,
    track,
    where,
    write,
)
from pipelines.lib.texts import Text, open_data, open_text, open_tokenizer

if TYPE_CHECKING:
    from pipelines.lib.estimate import Estimate

LOGITS_PER_BATCH = {"cpu": 1 << 25, "other": 1 << 29}  # elements of [batch, context, vocabulary]
TOKENS_PER_BATCH = {"cpu": 1 << 12, "other": 1 << 16}
ESTIMATE_BATCHES = 4  # of each text that an estimate scores
ESTIMATE_BASELINE = 1 << 19  # bytes of each text that an estimate compresses


@dataclass(frozen=True)
class EvaluateConfig(Measuring):
    """Measure a model.

    text: text to score: a file, folder, glob, stdlib, or {kind: hub, name: ...} as in pipelines.tokenize
    text_mb: stop reading the text after so many megabytes (2^20 bytes)
    data: folder of token shards to score, as training reads them
    split: which split of data
    data_tokens: score only the first so many tokens of it
    tasks: tasks of lm-eval by name (commas between), YAML files, or folders of them
    include_path: folder of task YAMLs that tasks may name
    limit: documents per task (below 1: a share); null: all
    num_fewshot: examples before each question; null: as each task says
    bootstrap: draws behind the standard errors of task metrics that are no means
    samples: also write every request of the tasks and its answer to samples.jsonl
    context: tokens the model sees at most; null: what it was trained for
    stride: tokens by which windows slide; null: half the context; as much as the context: as training validates
    baselines: also measure gzip, xz and a unigram model on the same text
    batch_size: rows computed together; null: by context, vocabulary and device
    seed: of the choice of few-shot examples
    """

    text: str | Source | None = None
    text_mb: float | None = None
    data: str | None = None
    split: str = "val"
    data_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    include_path: tuple[str, ...] = ()
    limit: float | None = None
    num_fewshot: int | None = None
    bootstrap: int = 1000
    samples: bool = False
    context: int | None = None
    stride: int | None = None
    baselines: bool = True
    batch_size: int | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        self.positive("context", "stride", "batch_size", "threads", "text_mb", "data_tokens", "limit")
        if self.limit is not None and self.limit > 1 and not self.limit.is_integer():
            raise ConfigError(f"limit={self.limit}: a whole number of documents, or a share below 1")
        for name in ("num_fewshot", "bootstrap"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is negative")
        on_data = self.data is not None or (self.text is None and not self.tasks)
        for names, read, owner in (
            ("text_mb", self.text is not None, "text="),
            ("split data_tokens", on_data, "data="),
            ("include_path limit num_fewshot samples bootstrap seed", bool(self.tasks), "tasks="),
            ("stride baselines", on_data or self.text is not None, "text= or data="),
        ):
            for name in names.split():
                if not read and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ConfigError(f"{name}={plain(getattr(self, name))}: it belongs to {owner}, which is not given")


# What decides the figures: two evaluations that agree in these (and in weights, text and tasks) measure the same.
MEASURING = (
    *"text text_mb data split data_tokens tasks limit num_fewshot".split(),
    *"bootstrap samples context stride baselines dtype seed".split(),
)


# ---- what is measured ------------------------------------------------------------------------------------------------


def window_of(model: Any, config: EvaluateConfig) -> int:
    """Tokens a window over text reads: the context; of other people's models at most LONGEST_CONTEXT unless told.

    They state contexts of 100,000 tokens and more, over which a window costs minutes and logits fill the memory.
    """
    from models.lm import LM

    own = context_of(model, config.context)
    return own if config.context or isinstance(model, LM) else min(own, LONGEST_CONTEXT)


def stride_of(context: int, config: EvaluateConfig) -> int:
    stride = config.stride or max(1, context // 2)
    if stride > context:
        raise ConfigError(f"stride={stride} is more than the context of {context} tokens: some would not be scored")
    return stride


def batch_of(model: Any, context: int, config: EvaluateConfig) -> int:
    """Rows computed together, so that activations and logits stay within what a small machine has."""
    if config.batch_size is not None:
        return config.batch_size
    kind = "cpu" if model.device.type == "cpu" else "other"
    vocab = model.get_output_embeddings().weight.shape[0] if model.get_output_embeddings() is not None else 1 << 15
    return max(1, min(LOGITS_PER_BATCH[kind] // (context * vocab), TOKENS_PER_BATCH[kind] // context, 256))


def trained_on(subject: Subject) -> str:
    """The token folder whose validation split a run watched. Raises InputError for what is no run."""
    from pipelines.lib.run import Run

    if subject.run is None:
        raise InputError(f"{subject.folder} is of no run, so it has no validation split; give text=, data= or tasks=")
    run = Run(subject.run)
    data: Any = run.read_config().get("data")
    try:
        return data if isinstance(data, str) else str(data[0]["path"])
    except (TypeError, LookupError):
        raise InputError(
            f"{run.config} names no `data`, so the run's validation split is not known; give text=, data= or tasks="
        ) from None


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure_text(model: Any, text: Text, config: EvaluateConfig) -> dict[str, Any]:
    """Nats, perplexity and bits per byte of one text, with errors, and what the baselines need for it."""
    from pipelines.lib.progress import Progress
    from pipelines.lib.scoring import Tally, compression_baselines, score

    context = window_of(model, config)
    stride, rows = stride_of(context, config), batch_of(model, context, config)
    embedding = model.get_input_embeddings().weight.shape[0]
    if text.largest >= embedding:
        raise InputError(
            f"{text.name} has token id {text.largest}, but the model has {embedding}; its tokens are not the model's"
        )
    tally, began = Tally(), time.perf_counter()
    with Progress(text.n_targets, "tokens", text.name) as progress:
        for window, nll, targets in score(model, text.sequences, context, stride, rows, progress.update):
            if not np.isfinite(nll).all():
                at = window.first + 1 + int(np.argmin(np.isfinite(nll)))
                raise InputError(f"the model gives no finite likelihood to token {at} of {text.name}; has it diverged?")
            tally.add(text.documents(window), nll, text.table[targets])
    figures = tally.figures(text.n_bytes) | text.notes | {"fingerprint": text.fingerprint}
    figures |= {"context": context, "stride": stride, "seconds": round(time.perf_counter() - began, 2)}
    if config.baselines and text.head:
        known = None if text.head_ids is None else int(text.table[text.head_ids].sum())
        figures["baselines_bits_per_byte"] = compression_baselines(text.head, text.head_ids, known or None)
        figures["baselines_bytes"] = len(text.head)
    return figures


def measure_tasks(
    model: Any, config: EvaluateConfig, subject: Subject, found: Any, out: Path
) -> tuple[dict[str, Any], int]:
    """lm-eval's tasks on the model: (figures by task, prompts that lost their beginning)."""
    from pipelines.lib.harness import run_tasks

    context = context_of(model, config.context)
    tables, samples, cut = run_tasks(
        model,
        open_tokenizer(subject.folder),
        found,
        max_length=context,
        batch_size=batch_of(model, min(context, LONGEST_CONTEXT), config),
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        bootstrap=config.bootstrap,
        seed=config.seed,
    )
    if config.samples:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "samples.jsonl", "w", encoding="utf-8") as file:
            for task, rows in samples.items():
                for row in rows:
                    file.write(json.dumps({"task": task, **row}, ensure_ascii=False, default=str) + "\n")
    return tables, cut


def open_texts(config: EvaluateConfig, subject: Subject) -> tuple[list[str], list[Text]]:
    """The names of tasks, and the texts to score. Raises InputError for what is not there."""
    from pipelines.lib.jobs import storage_path

    words = [w.strip() for text in config.tasks for w in text.split(",") if w.strip()]
    if config.tasks and not words:
        raise InputError("tasks= names none")
    texts: list[Text] = []
    if config.text is not None:
        texts.append(open_text(config.text, subject.folder, config.text_mb))
    if config.data is not None or (config.text is None and not words):
        data = storage_path(config.data or trained_on(subject))
        texts.append(open_data(data, config.split, subject.folder, config.data_tokens))
        if len({text.name for text in texts}) < len(texts):
            texts[0].name += "_text"
    return words, texts


def estimate(config: EvaluateConfig) -> Estimate:
    """What scoring the texts will take: the beginning of each is scored. Raises InputError for tasks alone."""
    from pipelines.lib.cost import Memory
    from pipelines.lib.estimate import Estimate
    from pipelines.lib.scoring import compression_baselines, windows
    from pipelines.lib.world import choose_device

    subject = open_subject(config)
    words, texts = open_texts(config, subject)
    if not texts:
        raise InputError("--estimate counts text= and data=; how long tasks= are is known only when they are built")
    memory = Memory(choose_device(config.device))
    model = open_model(subject, config)
    context = window_of(model, config)
    stride, rows = stride_of(context, config), batch_of(model, context, config)
    read = lambda sequences: sum(w.end - w.begin for s in sequences for w in windows(len(s), context, stride))
    seconds, baselines_s, n_read = 0.0, 0.0, 0
    for text in texts:
        few = beginning(text, ESTIMATE_BATCHES * rows * context)
        score_s = scoring_seconds(model, few, context, stride, rows)
        in_text = read(text.sequences)
        n_read += in_text
        seconds += score_s * in_text / max(1, read(few))
        if config.baselines and text.head:
            began = time.perf_counter()
            part = text.head[:ESTIMATE_BASELINE]
            compression_baselines(part)
            baselines_s += (time.perf_counter() - began) * len(text.head) / len(part)
    macs = model.flops_per_token(context) / 6 if hasattr(model, "flops_per_token") else None
    return Estimate(
        tokens=sum(text.n_targets for text in texts),
        seconds=seconds + baselines_s,
        memory_gb=memory.gb(),
        parameters=model.num_parameters(),
        macs_per_token=macs,
        flops=None if macs is None else 2 * macs * n_read,
        parts={"read, with what windows share": f"{n_read:,} tokens", "baselines": f"{baselines_s:.1f} s"},
        notes=("tasks= are not counted: how long they are is known only when they are built",) if words else (),
    )


def beginning(text: Text, n: int) -> list[np.ndarray]:
    """The first sequences of a text, n tokens of them at most."""
    few: list[np.ndarray] = []
    for sequence in text.sequences:
        if n < 2:
            break
        few.append(np.asarray(sequence[0 : min(len(sequence), n)]))
        n -= len(few[-1])
    return few


def scoring_seconds(model: Any, sequences: list[np.ndarray], context: int, stride: int, rows: int) -> float:
    """Seconds to score these, the second time."""
    from pipelines.lib.scoring import score

    for _ in range(2):
        began = time.perf_counter()
        for _window in score(model, sequences, context, stride, rows):
            pass
    return time.perf_counter() - began


def run(config: EvaluateConfig) -> int:
    """Measure, write results.json, show a table, track. Returns the exit code."""
    from pipelines.lib.jobs import storage_path

    subject = open_subject(config)
    words, texts = open_texts(config, subject)
    found = None
    if words:
        from pipelines.lib.harness import find_tasks

        open_tokenizer(subject.folder)
        found = find_tasks(words, [storage_path(p) for p in config.include_path])
    key = {
        "format_version": FORMAT_VERSION,
        "weights": subject.weights,
        "settings": {name: value for name, value in plain(config).items() if name in MEASURING},
        "texts": [text.fingerprint for text in texts],
        "tasks": found and [found.names, found.fingerprint],
    }
    fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    words = [*(text.name for text in texts), *(found.names if found else ())]
    out = where(config, subject, words, fingerprint)
    old = earlier(out / "results.json", fingerprint, config.overwrite)
    if old is not None:
        show(old)
        print(f"{out / 'results.json'} has these figures since {old['date']}; overwrite=true measures them again")
        return 0
    check_writable(out / "results.json", f"out={out}")
    results = measure(config, subject, texts, found, out) | {"fingerprint": fingerprint}
    write(out / "results.json", results)
    show(results)
    track(config, subject, results, out, "samples.jsonl")
    print(f"wrote {out / 'results.json'}")
    return 0


def measure(config: EvaluateConfig, subject: Subject, texts: list[Text], found: Any, out: Path) -> dict[str, Any]:
    """All figures of one evaluation, with what they were measured on and by."""
    import torch

    began, date = time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    model = open_model(subject, config)
    try:
        measured = {text.name: measure_text(model, text, config) for text in texts}
        tasks, cut = measure_tasks(model, config, subject, found, out) if found else ({}, 0)
    except torch.OutOfMemoryError:
        rows = batch_of(model, context_of(model, config.context), config)
        raise InputError(
            f"batch_size={rows} rows of {context_of(model, config.context)} tokens do not fit into the memory of "
            f"{model.device}; try batch_size={max(1, rows // 2)}, or a smaller context"
        ) from None
    return {
        **about(subject, model, config, *(["lm-eval", "datasets"] if tasks else [])),
        "text": measured,
        "tasks": tasks,
        "cut_prompts": cut,
        "date": date,
        "seconds": round(time.perf_counter() - began, 2),
    }


# ---- what is written -------------------------------------------------------------------------------------------------


def show(results: dict[str, Any]) -> None:
    """The figures as tables on stdout."""
    from rich import box
    from rich.table import Table

    from pipelines.lib.terminal import print_table, with_error

    model = results["model"]
    title = f"{model['run'] or model['folder']}{' step ' + str(model['step']) if model['run'] else ''}"
    lines: list[str] = []
    if results["text"]:
        table = Table(title=title, box=box.SIMPLE, title_justify="left")
        for column in ("text", "bits per byte", "nats per token", "perplexity", "tokens", "bytes"):
            table.add_column(column, justify="left" if column == "text" else "right")
        for name, row in results["text"].items():
            cells = [with_error(row[k], row[f"{k}_stderr"]) for k in ("bits_per_byte", "nats_per_token", "perplexity")]
            table.add_row(name, *cells, f"{row['tokens']:,}", f"{row['bytes']:,}" if row["bytes"] else "not known")
            for baseline, value in row.get("baselines_bits_per_byte", {}).items():
                table.add_row(f"  {baseline}", f"{value:.4f}", style="dim")
            over = row["stderr_over"]
            error = f"± is one standard error over {over}" if over else "too short for a standard error"
            lines.append(f"{name}: windows of {row['context']} tokens, stride {row['stride']}; {error}")
            if row["stride"] != row["context"] and "split" in row:
                lines.append(
                    f"training validates with windows side by side; stride={row['context']} repeats its figure"
                )
        print_table(table)
    if results["tasks"]:
        table = Table(title=None if results["text"] else title, box=box.SIMPLE, title_justify="left")
        for column in ("task", "metric", "value", "documents", "examples"):
            table.add_column(column, justify="left" if column in ("task", "metric") else "right")
        for task, row in results["tasks"].items():
            for i, (metric, entry) in enumerate(row["metrics"].items()):
                first = i == 0
                count = str(row["documents"] or "") if first else ""
                if first and row["documents"] and row["documents_in_all"] != row["documents"]:
                    count += f" of {row['documents_in_all']}" if row["documents_in_all"] else ""
                shots = str(row["num_fewshot"]) if first and row["num_fewshot"] is not None else ""
                value = with_error(entry["value"], entry["stderr"])
                table.add_row(task if first else "", metric, value, count, shots)
        print_table(table)
    if results.get("cut_prompts"):
        lines.append(
            f"{results['cut_prompts']:,} prompts were longer than the model's context; their beginning was cut"
        )
    for line in lines:
        print(line)


# Other things to measure, as a first word: the settings, what they do, and the module whose docstring --help shows.
COMMANDS: dict[str, tuple[type, Callable[[Any], int], ModuleType]] = {
    "core": (CoreConfig, run_core, core_command),
    "contamination": (ContaminationConfig, run_contamination, contamination),
    "parity": (ParityConfig, run_parity, parity),
    "check": (CheckConfig, run_check, checking),
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] and words[0] in COMMANDS:
        cls, work, module = COMMANDS[words[0]]
        words = [words[0], *getattr(module, "words", list)(words[1:])]
        positional = next(iter(fields(cls)))
        if {"-h", "--help"} & set(words):
            call = f"python -m pipelines.evaluate {words[0]} {positional.upper()} key=value ... [--debug]"
            settings = describe(cls, positional=positional)
            print("\n".join([str(module.__doc__), "", call, "", "settings and defaults:", *settings]))
            return 0
        # A bare word is the model, even one that ends in .yaml, which elsewhere is a recipe for the command itself.
        named = [f"{positional}={w}" if "=" not in w and not w.startswith("-") else w for w in words[1:2]]
        stage = partial(command, cls, work, [*named, *words[2:]], positional=positional)
    else:
        stage = partial(command, EvaluateConfig, run, words, positional="run", estimate=estimate)
    try:
        return stage()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    from pipelines.evaluate import main  # so that classes have their importable names

    sys.exit(main())
