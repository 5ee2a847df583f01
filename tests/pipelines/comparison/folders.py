"""Run folders and searches written by hand, so that what a comparison must say of them is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from models.spec import build, plain
from pipelines.lib.config import override
from pipelines.lib.run import Run
from pipelines.lib.training import TrainConfig
from tests.pipelines.tiny import tiny_config

FINGERPRINT = "ab" * 32


def make_run(
    folder: Path,
    loss: float,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    *,
    steps: int = 20,
    upto: int | None = None,
    data: str | None = FINGERPRINT,
    end: str | None = None,
    cost: dict[str, float] | None = None,
    samples: str = "",
    tags: dict[str, str] | None = None,
) -> Path:
    """A run whose validation loss falls to `loss` at its last step (upto: where it stopped before its length)."""
    tree = tiny_config(Path("tokens"), folder, steps=steps, seed=seed)
    for key, value in (settings or {}).items():
        tree = override(tree, key, value)
    config = plain(build(TrainConfig, tree))
    Run(folder).write_config(config)
    last = upto or steps
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, last + 1):
            row: dict[str, Any] = {
                "step": step,
                "train/nll": loss + 1 / step,
                "train/tokens": step * config["batch_tokens"],
                "train/elapsed_s": 0.5 * step,
                "train/step_time_s": 0.25,
                "train/lr": 0.001,
                "system/memory_gb": 0.5,
            }
            if step % 5 == 0 or step == last:
                row["val/nll"] = loss if step == last else loss + 1 - step / last
                row["val/bpb"] = row["val/nll"] / math.log(2)
            file.write(json.dumps(row) + "\n")
    if data is not None:
        start = {"do": "start", "datasets": [["tokens", data, "tokens", "training"]], "tags": tags or {}}
        notes = [start, *([{"do": "end", "status": end}] if end else [])]
        (folder / "tracking.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    if cost is not None:
        (folder / "cost.json").write_text(json.dumps(cost))
    if samples:
        (folder / "samples.txt").write_text(samples)
    return folder


def make_sweep(folder: Path, table: dict[Any, list[float]], key: str = "model.norm") -> Path:
    """A folder of runs: for each value of one setting a loss per seed 0, 1, ..."""
    for value, losses in table.items():
        for seed, loss in enumerate(losses):
            make_run(folder / f"{value}-s{seed}", loss, seed, {key: value})
    return folder


def make_search(folder: Path, objective: dict[str, str] | None = None) -> Path:
    """A search of five trials: two done, one that the rule cut short, one failed, one refused."""
    from pipelines.lib.config import write_yaml
    from pipelines.lib.search.ledger import Ledger

    folder.mkdir(parents=True)
    config = {"rule": {"kind": "random"}, **({"objective": objective} if objective else {})}
    (folder / "config.yaml").write_text(write_yaml(config))
    ledger = Ledger(folder)
    ledger.session()
    trials = [
        ("done", {"optim.lr": 0.001}, 1.0, 2.0, ""),
        ("done", {"optim.lr": 0.002}, 1.0, 1.9, ""),
        ("done", {"optim.lr": 0.004}, 0.25, 2.5, ""),
        ("failed", {"optim.lr": 0.008}, 1.0, 3.0, "its worker was lost three times"),
        ("refused", {"model.d_model": 33}, 1.0, math.nan, "d_model=33 is not divisible by n_heads=2"),
    ]
    for number, (status, settings, share, loss, error) in enumerate(trials):
        run = None if status == "refused" else f"trials/t{number}-s0"
        ledger.write(
            "start", number=number, id=f"t{number}", seed=0, share=share, settings=settings, keep=False, source=None,
            why="", run=run, command="", attempt=1,
        )  # fmt: skip
        if run:
            upto = {"done": round(20 * share), "failed": 7}[status]
            make_run(folder / run, loss, 0, settings, upto=upto, data=None)
        metrics = {"val/bpb": loss / math.log(2), "val/nll": loss} if status == "done" else {}
        ledger.write("end", number=number, status=status, metrics=metrics, cost={}, error=error)
    ledger.write("done", reason="all drawn")
    return folder
