"""The whole road in a few minutes: text -> BPE -> token shards -> training -> samples -> endpoint -> a summary.

reads   source=  any text; by default the source of the running Python's standard library, so nothing is downloaded
writes  data/demo (token shards), runs/demo (the run), and the store that `make ui` opens

Safe to run again: finished shards and finished training are reused, an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import json
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.spec import build
from pipelines.lib.config import InputError, command, overlay, recipe
from pipelines.lib.jobs import storage_path
from pipelines.lib.output import shown


@dataclass(frozen=True)
class DemoConfig:
    """Run every stage once, on this machine.

    source: text to learn from: stdlib, or a file, folder or glob
    vocab_size: entries of the byte-pair vocabulary
    data: folder for the token shards
    out: run folder
    recipe: training recipe
    steps: updates (null: the recipe's)
    num_workers: training processes (null: the recipe's; 0 trains in this process, without Ray Train)
    prompt: what the endpoint is asked to continue
    port: of the endpoint (0: a free one)
    track: where metrics go beside the run folder: mlflow or none
    """

    source: str = "stdlib"
    vocab_size: int = 2048
    data: str = "data/demo"
    out: str = "runs/demo"
    recipe: str = "demo"
    steps: int | None = None
    num_workers: int | None = None
    prompt: str = "def read("
    port: int = 0
    track: str = "mlflow"


@contextlib.contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """A heading, and how long what follows it took."""
    from rich.console import Console

    Console().rule(f"[bold]{len(times) + 1}. {name}", align="left")
    began = time.monotonic()
    yield
    times[name] = time.monotonic() - began


def tokenize(config: DemoConfig) -> Path:
    from pipelines import tokenize as stage

    tree: dict[str, Any] = {
        "source": config.source,
        "tokenizer": {"kind": "bpe", "vocab_size": config.vocab_size},
        "out": config.data,
        "track": config.track,
    }
    path = Path(config.source)
    if path.is_file():
        tree |= {"split": "tail", "val_fraction": 0.1}  # one document has no other document to validate on
    elif path.is_dir():
        files = sum(p.is_file() for p in path.rglob("*"))
        if files < 100:
            tree |= {"val_documents": max(1, files // 20)}
    stage.run(build(stage.TokenizeConfig, tree))
    return Path(config.data)


def train(config: DemoConfig) -> None:
    from pipelines import train as stage
    from pipelines.lib.training import TrainConfig

    tree = overlay(recipe(config.recipe), {"data": config.data, "out": config.out, "track": config.track})
    if config.steps is not None:
        tree["steps"] = config.steps
    if config.num_workers is not None:
        tree["num_workers"] = config.num_workers
    code = stage.run(build(TrainConfig, tree))
    if code:
        raise SystemExit(code)


def ask(config: DemoConfig) -> None:
    """Start the endpoint, send one request and show the answer, stop it."""
    from pipelines.lib.cluster import ensure_ray

    ensure_ray()
    import logging

    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    from serving.app import build as application

    port = config.port or free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(application({"run": config.out}), name="demo", route_prefix="/")
        url = f"http://127.0.0.1:{port}/v1/completions"
        body = {
            "model": Path(config.out).name,
            "prompt": config.prompt,
            "max_tokens": 48,
            "temperature": 0.7,
            "seed": 1,
        }
        print(f"POST {url} {json.dumps(body)}", flush=True)
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            reply = json.load(answer)
        print(f"200 {json.dumps(reply['usage'])}\n{config.prompt}{reply['choices'][0]['text']}", flush=True)
    finally:
        serve.delete("demo")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def quality(config: DemoConfig) -> dict[str, float]:
    """Bits per byte on the validation text: ours at its best, beside what compressors make of the same text."""
    from pipelines.lib.run import Run
    from pipelines.lib.scoring import compression_baselines
    from pipelines.lib.shards import TokenFolder
    from pipelines.lib.vocab import load_tokenizer

    folder = TokenFolder.open(config.data)
    val = folder.split("val")
    assert folder.tokenizer_dir is not None
    ids = val.window(0, val.n_tokens)
    text = str(load_tokenizer(folder.tokenizer_dir).decode(ids.tolist(), skip_special_tokens=True))
    rows = [json.loads(line) for line in Run(config.out).metrics.read_text().splitlines()]
    ours = min(row["val/bpb"] for row in rows if row.get("val/bpb") is not None)
    return {"this model": ours, **compression_baselines(text, ids, len(text.encode()))}


def summary(config: DemoConfig, times: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipelines.lib.run import Run
    from pipelines.lib.shards import TokenFolder

    console = Console()
    run = Run(config.out)
    folder = TokenFolder.open(config.data)
    last = [json.loads(line) for line in run.metrics.read_text().splitlines()][-1]
    console.rule("[bold]what was made", align="left")
    tokens = {name: split.n_tokens for name, split in folder.splits.items()}
    for what, where in (
        (f"{tokens['train']:,} tokens to train on, {tokens['val']:,} to validate", config.data),
        (f"a model trained on {last['train/tokens']:,} tokens", f"{config.out}/checkpoints/{run.pointed('best')}"),
        (f"metrics of {last['step']:,} updates, samples", f"{config.out}/metrics.jsonl, {config.out}/samples.txt"),
    ):
        console.print(f"  {what + ':':52} {where}", highlight=False, soft_wrap=True)
    console.print(
        "\n  how good it is, on the validation text (fewer is better; only the model has read the other text):",
        highlight=False,
    )
    scores = Table()
    scores.add_column("by")
    scores.add_column("bits per byte", justify="right")
    for name, value in sorted(quality(config).items(), key=lambda item: item[1]):
        scores.add_row(name, f"{value:.3f}", style="bold" if name == "this model" else "")
    console.print(scores)
    console.print("seconds: " + ", ".join(f"{name} {spent:.0f}" for name, spent in times.items()))
    console.rule("[bold]next", align="left")
    tracked = "make ui                                                           # compare runs in MLflow\n"
    console.print(
        f"python -m pipelines.sample {config.out} --prompt 'class '\n"
        f"python -m pipelines.evaluate {config.out}\n"
        f"serve run serving.app:build run={config.out}              # then open http://127.0.0.1:8000\n"
        f"python -m pipelines.train demo data={config.data} out=runs/other optim.lr=2e-3\n"
        + (tracked if config.track == "mlflow" else ""),
        highlight=False,
        soft_wrap=True,
    )


def run(config: DemoConfig) -> int:
    if config.track not in ("mlflow", "none"):
        raise InputError(f"track={config.track!r}; there is mlflow, none")
    config = dc.replace(config, data=shown(storage_path(config.data)), out=shown(storage_path(config.out)))
    times: dict[str, float] = {}
    with timed(times, "text to tokens"):
        tokenize(config)
    with timed(times, "training"):
        train(config)
    with timed(times, "endpoint"):
        ask(config)
    summary(config, times)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return command(DemoConfig, run, argv)


if __name__ == "__main__":
    from pipelines.demo import main  # so that what reaches Ray's workers is pickled by reference

    sys.exit(main())
