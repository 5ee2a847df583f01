"""Training speed of the variants of a search, each for itself on one core, in turns.

    python -m benchmarks.part_speed SEARCH [rounds=5] [updates=10] [out=benchmarks/results/NAME]

A search trains its variants beside each other and beside whatever else the machine does, so its tokens/s are no
comparison. Here every variant of the finished search SEARCH makes `updates` updates (forward, backward, optimizer; the
search's own batch) per round, one variant after the other, round after round; the figure is the median of the rounds,
with the fastest and slowest. Writes NAME.md and NAME.json.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from models.families import create
from models.loss import Loss
from models.spec import build
from pipelines.lib.config import InputError, read_yaml
from pipelines.lib.training import TrainConfig


def configs(search: Path) -> dict[str, TrainConfig]:
    """Variant -> config, from the first trial of each in the ledger."""
    found: dict[str, TrainConfig] = {}
    for line in (search / "ledger.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["event"] != "start":
            continue
        name = ", ".join(f"{key.removeprefix('model.')}={value}" for key, value in row["settings"].items())
        path = search / row["run"] / "config.yaml"
        if name not in found and path.is_file():
            tree = read_yaml(path.read_text())
            tree.pop("format_version")
            found[name] = build(TrainConfig, tree)
    if not found:
        raise InputError(f"{search}/ledger.jsonl names no trial")
    return found


class Contestant:
    """One variant, with its optimizer and a batch of random tokens."""

    def __init__(self, config: TrainConfig) -> None:
        torch.manual_seed(0)
        self.config, model = config, create(config.model).train()
        self.loss, self.optimizers = Loss(model, config.z_loss, config.loss), config.optim.build(model)
        rows = config.batch_tokens // config.context
        ids = torch.randint(config.model.vocab, (rows, config.context + 1))
        size = config.micro_batch or rows
        self.batches = [(part[:, :-1], part[:, 1:].contiguous()) for part in ids.split(size)]

    def update(self) -> None:
        for ids, targets in self.batches:
            (self.loss(ids, targets)[0] / self.config.batch_tokens).backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tokens_per_second(self, updates: int) -> float:
        began = time.perf_counter()
        for _ in range(updates):
            self.update()
        return updates * self.config.batch_tokens / (time.perf_counter() - began)


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    given = dict(word.split("=", 1) for word in words if "=" in word)
    search = Path(next(word for word in words if "=" not in word))
    rounds, updates = int(given.get("rounds", 5)), int(given.get("updates", 10))
    torch.set_num_threads(1)
    contestants = {name: Contestant(config) for name, config in configs(search).items()}
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):  # the first warms up
        for name, contestant in contestants.items():
            speed = contestant.tokens_per_second(updates if i else 2)
            if i:
                speeds[name].append(speed)
        print(f"round {i} of {rounds}", flush=True)
    first, tokens = next(iter(speeds)), next(iter(contestants.values())).config.batch_tokens
    base = statistics.median(speeds[first])
    rows: list[dict[str, Any]] = [
        {"variant": n, "tokens_per_s": statistics.median(s), "least": min(s), "most": max(s)} for n, s in speeds.items()
    ]
    lines = [
        f"# Training speed of {search.name}",
        "",
        f"Command: `python -m benchmarks.part_speed SEARCH rounds={rounds} updates={updates}`, "
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, one core, torch {torch.__version__}. Updates of "
        f"{tokens:,} tokens in float32, eager; variants in turns; median of the rounds, and the slowest and fastest.",
        "",
        f"| variant | tokens/s | slowest to fastest round | share of {first} |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: -row["tokens_per_s"]):
        lines.append(
            f"| {row['variant']} | {row['tokens_per_s']:,.0f} | {row['least']:,.0f} to {row['most']:,.0f} | "
            f"{row['tokens_per_s'] / base:.2f} |"
        )
    out = Path(given.get("out", Path(__file__).parent / "results" / f"{search.name}_speed"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
