"""One training update of a preset at its full size: time, and peak memory beside what was estimated before.

    python -m benchmarks.full_size hypersphere_124m [more recipes] [precision=fp32,bf16] [rows=1] [threads=2]

Each row is a fresh process that trains a recipe for three updates of `rows` rows at the recipe's context, on random
tokens: the last update's seconds, the process's peak memory, and the estimate that needs no run. There is no public
peer and no floor beside the estimate; what the row shows is that the size runs at all on the machine at hand.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.estimate import tokens
from models.gpt.presets import PRESETS
from models.spec import build
from pipelines.lib import loop
from pipelines.lib.config import overlay, recipe
from pipelines.lib.counting import count
from pipelines.lib.estimate import estimate
from pipelines.lib.training import LENGTHS, TrainConfig
from pipelines.train import resolve_config

UPDATES = 3


def row(name: str, precision: str, rows: int, threads: int, data: str, out: str) -> dict[str, Any]:
    """Trains in this process and returns the row's figures."""
    tree = {key: value for key, value in recipe(name).items() if key not in LENGTHS}
    context = tree["model"]["seq_len"]
    tree = overlay(
        tree,
        {
            "data": data, "out": out, "num_workers": 0, "track": "none", "device": "cpu", "threads": threads,
            "compile": False, "precision": precision, "micro_batch": rows, "batch_tokens": rows * context,
            "steps": UPDATES, "sample_prompts": [], "log_every": 1, "eval_every": 10**6, "eval_tokens": context,
            "save_every": 10**6,
        },
    )  # fmt: skip
    config, batches = resolve_config(build(TrainConfig, tree))
    said = estimate(config, batches.folders).record()
    with contextlib.redirect_stdout(io.StringIO()):
        loop.train({"config": tree, "run": out})
    lines = [json.loads(text) for text in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    rate = [line["train/tokens_per_s"] for line in lines if "train/tokens_per_s" in line][-1]
    loss = [line["train/loss"] for line in lines if "train/loss" in line]
    actual = json.loads((Path(out) / "cost.json").read_text())
    return {
        "recipe": name, "precision": precision, "rows": rows, "context": context,
        "parameters": config.model.n_parameters(), "counted": count(config).parameters,
        "seconds": rows * context / rate, "losses": loss,
        "memory_gb": actual["memory_gb"], "estimated_gb": said["memory_gb"],
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    cells = [
        found["recipe"], found["precision"], f"{found['parameters']:,}", f"{found['counted']:,}",
        f"{found['rows']} x {found['context']:,}", f"{found['seconds']:.1f}", f"{found['memory_gb']:.2f}",
        f"{found['estimated_gb']:.2f}", " ".join(f"{loss:.3f}" for loss in found["losses"]),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    options = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word]
    rows, threads = int(options.get("rows", 1)), int(options.get("threads", 2))
    results = Path(options.get("out", Path(__file__).parent / "results"))
    shown = " ".join(word for word in words if not word.startswith("out="))
    lines = [
        "# One training update at full size",
        "",
        f"Command: `python -m benchmarks.full_size {shown}`. {time.strftime('%Y-%m-%d')}, "
        f"{platform.machine()}, {threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} at "
        "the start. Random tokens below 128, so the loss falls from ln 50257 = 10.8 as soon as the model notices. "
        "Memory is what the process takes above its start, in GiB; `elements` are counted on the model, `formula` "
        "comes from the config alone.",
        "",
        "| recipe | precision | parameters, formula | elements | tokens | s per update | peak memory | estimated | "
        "losses of the updates |",
        "| --- | --- " + "| ---: " * 6 + "| --- |",
    ]
    work = Path(tempfile.mkdtemp(prefix="novella-bench-"))
    try:
        data = str(tokens(work / "tokens"))
        for i, (name, precision) in enumerate(
            (n, p) for n in names for p in options.get("precision", "fp32,bf16").split(",")
        ):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                found = fresh.submit(row, name, precision, rows, threads, data, str(work / f"run-{i}")).result()
            lines.append(line(found))
            print(lines[-1], flush=True)
            shutil.rmtree(work / f"run-{i}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    lines += ["", "| preset | parameters |", "| --- | ---: |"]
    lines += [
        f"| {name} | {make().n_parameters():,} |" for name, make in PRESETS.items() if name.startswith(tuple(names))
    ]
    results.mkdir(parents=True, exist_ok=True)
    (results / "full_size.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
