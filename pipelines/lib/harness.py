"""The lm-evaluation-harness on a model that is in memory: which tasks, run quietly with progress, figures with errors.

    found = find_tasks(["hellaswag", "my_tasks/"])          # names, YAML files, folders of YAML files
    run_tasks(model, tokenizer, found, limit=100)           # {task: {"metrics": {metric: {"value", "stderr", ...}}}}

Local YAML tasks with `dataset_path: json` need no network; their `data_files` may be relative to the YAML's folder.
Imported by pipelines/evaluate.py when there are tasks to run: lm_eval takes seconds to import.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import logging
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from pipelines.lib.config import InputError
from pipelines.lib.jobs import storage_path
from pipelines.lib.progress import Progress
from pipelines.lib.scoring import ratio_error

HASHED_BYTES = 256 << 20  # larger files beside a YAML count by their size only
RATIO_METRICS = {"word_perplexity", "byte_perplexity", "bits_per_byte"}  # per document (log-likelihood, weight)


class Tasks(NamedTuple):
    """names: as asked for.  manager: lm-eval's index of them.  fingerprint: sha256 over the local YAML folders."""

    names: tuple[str, ...]
    manager: TaskManager
    fingerprint: str | None


def find_tasks(words: Sequence[str], include: Sequence[Path] = ()) -> Tasks:
    """The tasks that words name: lm-eval's tasks, groups and tags by name, YAML files, and folders with all they hold.

    include: more folders whose YAML tasks may be named. Raises InputError for an unknown one, with the nearest name.
    """
    folders = [Path(p) for p in include]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"include_path={folder}: no such folder")
    names: list[str] = []
    for word in words:
        path = Path(word).expanduser()
        if not path.exists() and ("/" in word or path.suffix in (".yaml", ".yml")):
            path = storage_path(word)  # in a job: not in the uploaded folder, so beside the data
        if "/" in word and not path.exists():
            raise InputError(f"tasks={word}: no such file or folder")
        if path.is_dir() and ("/" in word or any(path.glob("**/*.yaml"))):  # else a task whose name a folder has too
            inside = TaskManager(include_path=str(path), include_defaults=False)
            if not inside.all_subtasks:
                raise InputError(f"tasks={word}: no task YAML (with `task:` and `dataset_path:`) in this folder")
            folders.append(path)
            names += inside.all_subtasks
        elif path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise InputError(f"tasks={word}: no such file")
            inside = TaskManager(include_path=str(path.parent), include_defaults=False)
            here = [n for n, e in inside.task_index.items() if e.yaml_path and e.yaml_path.samefile(path)]
            if not here:
                raise InputError(f"tasks={word}: no task; a mapping with `task:` and `dataset_path:` is needed")
            folders.append(path.parent)
            names += here
        else:
            names.append(word)
    paths = [str(p) for p in dict.fromkeys(folders)]
    manager = TaskManager(include_path=paths, include_defaults=False) if paths else None
    if manager is None or any(name not in manager.task_index for name in names):
        print("reading lm-eval's own task list (about 10 s)", flush=True)
        manager = TaskManager(include_path=paths or None)
    for name in names:
        if name not in manager.task_index:
            raise InputError(f"tasks: lm-eval knows no task {name!r}{_nearest(name, manager.all_tasks)}")
    return Tasks(tuple(dict.fromkeys(names)), manager, _fingerprint(folders) if folders else None)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 3, 0.5)
    meant = f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ";"
    return f"{meant} `lm-eval ls tasks` lists them all, and a folder of task YAMLs may stand in its place"


def _fingerprint(folders: Iterable[Path]) -> str:
    """sha256 over names and contents of all files in the folders."""
    total = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            size = path.stat().st_size
            content = str(size) if size > HASHED_BYTES else hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(folder)} {content}\n".encode())
    return total.hexdigest()


def load_tasks(found: Tasks) -> list[Any]:
    """lm-eval's task objects, their data read (and downloaded, where they are not local). Raises InputError."""
    built: list[Any] = []
    for name in found.names:
        try:
            spec: Any = name
            if kwargs := _local_data(found.manager, name):
                spec = {"group": f"local {name}", "task": [{"task": name, "dataset_kwargs": kwargs}]}
            loaded = found.manager.load([spec])
            built += (
                loaded["tasks"].values() if spec is not name else (loaded.get("groups") or loaded["tasks"]).values()
            )
        except Exception as error:  # lm-eval, datasets and the network raise what they like
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"task {name}: it cannot be loaded ({type(error).__name__}: {said}); is its data there, or the network "
                "for lm-eval's own tasks?"
            ) from error
    return built


