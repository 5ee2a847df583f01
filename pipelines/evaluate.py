"""Measure a model: bits per byte of any text, tasks of the lm-evaluation-harness, the conformance suite.

reads   run=   a run folder, a checkpoint, or any local Hugging Face folder of a causal language model
        text=, data=, tasks=   what to measure on; none of them: the validation split that the run was trained beside
writes  out=   results.json: figures with standard errors, config, versions, sha256 of the weights
               (default RUN/evaluation/NAME/); the figures also go to the run's MLflow run

python -m pipelines.evaluate runs/demo
python -m pipelines.evaluate runs/demo text=book.txt stride=64
python -m pipelines.evaluate runs/demo tasks=arc_easy,my_tasks/ limit=200
python -m pipelines.evaluate check gpt        (or a run, a folder, a recipe, a preset: every promise of the design)

How text is scored. Each document is one sequence that begins with the tokenizer's beginning-of-text token (else its
end-of-text token; else the document's first token is not scored and its bytes do not count); the end of a document is
not scored. data= is one stream of tokens as in training, ends of documents included. Windows of `context` tokens slide
by `stride`, and every token is scored once. Bits per byte = nats / ln 2 / UTF-8 bytes of the text itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from models.spec import ConfigError, near, plain
from pipelines.lib.config import InputError, command
from pipelines.lib.corpus import Source

if TYPE_CHECKING:
    from pipelines.lib.shards import TokenFolder, Tokens

FORMAT_VERSION = 1
BASELINE_BYTES = 16 << 20  # of a text, that gzip and xz are measured on; xz takes about 10 s for them
LOGITS_PER_BATCH = {"cpu": 1 << 25, "other": 1 << 29}  # elements of [batch, context, vocabulary]
TOKENS_PER_BATCH = {"cpu": 1 << 12, "other": 1 << 16}
LONGEST_CONTEXT = 2048  # of a model that states none


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model.

    run: run folder, checkpoint folder or any local Hugging Face folder
    which: the checkpoint of a run: best, last or step_N
    text: text to score: a file, folder, glob, stdlib, or {kind: hub, name: ...} as in pipelines.tokenize
    text_mb: stop reading the text after so many megabytes (2^20 bytes)
    data: folder of token shards to score, as training reads them
    split: which split of data
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
    device: auto, cpu, cuda, mps or xpu
    dtype: number format of the weights; auto: as they were saved
    threads: CPU threads; null: the machine's own choice
    seed: of the choice of few-shot examples
    out: folder for results.json; null: RUN/evaluation/NAME, or evaluation/MODEL/NAME for what is no run
    overwrite: measure again where results of the same settings are, or others
    track: where figures go beside results.json
    """

    run: str
    which: str = "best"
    text: str | Source | None = None
    text_mb: float | None = None
    data: str | None = None
    split: str = "val"
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
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = None
    seed: int = 1234
    out: str | None = None
    overwrite: bool = False
    track: Literal["mlflow", "none"] = "mlflow"

    def __post_init__(self) -> None:
        for name in ("context", "stride", "batch_size", "threads", "text_mb", "limit"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} is not positive; leave it out for the default")
        if self.limit is not None and self.limit > 1 and not self.limit.is_integer():
            raise ConfigError(f"limit={self.limit}: a whole number of documents, or a share below 1")
        for name in ("num_fewshot", "bootstrap"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is negative")


# What decides the figures: two evaluations that agree in these (and in weights, text and tasks) measure the same.
MEASURING = (
    "text text_mb data split tasks limit num_fewshot bootstrap samples context stride baselines dtype seed".split()
)


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """The model to measure. folder: its files.  run: the run it belongs to, if any.  step: of a checkpoint."""

    folder: Path
    run: Path | None
    step: int
    weights: dict[str, str]  # file -> sha256

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def shown(self) -> str:
        return f"{self.run} {self.name}" if self.run else str(self.folder)


def open_subject(config: EvaluateConfig) -> Subject:
    """Find the model that `run` means. Raises InputError for what is none, or has no weights."""
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.run import Run, resolve
    from pipelines.lib.shards import file_sha256

    path = storage_path(config.run)
    folder = resolve(path, config.which, say=lambda message: print(message, file=sys.stderr))
    owner = folder.parent.parent if folder.parent.name == "checkpoints" else None
    number = folder.name.removeprefix("step_")
    files = [p for pattern in ("*.safetensors", "pytorch_model*.bin") for p in sorted(folder.glob(pattern))]
    if not files:
        raise InputError(f"{folder}: no weights here (model.safetensors or pytorch_model.bin)")
    return Subject(
        folder,
        owner if owner is not None and Run(owner).exists() else None,
        int(number) if number.isdigit() else 0,
        {p.name: file_sha256(p) for p in files},
    )


def open_model(subject: Subject, config: EvaluateConfig) -> Any:
    """The model in evaluation mode on its device. Raises InputError for damaged files, ConfigError for the device."""
    import torch

    from models.families import load
    from pipelines.lib.world import choose_device

    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        model = load(subject.folder, None if config.dtype == "auto" else getattr(torch, config.dtype))
    except Exception as error:  # transformers, safetensors, json and torch each have their own
        raise InputError(f"{subject.folder}: not a model that can be opened ({said(error)})") from error
    return cast(Any, model).to(device).eval()


def said(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def context_of(model: Any, config: EvaluateConfig) -> int:
    """Tokens a window reads: `context`, else the model's own. Raises ConfigError if it is longer than the model's."""
    own = None
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        own = own or getattr(model.config.get_text_config(decoder=True), name, None)
    if config.context is not None and own is not None and config.context > own:
        raise ConfigError(f"context={config.context} is longer than the {own} tokens the model was made for")
    return config.context or own or LONGEST_CONTEXT


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


class Stream:
    """A split of a token folder as one sequence."""

    def __init__(self, tokens: Tokens):
        self.tokens = tokens

    def __len__(self) -> int:
        return self.tokens.n_tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.tokens.window(part.start, part.stop - part.start)


@dataclass
class Text:
    """A text as tokens, ready to be scored.

    name: in tables and metrics.  sequences: each begins with a token that is not scored.  table: bytes behind each
    id, [V] (zeros: not known).  n_bytes: of the text that is scored.  head: the text itself, as much of it as the
    baselines take; head_ids: its tokens; ids_bytes: the bytes behind those.  fingerprint: sha256.  notes: how it was
    made into tokens.
    """

    name: str
    sequences: Sequence[Any]
    table: np.ndarray
    n_bytes: int | None
    head: bytes
    head_ids: np.ndarray | None
    fingerprint: str
    notes: dict[str, Any]
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
    size = 0
    plan = source.plan(1 << 62)
    for piece in plan.slices:
        for document in source.read(piece, counts):
            yield document.begins, document.text
            size += document.n_bytes
            if text_mb is not None and size >= text_mb * 2**20:
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


def open_text(setting: str | Source, config: EvaluateConfig, subject: Subject) -> Text:
    """A text source as tokens of the model's tokenizer. Raises InputError if it is empty or has nothing to score."""
    from pipelines.lib.corpus import source
    from pipelines.lib.vocab import token_bytes

    tokenizer = open_tokenizer(subject.folder)
    encode, table = encoder_of(tokenizer, subject.folder), token_bytes(tokenizer).astype(np.int64)
    prefix = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    pieces: list[list[np.ndarray]] = []
    total, digest, head, head_ids = 0, hashlib.sha256(), bytearray(), []
    for begins, text in read_documents(source(setting), config.text_mb):
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
    sequences = [np.concatenate(p) for p in pieces]
    n_tokens = sum(len(s) for s in sequences) - (len(sequences) if prefix is not None else 0)
    if not sum(len(s) - 1 for s in sequences):
        raise InputError(
            f"text={shown}: {n_tokens} token(s) in {len(sequences)} document(s); at least 2 are needed, for the "
            "tokenizer has no beginning- or end-of-text token to predict the first one from"
        )
    if tokenizer.backend_tokenizer.get_vocab_size() and int(max(s.max() for s in sequences)) >= len(table):
        raise InputError(f"text={shown}: the tokenizer gives ids outside its own vocabulary of {len(table)}")
    in_tokens = int(sum(table[p].sum() for s in pieces for p in (s if prefix is None else s[1:])))
    first = 0 if prefix is not None else int(sum(table[s[0]] for s in sequences))
    if abs(in_tokens - total) > 0.005 * total + len(sequences):
        print(
            f"warning: the tokens of this text stand for {in_tokens:,} bytes of its {total:,}: the tokenizer rewrites "
            "text or has no tokens for some of it, so its bits per byte flatter the model"
        )
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
    name = Path(setting).stem if isinstance(setting, str) else str(getattr(setting, "name", type(setting).__name__))
    return Text(
        name.replace("/", "_").lower() or "text",
        sequences,
        table,
        total - first,
        bytes(head),
        ids,
        digest.hexdigest(),
        notes,
    )


def open_data(path: str, config: EvaluateConfig, subject: Subject) -> Text:
    """A split of a token folder, as training sees it. Raises InputError; also if its tokenizer is not the model's."""
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.shards import TokenFolder, file_sha256

    folder = TokenFolder.open(storage_path(path))
    tokens = folder.split(config.split)
    if tokens.n_tokens < 2:
        raise InputError(f"{folder.path}: split {config.split!r} has {tokens.n_tokens} token; at least 2 are needed")
    theirs = folder.tokenizer_dir / "tokenizer.json" if folder.tokenizer_dir else None
    ours = subject.folder / "tokenizer.json"
    if theirs and theirs.is_file() and ours.is_file() and file_sha256(theirs) != file_sha256(ours):
        raise InputError(
            f"{folder.path} was made with another tokenizer than the model's ({theirs} and {ours} differ); "
            "give the text itself: text=..."
        )
    known = folder.token_bytes()
    table = np.zeros(folder.vocab_size, np.int64) if known is None else np.asarray(known, np.int64)
    n_bytes = None
    if known is not None:
        n_bytes = sum(int(table[w].sum()) for w in _blocks(tokens)) - int(table[tokens.window(0, 1)[0]])
    notes = {
        "source": str(folder.path),
        "split": config.split,
        "documents": tokens.n_documents,
        "tokens_in_all": tokens.n_tokens,
        "begins_with": None,
        "ends_of_documents": "scored, as in training",
    }
    head, head_ids = _decoded(folder, tokens)
    return Text(
        config.split, [Stream(tokens)], table, n_bytes, head, head_ids, folder.fingerprint, notes, stream=tokens
    )


def _blocks(tokens: Tokens, size: int = 1 << 20) -> Iterator[np.ndarray]:
    for start in range(0, tokens.n_tokens, size):
        yield tokens.window(start, min(size, tokens.n_tokens - start))


def _decoded(folder: TokenFolder, tokens: Tokens) -> tuple[bytes, np.ndarray | None]:
    """The text of a split and its tokens, without ends of documents, as much of it as the baselines take."""
    known = folder.token_bytes()
    if folder.tokenizer_dir is None or known is None:
        return b"", None
    from pipelines.lib.vocab import load_tokenizer

    tokenizer = load_tokenizer(folder.tokenizer_dir)
    text, ids = bytearray(), []
    for block in _blocks(tokens, 1 << 16):
        kept = block[np.asarray(known)[block] > 0].astype(np.uint32)
        text += str(tokenizer.decode(kept.tolist(), clean_up_tokenization_spaces=False)).encode()
        ids.append(kept)
        if len(text) >= BASELINE_BYTES:
            break
    return bytes(text), np.concatenate(ids)


def trained_on(subject: Subject) -> str:
    """The token folder whose validation split a run watched. Raises InputError for what is no run."""
    from pipelines.lib.run import Run

    if subject.run is None:
        raise InputError(f"{subject.folder} is of no run, so it has no validation split; give text=, data= or tasks=")
    data = Run(subject.run).read_config()["data"]
    return data if isinstance(data, str) else data[0]["path"]


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure_text(model: Any, text: Text, config: EvaluateConfig) -> dict[str, Any]:
    """Nats, perplexity and bits per byte of one text, with errors, and what the baselines need for it."""
    from pipelines.lib.progress import Progress
    from pipelines.lib.scoring import Tally, compression_baselines, score

    context = context_of(model, config)
    stride, rows = stride_of(context, config), batch_of(model, context, config)
    embedding = model.get_input_embeddings().weight.shape[0]
    if text.stream is None and (largest := int(max(s.max() for s in text.sequences))) >= embedding:
        raise InputError(f"the tokenizer gives id {largest}, but the model has {embedding} ids; it is not this model's")
    if text.stream is not None and len(text.table) > embedding:
        raise InputError(f"the tokens have {len(text.table)} ids, but the model has {embedding}; they are not for it")
    tally, began = Tally(), time.perf_counter()
    with Progress(text.n_targets, "tokens", text.name) as progress:
        for window, nll, targets in score(model, text.sequences, context, stride, rows, progress.update):
            if not np.isfinite(nll).all():
                at = window.first + 1 + int(np.argmin(np.isfinite(nll)))
                raise InputError(f"the model gives no finite likelihood to token {at} of {text.name}; has it diverged?")
            tally.add(text.documents(window), nll, text.table[targets])
    figures = tally.figures(text.n_bytes) | text.notes
    figures |= {"context": context, "stride": stride, "seconds": round(time.perf_counter() - began, 2)}
    if config.baselines and text.head:
        known = None if text.head_ids is None else int(text.table[text.head_ids].sum())
        figures["baselines_bits_per_byte"] = compression_baselines(text.head, text.head_ids, known or None)
        figures["baselines_bytes"] = len(text.head)
    return figures


def measure_tasks(model: Any, config: EvaluateConfig, subject: Subject, found: Any, out: Path) -> dict[str, Any]:
    """lm-eval's tasks on the model; their figures by task."""
    from pipelines.lib.harness import run_tasks

    context = context_of(model, config)
    tables, samples = run_tasks(
        model,
        open_tokenizer(subject.folder),
        found,
        max_length=context,
        batch_size=batch_of(model, context, config),
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
    return tables


def run(config: EvaluateConfig) -> int:
    """Measure, write results.json, show a table, track. Returns the exit code."""
    from pipelines.lib.jobs import storage_path

    subject = open_subject(config)
    words = [w.strip() for text in config.tasks for w in text.split(",") if w.strip()]
    if config.tasks and not words:
        raise InputError("tasks= names none")
    texts: list[Text] = []
    if config.text is not None:
        texts.append(open_text(config.text, config, subject))
    if config.data is not None or (config.text is None and not words):
        texts.append(open_data(config.data or trained_on(subject), config, subject))
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
    out = where(config, subject, [text.name for text in texts], found.names if found else (), fingerprint)
    old = earlier(out / "results.json", fingerprint, config.overwrite)
    if old is not None:
        show(old)
        print(f"{out / 'results.json'} has these figures since {old['date']}; overwrite=true measures them again")
        return 0
    try:
        results = measure(config, subject, texts, found, out) | {"fingerprint": fingerprint}
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    write(out / "results.json", results)
    show(results)
    track(config, subject, results, out)
    print(f"wrote {out / 'results.json'}")
    return 0


def measure(config: EvaluateConfig, subject: Subject, texts: list[Text], found: Any, out: Path) -> dict[str, Any]:
    """All figures of one evaluation, with what they were measured on and by."""
    import torch

    began, date = time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    model = open_model(subject, config)
    try:
        measured = {text.name: measure_text(model, text, config) for text in texts}
        tasks = measure_tasks(model, config, subject, found, out) if found else {}
    except torch.OutOfMemoryError:
        rows = batch_of(model, context_of(model, config), config)
        raise InputError(
            f"batch_size={rows} rows of {context_of(model, config)} tokens do not fit into the memory of "
            f"{model.device}; try batch_size={max(1, rows // 2)}, or a smaller context"
        ) from None
    from pipelines.lib import machine

    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.processor()
    return {
        "format_version": FORMAT_VERSION,
        "model": {
            "run": str(subject.run) if subject.run else None,
            "folder": str(subject.folder),
            "step": subject.step,
            "class": type(model).__name__,
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "sha256": subject.weights,
        },
        "text": measured,
        "tasks": tasks,
        "config": plain(config),
        "device": f"{model.device} {device}".strip(),
        "versions": versions(bool(tasks)),
        "git_sha": machine.git_sha(),
        "date": date,
        "seconds": round(time.perf_counter() - began, 2),
    }


def versions(tasks: bool) -> dict[str, str]:
    from importlib.metadata import version

    packages = ["torch", "transformers", "tokenizers", "numpy", *(["lm-eval", "datasets"] if tasks else [])]
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


# ---- what is written -------------------------------------------------------------------------------------------------


def where(
    config: EvaluateConfig, subject: Subject, texts: Sequence[str], tasks: Sequence[str], fingerprint: str
) -> Path:
    """The folder of the results: `out`, or one whose name says what was measured and ends in the settings' hash."""
    from pipelines.lib.jobs import storage_path

    if config.out is not None:
        return storage_path(config.out)
    parts = [*texts, *tasks]
    words = "-".join(parts if len(parts) <= 3 else [*parts[:2], f"{len(parts) - 2}_more"])
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in words)[:60]
    if subject.run is not None:
        return subject.run / "evaluation" / f"{subject.name}-{name}-{fingerprint[:8]}"
    return storage_path("evaluation") / subject.name / f"{name}-{fingerprint[:8]}"


def earlier(path: Path, fingerprint: str, overwrite: bool) -> dict[str, Any] | None:
    """The results that are there already. Raises InputError if they are of other settings, or no results at all."""
    if overwrite or not path.is_file():
        return None
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        same = old["fingerprint"] == fingerprint
        if not same:
            what = f"{old['model']['folder']} of {old['date']}"
    except (OSError, ValueError, KeyError, TypeError):
        same, what = False, "something that is no result of this version"
    if not same:
        raise InputError(f"{path} holds {what}, measured otherwise; choose another out=, or overwrite=true")
    return old


def write(path: Path, results: dict[str, Any]) -> None:
    """results.json, whole or not at all. Raises InputError if it cannot be written."""
    from pipelines.lib.run import write_atomic

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(finite(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"out={path.parent}: {error.strerror}") from None


def finite(tree: Any) -> Any:
    """A tree as strict JSON: NaN and infinities become null."""
    if isinstance(tree, dict):
        return {k: finite(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(v) for v in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def figures_of(results: dict[str, Any]) -> dict[str, float]:
    """The figures under the names they have in MLflow: eval/NAME/METRIC, and its error at .../METRIC_stderr."""
    found: dict[str, float | None] = {}
    short = {"bits_per_byte": "bpb", "nats_per_token": "nll", "perplexity": "ppl"}
    for name, table in results["text"].items():
        for long, metric in short.items():
            found[f"eval/{name}/{metric}"] = table[long]
            found[f"eval/{name}/{metric}_stderr"] = table[f"{long}_stderr"]
        for baseline, value in table.get("baselines_bits_per_byte", {}).items():
            found[f"eval/{name}/bpb_{baseline}"] = value
    for task, table in results["tasks"].items():
        for metric, entry in table["metrics"].items():
            found[f"eval/{task}/{metric}"] = entry["value"]
            found[f"eval/{task}/{metric}_stderr"] = entry["stderr"]
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def track(config: EvaluateConfig, subject: Subject, results: dict[str, Any], out: Path) -> None:
    """The figures on the run's own MLflow run, at the checkpoint's step; for what is no run, on a run of their own."""
    from pipelines.lib.tracking import Tracker

    if config.track == "none":
        return
    files = [path for path in (out / "results.json", out / "samples.jsonl") if path.is_file()]
    figures = figures_of(results)
    if subject.run is not None:
        with Tracker.attach(subject.run) as tracker:
            tracker.metrics(figures, subject.step)
            for path in files:
                tracker.artifact(path, f"evaluation/{out.name}")
        return
    sets = [(name, table.get("source"), results["fingerprint"]) for name, table in results["text"].items()]
    datasets = [(name, fingerprint, str(path), "evaluation") for name, path, fingerprint in sets]
    tags = {"model": str(subject.folder), "weights": next(iter(subject.weights.values()))}
    name = f"{subject.name} {out.name}"
    with Tracker.start(out, "evaluate", plain(config), name=name, tags=tags, datasets=datasets, system_s=0) as tracker:
        tracker.metrics(figures, subject.step)
        for path in files:
            tracker.artifact(path)


def show(results: dict[str, Any]) -> None:
    """The figures as tables on stdout."""
    from rich import box
    from rich.table import Table

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
            lines.append(
                f"{name}: windows of {row['context']} tokens, stride {row['stride']}; ± is one standard error over "
                f"{row['stderr_over']}"
            )
            if row["stride"] != row["context"] and "split" in row:
                lines.append(
                    f"training validates with windows side by side; stride={row['context']} repeats its figure"
                )
        emit(table)
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
        emit(table)
    print("\n".join(lines), flush=True)


def emit(table: Any) -> None:
    from rich.console import Console

    # A log has no width of its own; 80 columns would break the table.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)


def with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "not known"
    if error is None or not math.isfinite(error):
        return f"{value:.4f}"
    digits = max(2, min(6, 2 - math.floor(math.log10(error)))) if error > 0 else 4
    return f"{value:.{digits}f} ± {error:.{digits}f}"


# ---- the conformance suite as a command ------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckConfig:
    """Run the conformance suite: everything that every model family promises, in float64.

    model: a family (all its presets and parts, small), a preset, a recipe, a run, or a Hugging Face folder of ours
    which: the checkpoint of a run: best, last or step_N
    only: checks whose name contains this
    backend: of torch.compile; inductor runs the real compiler (slow)
    full: presets and recipes at their real size instead of a small one
    """

    model: str
    which: str = "best"
    only: str | None = None
    backend: Literal["eager", "aot_eager", "inductor"] = "eager"
    full: bool = False


def subjects(config: CheckConfig) -> dict[str, Any]:
    """{name: function that makes the model} of what `model` names. Raises InputError or ConfigError."""
    import torch

    from models.check import shrunk, variants
    from models.families import Family, create, load
    from models.gpt.presets import PRESETS
    from models.lm import LM
    from models.spec import build
    from pipelines.lib.config import RECIPES, recipe
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.run import resolve

    def maker(spec: Any) -> Any:
        def make() -> LM:
            torch.manual_seed(0)
            return create(spec)

        return make

    name = config.model
    if name in Family.kinds:
        specs = {k: s for k, s in variants().items() if isinstance(s, Family.kinds[name])}
        return {k: maker(s) for k, s in specs.items()}
    if name in PRESETS:
        return {name: maker(PRESETS[name]() if config.full else shrunk(PRESETS[name]()))}
    path = storage_path(name)
    if path.is_dir():
        folder = resolve(path, config.which)
        model = open_loaded(folder, load)
        if not isinstance(model, LM):
            raise InputError(f"{folder}: a {type(model).__name__} of transformers; the suite is for our own families")
        return {str(name): lambda: open_loaded(folder, load)}
    recipes = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    if not path.is_file() and name not in recipes:
        known = [*Family.kinds, *PRESETS, *recipes]
        raise InputError(f"check {name}: no family, preset, recipe or folder of this name{near(name, known)}")
    tree = recipe(path if path.is_file() else name).get("model")
    if tree is None:
        raise InputError(f"check {name}: this recipe has no `model`; recipes of pipelines.train have one")
    spec = build(Family, tree, "model")
    if spec.vocab_size is None:
        import dataclasses

        spec = dataclasses.replace(spec, vocab_size=64)
    return {name: maker(spec if config.full else small(spec, shrunk))}


def small(spec: Any, shrunk: Any) -> Any:
    """A spec at test size; as it is, where its layers differ and so cannot be made smaller together."""
    try:
        return shrunk(spec)
    except AssertionError:
        return spec


def open_loaded(folder: Path, load: Any) -> Any:
    try:
        return load(folder)
    except Exception as error:
        raise InputError(f"{folder}: not a model that can be opened ({said(error)})") from error


def run_check(config: CheckConfig) -> int:
    """Every check on every subject, as a table. Returns 1 if a promise does not hold, else 0."""
    from rich import box
    from rich.table import Table

    from models.check import CHECKS, conformance
    from pipelines.lib.progress import Progress

    chosen = [name for name in CHECKS if config.only is None or config.only in name]
    if not chosen:
        raise InputError(f"only={config.only}: no such check{near(config.only, CHECKS)}")
    makers = subjects(config)
    began = time.perf_counter()
    outcomes: dict[str, list[Any]] = {}
    with Progress(len(makers) * len(chosen), "checks", f"check {config.model}") as progress:
        done = 0
        for name, make in makers.items():
            outcomes[name] = []
            for check in chosen:
                outcomes[name] += [r for r in conformance(make, config.backend, check) if r.name == check]
                done += 1
                progress.update(done, on=name)
    table = Table(box=box.SIMPLE)
    for column in ("model", "check", "", "figures"):
        table.add_column(column, overflow="fold")
    several = len(outcomes) > 1
    for name, results in outcomes.items():
        failed = [r for r in results if not r.ok]
        if several:
            table.add_row(name, f"{len(results) - len(failed)} of {len(results)} hold", "FAIL" if failed else "ok", "")
        for i, r in enumerate(failed if several else results):
            table.add_row("" if several or i else name, r.name, "ok" if r.ok else "FAIL", r.detail)
    emit(table)
    failures = sum(not r.ok for results in outcomes.values() for r in results)
    total = sum(len(results) for results in outcomes.values())
    print(f"{total - failures} of {total} checks hold on {len(outcomes)} model(s), {time.perf_counter() - began:.1f} s")
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["check"]:
        # A bare word is the model, even one that ends in .yaml, which elsewhere is a recipe for the command itself.
        named = [f"model={w}" if "=" not in w and not w.startswith("-") else w for w in words[1:2]]
        return command(CheckConfig, run_check, [*named, *words[2:]], positional="model")
    return command(EvaluateConfig, run, words, positional="run")


if __name__ == "__main__":
    from pipelines.evaluate import main  # so that classes have their importable names

    sys.exit(main())
