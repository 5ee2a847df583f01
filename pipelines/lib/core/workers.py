"""CORE's items in blocks, asked here or by Ray tasks. A block is the same whoever asks it, so its figures are too."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.lib.config import InputError
from pipelines.lib.core.prompts import Encode
from pipelines.lib.core.scorer import Judged, judge
from pipelines.lib.core.tasks import Task

BLOCK_ITEMS = 128  # sorted by length and batched together; a task of Ray's


@dataclass(frozen=True)
class Job:
    """What a worker must know. folder: of the model."""

    folder: Path
    device: str
    dtype: str
    threads: int | None
    context: int
    batch_tokens: int | None


class Block(NamedTuple):
    """Items first..last-1 of a task."""

    task: Task
    first: int
    last: int


class Answer(NamedTuple):
    """A block's items, judged, and the seconds that it took one worker. error: what is wrong with the input."""

    block: Block
    judged: Judged | None
    seconds: float
    error: str | None = None


def blocks_of(task: Task, n_items: int) -> list[Block]:
    return [Block(task, first, min(first + BLOCK_ITEMS, n_items)) for first in range(0, n_items, BLOCK_ITEMS)]


@functools.lru_cache(maxsize=1)
def open_reader(folder: Path) -> tuple[Encode, int | None]:
    """The tokenizer of a model folder: (text -> ids, the id that stands before every prompt).

    That is its beginning-of-text token, else its end-of-text token, else the first added one, else none.
    """
    from pipelines.lib.texts import encoder_of, open_tokenizer

    tokenizer = open_tokenizer(folder)
    added = sorted(tokenizer.added_tokens_decoder)
    prefix = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id, *added) if t is not None), None)
    return encoder_of(tokenizer, folder), prefix


@functools.lru_cache(maxsize=1)
def open_worker(job: Job) -> Any:
    """The model on this worker's device; a process that asks several blocks opens it once."""
    import torch

    from pipelines.lib.model_folder import open_folder
    from pipelines.lib.world import choose_device

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    return open_folder(job.folder, job.dtype).to(choose_device(job.device))


def ask(job: Job, block: Block, report: Callable[[float], None] = lambda share: None) -> Answer:
    """One block, in this process. Bad input comes back as a word, which survives the way from another process."""
    import torch

    began = time.perf_counter()
    try:
        model, (encode, prefix) = open_worker(job), open_reader(job.folder)
        indices = range(block.first, block.last)
        judged = judge(model, encode, prefix, block.task, indices, job.context, job.batch_tokens, report)
    except InputError as error:
        return Answer(block, None, 0.0, str(error))
    except torch.OutOfMemoryError:
        said = f"{block.task.label}: a batch does not fit into the memory of {job.device}; give a smaller batch_tokens="
        return Answer(block, None, 0.0, said)
    return Answer(block, judged, time.perf_counter() - began)


def in_process(job: Job, blocks: Sequence[Block], report: Callable[[float], None]) -> Iterator[Answer]:
    """The blocks one after another. report: gets the items that are done of the present block."""
    for block in blocks:
        yield ask(job, block, functools.partial(_of, block, report))


def _of(block: Block, report: Callable[[float], None], share: float) -> None:
    report(share * (block.last - block.first))


def on_ray(job: Job, blocks: Sequence[Block], workers: int) -> Iterator[Answer]:
    """The blocks as Ray tasks, `workers` at a time, in the order in which they end.

    A task takes one CPU, and one GPU where the model is to run on one. A worker that dies is replaced, and its block
    asked again.
    """
    from pipelines.lib.cluster import ensure_ray

    ensure_ray(num_cpus=max(2, workers) if job.device == "cpu" else None)
    import ray

    there = ray.cluster_resources()
    wants_gpu = job.device.startswith("cuda") or (job.device == "auto" and there.get("GPU", 0) > 0)
    for name in ("CPU", *(["GPU"] if wants_gpu else [])):
        if workers > there.get(name, 0):
            raise InputError(f"workers={workers} need {workers} {name}s, the cluster has {there.get(name, 0):g}")
    task = ray.remote(max_retries=2, num_cpus=1, num_gpus=int(wants_gpu))(ask)
    shared = ray.put(job)
    waiting = list(reversed(blocks))
    running: list[Any] = []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(task.remote(shared, waiting.pop()))
        done, running = ray.wait(running, num_returns=1)
        yield ray.get(done[0])