def _local_data(manager: TaskManager, name: str) -> dict[str, Any] | None:
    """dataset_kwargs with data_files beside the task's YAML made absolute; None if there is nothing to change."""
    entry = manager.task_index.get(name)
    if entry is None or entry.yaml_path is None or not entry.cfg:
        return None
    kwargs = entry.cfg.get("dataset_kwargs") or {}
    folder = entry.yaml_path.absolute().parent

    def beside(files: Any) -> Any:
        if isinstance(files, Mapping):
            return {split: beside(part) for split, part in files.items()}
        if isinstance(files, (list, tuple)):
            return [beside(part) for part in files]
        return str(folder / files) if not Path(files).exists() and (folder / files).exists() else files

    files = kwargs.get("data_files")
    moved = None if files is None else beside(files)
    return None if moved == files else {**kwargs, "data_files": moved}


class Harness(HFLM):
    """HFLM that says when it cuts a prompt, needs no end-of-text token where none is used, and reports progress."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int, batch_size: int) -> None:
        self.cut = 0  # requests that lost their beginning
        self.rolling: Progress | None = None
        self.n_ids = model.get_input_embeddings().weight.shape[0]
        if tokenizer.pad_token is None and tokenizer.eos_token is None and tokenizer.unk_token is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # else a new id, beyond the model's, is added
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size)

    @property
    def prefix_token_id(self) -> int:
        token = super().prefix_token_id
        if token is None:
            raise InputError(
                "this task scores text from its first token on, and the model's tokenizer has no beginning- or "
                "end-of-text token to start from"
            )
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:  # type: ignore[override]
        if self.tokenizer.bos_token_id is None and self.tokenizer.eos_token_id is None:
            add_special_tokens = False  # so that lm-eval does not look for the prefix that is not there
        try:
            ids = super().tok_encode(string, add_special_tokens, **kwargs)
            if ids and max(ids) >= self.n_ids:
                raise InputError(
                    f"the tokenizer gives id {max(ids)}, but the model has {self.n_ids}; it is not its own"
                )
            return ids
        except InputError:
            raise
        except Exception as error:  # a bare Exception, by the tokenizers library's design
            raise InputError(f"the tokenizer cannot encode {string[:40]!r}: {error}") from None

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            if not continuation:
                raise InputError("a task has an answer without tokens (an empty choice or target), which has no score")
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a task has an answer of {len(continuation):,} tokens, longer than the model's context of "
                    f"{self.max_length:,}; leave that task out"
                )
            self.cut += len(context) + len(continuation) > self.max_length + 1
        answers = super()._loglikelihood_tokens(requests, disable_tqdm or override_bs is not None, override_bs)
        if self.rolling is not None:
            self.rolling.update(self.rolling.done + len(requests))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        total = sum(-(-n // self.max_length) for n in lengths)  # lm-eval's windows stand side by side
        with Progress(total, "windows", "texts") as self.rolling:
            found = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self.rolling = None
        return found

    def tok_batch_encode(self, strings: list[str], **kwargs: Any) -> Any:  # type: ignore[override]
        if limit := kwargs.get("left_truncate_len"):
            self.cut += sum(len(self.tok_encode(s)) > limit for s in strings)
        return super().tok_batch_encode(strings, **kwargs)


class Bar:
    """What lm-eval asks of tqdm, shown by our Progress: a bar on a terminal, plain lines in a log."""

    def __init__(self, items: Iterable[Any] | None = None, *, total: int | None = None, **options: Any) -> None:
        self.items = items
        total = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]
        off = options.get("disable") or not total
        words = {"Running loglikelihood requests": "answers", "Running generate_until requests": "generations"}
        said = words.get(options.get("desc", ""), "preparing")
        self.progress = None if off else Progress(total, "requests", said)
        if self.progress and said != "preparing":
            self.progress.__enter__()
        self.done = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self.items or ():
            yield item
            self.update(1)

    def update(self, n: int = 1) -> None:
        self.done += n
        if self.progress:
            self.progress.update(self.done)

    def close(self) -> None:
        if self.progress:
            self.progress.__exit__(None)


def resample(f: Callable[[Sequence[Any]], float], xs: Sequence[Any], draws: int) -> list[float]:
    """f of `draws` samples of xs with replacement, the same ones as lm-eval's own; progress if it takes long."""
    progress, found = Progress(draws, "draws", f"error of {getattr(f, '__name__', 'a metric')}"), []
    for i in range(draws):
        if i % 1000 == 0:
            chance = random.Random(i // 1000)
        found.append(f(chance.choices(xs, k=len(xs))))
        progress.update(i + 1)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and datasets without their bars and chatter, and without forks and look-ups that cost seconds."""
    import datasets

    stand_ins: dict[str, dict[str, Any]] = {
        "models.huggingface": {"tqdm": Bar},
        "api.task": {"tqdm": Bar},
        "api.model": {"tqdm": Bar},
        "api.metrics": {"_bootstrap_internal_no_mp": resample},
        # It asks git for the commit of the working directory, pip for every package and lscpu for the processor.
        "evaluator": {"get_git_commit_hash": lambda: None, "add_env_info": lambda results: None},
    }
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    with contextlib.ExitStack() as undo:
        undo.enter_context(mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}))
        for name, values in stand_ins.items():
            module = importlib.import_module(f"lm_eval.{name}")
            there = {key: value for key, value in values.items() if hasattr(module, key)}
            undo.enter_context(mock.patch.multiple(module, **there))
        undo.callback(logger.setLevel, level)
        logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        if not bars:
            undo.callback(datasets.enable_progress_bars)
        yield


def run_tasks(
    model: Any,
    tokenizer: Any,
    found: Tasks,
    *,
    max_length: int,
    batch_size: int,
    limit: float | None = None,
    num_fewshot: int | None = None,
    bootstrap: int = 1000,
    seed: int = 1234,
) -> tuple[dict[str, Any], dict[str, list[Any]], int]:
    """Run tasks. Returns ({task or group: figures}, {task: a record per document and filter}, prompts that were cut).

    max_length: the model's context; longer prompts lose their beginning.  limit: documents per task,
    or a share below 1.  num_fewshot: examples before each question, None: as each task says.  bootstrap: draws behind
    the errors of metrics that are no means.  seed: of the choice of examples.
    Raises InputError for a task that cannot be loaded or run.
    """
    with quiet():
        harness = Harness(model, tokenizer, max_length, batch_size)
        tasks = load_tasks(found)
        results: Any = simple_evaluate(
            model=harness,
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=int(limit) if limit is not None and limit >= 1 else limit,
            bootstrap_iters=bootstrap,
            task_manager=found.manager,
            fewshot_random_seed=seed,
            log_samples=True,
        )
    samples = results.get("samples") or {}
    tables = {name: _figures(name, raw, results, samples.get(name, [])) for name, raw in results["results"].items()}
    for name, raw in (results.get("groups") or {}).items():
        tables[name] = _figures(name, raw, results, [])
    return tables, samples, harness.cut


def _figures(name: str, raw: Mapping[str, Any], results: Mapping[str, Any], samples: Sequence[Any]) -> dict[str, Any]:
    """One task of lm-eval's results: {"metrics": {metric or metric/filter: {value, stderr, higher_is_better}}, ...}."""
    better = results.get("higher_is_better", {}).get(name, {})
    metrics: dict[str, Any] = {}
    for key, value in raw.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
            continue
        error = raw.get(f"{metric}_stderr,{filtered}")
        stderr = float(error) if isinstance(error, int | float | np.number) else None
        if stderr is None and metric in RATIO_METRICS:  # lm-eval gives none for these
            stderr = _ratio_stderr(metric, float(value), [s for s in samples if s["filter"] == filtered])
        metrics[metric if filtered == "none" else f"{metric}/{filtered}"] = {
            "value": float(value),
            "stderr": stderr,
            "higher_is_better": better.get(metric),
        }
    counts = results.get("n-samples", {}).get(name, {})
    return {
        "metrics": metrics,
        "documents": counts.get("effective") or raw.get("sample_len"),
        "documents_in_all": counts.get("original"),
        "num_fewshot": results.get("n-shot", {}).get(name),
        "version": results.get("versions", {}).get(name),
        "task_hash": results.get("task_hashes", {}).get(name),
    }


def _ratio_stderr(metric: str, value: float, samples: Sequence[Any]) -> float | None:
    """The error of exp(-sum(ll) / sum(weight)), or of its base-2 logarithm, over documents."""
    pairs = np.array([s[metric] for s in samples], np.float64)
    if len(pairs) < 2:
        return None
    error = ratio_error(-pairs[:, 0], pairs[:, 1])
    if error is None:
        return None
    return error / math.log(2) if metric == "bits_per_byte" else value * error
