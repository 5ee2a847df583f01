"""Position schemes beyond their trained context: the validation loss at 1 to 8 times the length they were trained on.

    python -m benchmarks.extrapolation data=TOKENS work=FOLDER [positions=rotary,fire,learned] [seeds=3]
        [tokens=2097152] [context=64] [width=96] [parallel=2] [title="whose text"] [out=benchmarks/results]

Each scheme is one decoder (peri placement, unit queries and keys with a learned scale, as in the laboratory's table)
trained on TOKENS with equal seeds; runs that are in FOLDER already are not trained again. A length means something only
for a model that uses its context, so that is measured first: the loss of the same last tokens of a trained window with
all tokens before them visible and with the nearest eighth alone. Then windows of 1, 2, 4 and 8 times the context, all
over the same part of the validation tokens: the mean over the window, and over its last `context` tokens.
A learned table has no rows there; they are its own again (`cycle`) or small draws (`small`).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.families import load
from models.parts.position import stretched
from models.spec import build, plain
from pipelines.lib import loop
from pipelines.lib.run import resolve
from pipelines.lib.shards import TokenFolder
from pipelines.lib.statistics import interval
from pipelines.lib.training import TrainConfig
from pipelines.train import resolve_config

TIMES = (1, 2, 4, 8)
EVALUATED = 1 << 16  # validation tokens, the same for every length


def settings(data: str, out: str, position: str, seed: int, o: dict[str, Any]) -> dict[str, Any]:
    return {
        "data": data, "out": out, "num_workers": 0, "track": "none", "device": "cpu", "threads": 1,
        "model": {
            "kind": "gpt", "d_model": o["width"], "n_layers": 4, "seq_len": o["context"],
            "attention": {"kind": "causal", "n_heads": 4, "qk_norm": "l2"}, "norm": "rmsnorm", "placement": "peri",
            "position": position,
        },
        "optim": {"kind": "adamw", "lr": 3e-3, "betas": [0.9, 0.99]},
        "schedule": {"kind": "cosine", "warmup_steps": 50},
        "batch_tokens": 32 * o["context"], "micro_batch": 32, "tokens": o["tokens"], "eval_every": 10**6, "seed": seed,
        "sample_prompts": [],
    }  # fmt: skip


def trained(data: str, out: str, position: str, seed: int, o: dict[str, Any]) -> str:
    """Trains a run unless it is there; returns its folder."""
    torch.set_num_threads(1)
    if not (Path(out) / "cost.json").exists():
        tree = settings(data, out, position, seed, o)
        config, _ = resolve_config(build(TrainConfig, tree))
        with contextlib.redirect_stdout(io.StringIO()):
            loop.train({"config": plain(config), "run": out})
    return out


@torch.no_grad()
def nll(model: Any, ids: Tensor) -> Tensor:
    """[rows, L + 1] tokens -> [rows, L] nats of each token but the first."""
    parts = []
    for rows in ids.split(max(1, (1 << 14) // ids.shape[1])):
        logits = model(rows[:, :-1]).logits.float()
        parts.append(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(rows), -1))
    return torch.cat(parts)


def windows(tokens: np.ndarray, length: int) -> Tensor:
    """Whole windows side by side, each with the token after it: [rows, length + 1]."""
    n = (len(tokens) - 1) // length
    return torch.from_numpy(np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(n)]).astype(np.int64))


def measure(folder: str, tokens: np.ndarray, rows: str) -> dict[str, Any]:
    """What one checkpoint loses at each length, and what its context is worth to it."""
    torch.set_num_threads(1)
    model: Any = load(resolve(folder, "last"))
    context = model.spec.seq_len
    ids = windows(tokens, context)
    eighth = context // 8
    full = nll(model, ids)[:, -eighth:]
    near = nll(model, ids[:, -2 * eighth - 1 :])[:, -eighth:]
    found: dict[str, Any] = {"with all": full.mean().item(), "with an eighth": near.mean().item()}
    for times in TIMES:
        longer: Any = model if times == 1 else stretched(model, times * context, rows)  # type: ignore[arg-type]
        losses = nll(longer, windows(tokens, times * context))
        found[f"{times}x"] = losses.mean().item()
        found[f"{times}x, end"] = losses[:, -context:].mean().item()
    return found


def report(
    found: dict[str, list[dict[str, Any]]],
    words: list[str],
    o: dict[str, Any],
    seeds: int,
    n: int,
    data: str,
    title: str,
    out: Path,
) -> None:
    words = [f"{w.split('=')[0]}=..." if w.startswith(("data=", "work=", "out=")) else w for w in words]
    manifest = json.loads((Path(data) / "manifest.json").read_text())

    def cell(rows: list[dict[str, Any]], key: str) -> str:
        values = interval([row[key] for row in rows])
        return f"{values.mean:.3f} ± {values.high - values.mean:.3f}" if values.n > 1 else f"{values.mean:.3f}"

    lengths = [f"{t}x" for t in TIMES]
    lines = [
        "# Positions beyond the trained context",
        "",
        f"Command: `python -m benchmarks.extrapolation {' '.join(words)}`. {time.strftime('%Y-%m-%d')}, "
        f"{platform.machine()}, torch {torch.__version__}.",
        f"{o['tokens']:,} tokens of training at context {o['context']}, 4 layers of width {o['width']}, peri, "
        f"unit queries and keys; {seeds} seeds. Nats per token on the first {n - 1:,} validation tokens of "
        f"{title or 'data set'} {manifest['fingerprint'][:16]} ({manifest['tokenizer']['kind']}, "
        f"{manifest['tokenizer']['vocab_size']} ids), "
        "mean ± half of the 95 % interval over seeds.",
        "",
        "## Whether the checkpoints use their context",
        "",
        f"Loss of the last {o['context'] // 8} tokens of each trained window, with everything before them visible and "
        f"with the nearest {o['context'] // 8} tokens alone.",
        "",
        "| positions | all visible | nearest eighth alone | what the rest is worth |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, rows in found.items():
        for row in rows:
            row["worth"] = row["with an eighth"] - row["with all"]
        lines.append(f"| {name} | {cell(rows, 'with all')} | {cell(rows, 'with an eighth')} | {cell(rows, 'worth')} |")
    for title, keys in (
        ("The whole window", lengths),
        (f"Its last {o['context']} tokens", [f"{k}, end" for k in lengths]),
    ):
        lines += ["", f"## {title}", "", f"| positions | {' | '.join(lengths)} |", "| --- " + "| ---: " * 4 + "|"]
        lines += [f"| {name} | {' | '.join(cell(rows, key) for key in keys)} |" for name, rows in found.items()]
    lines += ["", "## Order", "", *order(found)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "extrapolation.md").write_text("\n".join(lines) + "\n")
    (out / "extrapolation.json").write_text(json.dumps({"command": words, "found": found}, indent=1) + "\n")
    draw(found, o["context"], out / "extrapolation.png")
    print("\n".join(lines))


def order(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """At each length, the schemes by their mean loss, and whether each beats the next outside the error over seeds."""
    lines = []
    for times in TIMES:
        ranked = sorted(found, key=lambda name: sum(row[f"{times}x"] for row in found[name]))
        said = ranked[0]
        for better, worse in itertools.pairwise(ranked):
            pairs = zip(found[better], found[worse], strict=True)
            difference = interval([b[f"{times}x"] - a[f"{times}x"] for a, b in pairs])
            said += f" {'<' if difference.n > 1 and difference.low > 0 else '~'} {worse}"
        lines.append(f"- {times}x: {said}")
    return [
        *lines,
        "",
        "`<`: less loss, the paired 95 % interval over seeds above zero; `~`: no difference outside it.",
    ]


def draw(found: dict[str, list[dict[str, Any]]], context: int, path: Path) -> None:
    """Loss over the window's last tokens against its length, a band of the 95 % interval over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    x = [t * context for t in TIMES]
    for ax, suffix, title in zip(axes, ("", ", end"), ("whole window", f"last {context} tokens"), strict=True):
        for name, rows in found.items():
            values = [interval([row[f"{t}x{suffix}"] for row in rows]) for t in TIMES]
            (curve,) = ax.plot(x, [v.mean for v in values], marker="o", label=name)
            if values[0].n > 1:
                ax.fill_between(
                    x, [v.low for v in values], [v.high for v in values], color=curve.get_color(), alpha=0.2
                )
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, [str(v) for v in x])
        ax.axvline(context, color="0.7", linewidth=1)
        ax.set(title=title, xlabel="context at evaluation, tokens", ylabel="validation loss, nats per token")
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    given = dict(word.split("=", 1) for word in words)
    o = {"tokens": int(given.get("tokens", 2097152)), "context": int(given.get("context", 64)),
         "width": int(given.get("width", 96))}  # fmt: skip
    positions, seeds = given.get("positions", "rotary,fire,learned").split(","), int(given.get("seeds", 3))
    data, work = given["data"], Path(given["work"])
    names = [(p, s) for s in range(seeds) for p in positions]
    with ProcessPoolExecutor(int(given.get("parallel", 2)), mp_context=get_context("spawn")) as pool:
        jobs = {(p, s): pool.submit(trained, data, str(work / f"{p}-s{s}"), p, s, o) for p, s in names}
        folders = {}
        for name, job in jobs.items():
            folders[name] = job.result()
            print(f"trained {folders[name]}", flush=True)
    tokens = TokenFolder.open(data).split("val").window(0, EVALUATED // (8 * o["context"]) * 8 * o["context"] + 1)
    found: dict[str, list[dict[str, Any]]] = {}
    for (position, _), folder in folders.items():
        table = position == "learned"
        for rows in ("cycle", "small") if table else ("cycle",):
            found.setdefault(f"{position}, rows: {rows}" if table else position, []).append(
                measure(folder, tokens, rows)
            )
    report(
        found,
        words,
        o,
        seeds,
        len(tokens),
        data,
        given.get("title", ""),
        Path(given.get("out", Path(__file__).parent / "results")),
    )


if __name__ == "__main__":
    main()
