"""The files that continuations go to: JSON, text, and what shows the probabilities behind them."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.spec import plain
from pipelines.lib.config import InputError, as_word
from pipelines.lib.inspection.draws import Continuation, continuation
from pipelines.lib.jobs import storage_path
from pipelines.lib.output import shown

if TYPE_CHECKING:
    from pipelines.sample import SampleConfig
    from serving.engine import Engine, Request


@dataclass(eq=False)
class Job:
    """One continuation on its way. sample: its number among those of the same prompt and setting."""

    request: Request
    prompt: str
    sample: int


def continuation_of(engine: Engine, job: Job) -> Continuation:
    return continuation(engine, job.request, job.prompt, job.sample)


def write_files(config: SampleConfig, seed: int, folder: Path, engine: Engine, jobs: Sequence[Job]) -> None:
    """Every file that was asked for. Raises InputError if one cannot be written."""
    if config.output is not None:
        path = storage_path(config.output)
        save(path, json.dumps(results(config, seed, folder, jobs), ensure_ascii=False, indent=1) + "\n", "output")
    if config.sample_file is not None:
        add_samples(storage_path(config.sample_file), seed, folder, jobs)
    if config.page is None and config.picture is None and config.charts is None:
        return
    from pipelines.lib.inspection.colour import modes_of
    from pipelines.lib.inspection.pictures import charts, coloured_picture

    looked = [continuation_of(engine, job) for job in jobs if job.request.finish_reason != "error"]
    k = config.candidates
    if config.picture is not None:
        modes = modes_of(config.colour) or ("probability",)
        coloured_picture(looked, modes, k, storage_path(config.picture))
        print(f"wrote {config.picture}", file=sys.stderr)
    if config.charts is not None:
        made = charts(looked, config.chart_kinds, k, storage_path(config.charts))
        print(f"wrote {len(made)} charts to {config.charts}", file=sys.stderr)
    if config.page is not None:
        from pipelines.lib.inspection.draws_page import draws_page

        page = draws_page(looked, config.colour, k, repeated(config, seed), shown(folder))
        save(storage_path(config.page), page, "page")


def save(path: Path, text: str, setting: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{setting}={path}: {error.strerror}") from None
    print(f"wrote {path}", file=sys.stderr)


def repeated(config: SampleConfig, seed: int) -> str:
    """The command that makes the same samples again."""
    given = {n: getattr(config, n) for n, f in config.__dataclass_fields__.items() if getattr(config, n) != f.default}
    words = []
    for name, value in {**given, "seed": seed}.items():
        texts = value if name in ("prompt", "stop") else [as_word(plain(value))]
        words += [text if name == "run" else f"{name}={text}" for text in texts]
    return shlex.join(["python", "-m", "pipelines.sample", *words])


def results(config: SampleConfig, seed: int, folder: Path, jobs: Sequence[Job]) -> dict[str, Any]:
    """All settings and continuations as one JSON object; with what each token was drawn from, if that was looked at."""
    return {
        "checkpoint": str(folder),
        "settings": {**plain(config), "seed": seed},
        "samples": [
            {
                "prompt": job.prompt,
                "sample": job.sample,
                "temperature": r.params.temperature,
                "top_k": r.params.top_k,
                "text": r.text,
                "finish_reason": r.finish_reason,
                "prompt_tokens": len(r.prompt),
                "tokens": r.tokens,
                **({"draws": [draw._asdict() for draw in r.draws]} if r.draws else {}),
            }
            for job in jobs
            for r in (job.request,)
        ],
    }


def add_samples(path: Path, seed: int, folder: Path, jobs: Sequence[Job]) -> None:
    """Adds every continuation to a text file, below a line that says what made it."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    pieces = []
    for job in jobs:
        p = job.request.params
        how = f"temperature {p.temperature:g}, top_k {p.top_k}, seed {seed}, sample {job.sample + 1}"
        pieces.append(f"--- {now} | {folder} | {how}\n{job.prompt}{job.request.text}\n\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", errors="replace") as f:
            f.write("".join(pieces))
    except OSError as error:
        raise InputError(f"sample_file={path}: {error.strerror}") from None
    print(f"added {len(jobs)} samples to {path}", file=sys.stderr)
