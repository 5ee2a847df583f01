"""How good the estimates are: what --estimate says before a run, and RUN/estimate.json says in it, against its cost.

    python -m benchmarks.estimate [seconds=25] [clock=wall] [out=benchmarks/results]

Rows: the same random tokens through models from a few thousand to ten million parameters, in float32 and bfloat16, with
one and several micro-batches per update, with frequent validation and with recomputed activations. Each is estimated by
a probe, and then trained in this process for as many updates as the probe says fit into `seconds`. A ratio above 1 says
that the estimate was too high. There is no public peer; the floor of the error is how much the same run's time
varies, which the last row shows: the first row's run made again. clock=cpu times probe and run in CPU seconds of this
process, for a machine that others use at the same time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from models.spec import build
from pipelines.lib import loop
from pipelines.lib import probe as probing
from pipelines.lib.config import overlay
from pipelines.lib.estimate import GIB, estimate
from pipelines.lib.shards import write_manifest, write_shard
from pipelines.lib.training import TrainConfig
from pipelines.train import resolve_config

KEYS = {"seconds": "time", "memory_gb": "memory", "disk_gb": "disk"}


def rows() -> dict[str, dict[str, Any]]:
    """Name -> changes of the common config."""

    def shape(d: int, layers: int, T: int, vocab: int, micro: int, micros: int, **more: Any) -> dict[str, Any]:
        heads = max(1, d // 32)
        model: dict[str, Any] = {"kind": "gpt", "d_model": d, "n_layers": layers, "seq_len": T, "vocab_size": vocab}
        model |= {"attention": {"kind": "causal", "n_heads": heads}}
        return {"model": model, "micro_batch": micro, "batch_tokens": micro * micros * T, **more}

    return {
        "tiny": shape(32, 2, 32, 128, 12, 1),
        "characters": shape(128, 4, 64, 128, 12, 1),
        "characters, bf16": shape(128, 4, 64, 128, 12, 1, precision="bf16"),
        "4 micro-batches": shape(128, 4, 128, 1024, 8, 4),
        "much validation": shape(128, 4, 64, 128, 12, 1, eval_every=10, eval_tokens=None),
        "wide vocabulary": shape(192, 4, 128, 8192, 8, 1),
        "deep": shape(192, 12, 128, 2048, 8, 1),
        "deep, recomputed": shape(192, 12, 128, 2048, 8, 1, activation_checkpointing=True),
        "ten million": shape(320, 7, 256, 2048, 4, 1),
    }


def tokens(folder: Path) -> Path:
    """Random ids below 128: what they are changes neither time nor memory."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    splits = {}
    for split, n in (("train", 1 << 20), ("val", 1 << 14)):
        ids = draw.integers(0, 128, n).astype(np.uint16)
        splits[split] = {"shards": [write_shard(folder / f"{split}-00000.arrow", ids, np.array([0, n]), n)]}
    tokenizer = {"sha256": "none", "vocab_size": 128, "kind": "bytes"}
    write_manifest(
        folder, {"dtype": "uint16", "eot_id": 0, "tokenizer": tokenizer, "source": {"kind": "random"}, "splits": splits}
    )
    return folder


def measure(data: Path, out: Path, changes: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One row: what the probe said, what the run's first updates said, and what it took."""
    common = {
        "data": str(data), "out": str(out), "num_workers": 0, "track": "none", "device": "cpu", "threads": 1,
        "sample_prompts": [], "log_every": 10, "eval_every": 100, "eval_tokens": 4096, "steps": 10**6,
        "optim": {"kind": "adamw", "lr": 1e-3},
    }  # fmt: skip
    config, batches = resolve_config(build(TrainConfig, overlay(common, changes)))
    began = time.perf_counter()
    found = probing.probe(config, batches.folders)
    probe_s = time.perf_counter() - began
    tree = overlay(common, {**changes, "steps": max(10, int(seconds * found.pace.tokens_per_s / config.batch_tokens))})
    config, batches = resolve_config(build(TrainConfig, tree))
    said = estimate(config, batches.folders, found.pace, found.gaps).record()
    blind = estimate(config, batches.folders).record()  # memory as counted, without a probe
    with contextlib.redirect_stdout(io.StringIO()):
        loop.train({"config": tree, "run": str(out)})
    actual = json.loads((out / "cost.json").read_text())
    actual["disk_gb"] = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / GIB
    early = json.loads((out / "estimate.json").read_text())
    return {"steps": config.steps, "probe_s": probe_s, "said": said, "blind": blind, "early": early, "actual": actual}


def main(argv: list[str] | None = None) -> None:
    options = dict(word.split("=", 1) for word in (sys.argv[1:] if argv is None else argv))
    seconds = float(options.get("seconds", 25))
    clock = options.get("clock", "wall")
    if clock == "cpu":
        for module in (probing, loop, sys.modules[__name__]):
            vars(module)["time"] = SimpleNamespace(
                perf_counter=time.process_time, monotonic=time.process_time, strftime=time.strftime
            )
    results = Path(options.get("out", Path(__file__).parent / "results"))
    work = Path(tempfile.mkdtemp(prefix="novella-bench-"))
    found: dict[str, dict[str, Any]] = {}
    try:
        data = tokens(work / "tokens")
        chosen = rows()
        chosen["tiny, again"] = chosen["tiny"]
        for i, (name, changes) in enumerate(chosen.items()):
            found[name] = measure(data, work / f"run-{i}", changes, seconds)
            print(line(name, found[name]), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(found, seconds, clock, results)


def line(name: str, row: dict[str, Any]) -> str:
    actual, cells = row["actual"], []
    for source, keys in (("said", KEYS), ("early", ("seconds", "memory_gb"))):
        cells += [f"{row[source][key] / actual[key]:.2f}" for key in keys]
    figures = [f"{actual['seconds']:.1f}", f"{1024 * actual['memory_gb']:.0f}", f"{1024 * actual['disk_gb']:.1f}"]
    cells = [name, f"{actual['parameters']:,}", str(row["steps"]), *figures, *cells, f"{row['probe_s']:.1f}"]
    return f"| {' | '.join(cells)} |"


def report(found: dict[str, dict[str, Any]], seconds: float, clock: str, results: Path) -> None:
    load = os.getloadavg()[1] if hasattr(os, "getloadavg") else float("nan")
    lines = [
        "# Estimates against what runs took",
        "",
        f"Command: `python -m benchmarks.estimate seconds={seconds:g} clock={clock}`. {time.strftime('%Y-%m-%d')}, "
        f"{platform.machine()}, 1 thread, torch {torch.__version__}, load average {load:.1f} at the end.",
        "Ratios are estimate over actual: by a probe before the run (`--estimate`), and by its first updates "
        "(`estimate.json`). Memory is what the process takes above its start, disk what the run leaves.",
        "",
        "| row | parameters | updates | time, s | memory, MiB | disk, MiB | probe: time | memory | disk | "
        "first updates: time | memory | probe took, s |",
        "| --- " + "| ---: " * 11 + "|",
        *(line(name, row) for name, row in found.items()),
        "",
    ]
    for source, name in (("said", "by a probe"), ("early", "by the first updates")):
        for key in ("seconds", "memory_gb"):
            ratios = [row[source][key] / row["actual"][key] for row in found.values()]
            within = sum(0.8 <= r <= 1.25 for r in ratios)
            lines.append(
                f"- {KEYS[key]} {name}: median ratio {statistics.median(ratios):.2f}, from {min(ratios):.2f} to "
                f"{max(ratios):.2f}; within 25 % in {within} of {len(ratios)}"
            )
    results.mkdir(parents=True, exist_ok=True)
    (results / "estimate.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
