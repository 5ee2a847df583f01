"""Searches: what a trial costs beyond its own training, and successive halving beside random draws.

    python -m benchmarks.search overhead [trials=24] [out=benchmarks/results]
    python -m benchmarks.search asha [repetitions=10] [full=16] [tokens=163840] [out=benchmarks/results]

overhead: trials of 100k tokens through our search (reused actors, open token folders, no Ray Train) and through a Tuner
with Ray's defaults around the same training loop, in turn; the floor is the training itself.
asha: the space of tune_spaces/asha_ten.yaml, the same budget of tokens for both rules, paired by the seed of the draws.
Both on Tiny Shakespeare's characters; searches use every core, one thread per trial.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.train import SHA256, TITLE, tokens
from models.spec import plain
from pipelines import search
from pipelines.lib.cluster import ensure_ray, usable_cpus
from pipelines.lib.config import InputError, assemble
from pipelines.lib.search.ledger import Ledger
from pipelines.lib.search.study import SPACES, SearchConfig
from pipelines.lib.statistics import interval, paired

OVERHEAD = {
    "recipe": "gpt_debug",
    "fixed": {"tokens": 102400, "eval_every": 1000, "eval_tokens": 16384, "log_every": 10},
    "vary": {"optim.lr": {"log_uniform": [1e-3, 1e-2]}},
    "rule": "random",
    "track": "none",
}


def machine() -> str:
    return f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {usable_cpus()} cores, torch {torch.__version__}"


def run_search(words: Sequence[str]) -> None:
    """A search by its command, quietly. Raises InputError if it fails."""
    heard, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(errors):
        code = search.main([*words, "track=none"])
    if code != 0:
        raise InputError(f"the search ended with {code}: {errors.getvalue().strip().splitlines()[-1]}")


# ---- overhead


def ours(data: Path, out: Path, count: int) -> dict[str, float]:
    file = out.parent / "overhead.yaml"
    file.write_text(json.dumps(OVERHEAD))
    run_search([str(file), f"data={data}", f"out={out}", f"trials={count}"])
    events = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    ends = [e for e in events if e["event"] == "end"]
    # From the end of the first trial of each actor: before that stands the start of the processes.
    slots = usable_cpus()
    first, last = ends[slots - 1]["time"], ends[-1]["time"]
    own = [e["cost"]["seconds"] for e in ends[slots:]]
    return figures(slots, last - first, own)


def default_tuner(data: Path, out: Path, count: int) -> dict[str, float]:
    """The same trials through a Tuner as Ray sets it up: a function, a new actor for each, its own loggers."""
    from ray import tune

    words = [str(out.parent / "overhead.yaml"), f"data={data}", f"out={out}", f"trials={count}"]
    study = search.prepare(assemble(words, SearchConfig))[1]

    def trial(settings: Mapping[str, Any]) -> None:
        from pipelines.lib.loop import train

        job = settings["job"]
        folder = Path(job["run"])
        outcome = train(job)
        cost = json.loads((folder / "cost.json").read_text())
        tune.report({"loss": outcome.metrics["val/nll"], "seconds": cost["seconds"], "ended": time.time()})

    space = []
    for i in range(count):
        run = out / f"trial_{i}"
        settings = {"optim.lr": 1e-3 * 10 ** (i / count)}
        space.append({"run": str(run), "config": plain(study.train_config(settings, 0, str(run)))})
    for name in ("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "TUNE_GLOBAL_CHECKPOINT_S"):
        os.environ.pop(name, None)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        results = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space={"job": tune.grid_search(space)},
            run_config=tune.RunConfig(storage_path=str(out / "ray"), verbose=0),
        ).fit()
    slots = usable_cpus()
    ends = sorted((r.metrics["ended"], r.metrics["seconds"]) for r in results)
    return figures(slots, ends[-1][0] - ends[slots - 1][0], [s for _, s in ends[slots:]])


def figures(slots: int, wall: float, own: list[float]) -> dict[str, float]:
    """Per trial: seconds of its slot, of its own training, and the difference."""
    each = slots * wall / len(own)
    return {
        "slot_s": each,
        "training_s": statistics.mean(own),
        "overhead_s": each - statistics.mean(own),
        "trials_per_hour": 3600 * len(own) / wall,
    }


def overhead(out: Path, count: int) -> None:
    ensure_ray()
    rows: dict[str, list[dict[str, float]]] = {"Ray Tune's defaults": [], "ours": []}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data = tokens(work / "shakespeare")
        for turn in range(2):
            (work / f"ours{turn}").mkdir()
            rows["ours"].append(ours(data, work / f"ours{turn}" / "out", count))
            (work / f"ours{turn}" / "peer").mkdir()
            rows["Ray Tune's defaults"].append(default_tuner(data, work / f"ours{turn}" / "peer", count))
            print({name: found[-1] for name, found in rows.items()}, flush=True)
    mean = {name: {k: statistics.mean(f[k] for f in found) for k in found[0]} for name, found in rows.items()}
    peer = mean["Ray Tune's defaults"]["overhead_s"]
    lines = [
        "# What a trial costs beyond its own training",
        "",
        f"Command: `python -m benchmarks.search overhead trials={count}`. {machine()}.",
        f"Data: {TITLE}, characters, sha256 {SHA256[:16]}.",
        f"{count} trials of 102,400 tokens (gpt_debug), as many at once as cores, two turns of each row in the same",
        "minutes. Overhead: seconds of a core per trial less those inside the training loop, validation included;",
        "the start of the first actors is left out of both rows.",
        "",
        "| row | training, s | overhead, s | less than Ray's defaults by | trials per hour |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for label, row in mean.items():
        lines.append(
            f"| {label} | {row['training_s']:.2f} | {row['overhead_s']:.2f} | {peer / row['overhead_s']:.1f}x "
            f"| {row['trials_per_hour']:,.0f} |"
        )
    write(out / "search_overhead", lines, {"rows": rows, "trials": count, "machine": machine()})


# ---- successive halving


def curve(folder: Path) -> list[tuple[int, float]]:
    """(tokens trained so far, best loss so far) after each piece of a search."""
    found, spent, best = [], 0, math.inf
    ledger = Ledger(folder)
    events = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    for event in events:
        if event["event"] == "end" and event["status"] == "done":
            spent += ledger.rows[event["number"]]["piece_tokens"]
            loss = event["metrics"]["val/bpb"]
            best = min(best, math.inf if loss is None else loss)
            found.append((spent, best))
    return found


def at(points: list[tuple[int, float]], spent: float) -> float:
    return next((loss for used, loss in reversed(points) if used <= spent), math.nan)


def middle_of(found: list[list[tuple[int, float]]], spent: float) -> float:
    """Median over the repetitions of the best loss after so many tokens; those that have none yet count as infinite."""
    return statistics.median([math.inf if math.isnan(x := at(points, spent)) else x for points in found])


def crossing(curves: Mapping[str, list[list[tuple[int, float]]]], budget: int) -> float:
    """The fraction of the budget from which asha's median is at most random's final one; infinite if never."""
    goal = middle_of(curves["random"], 1.05 * budget)
    shares = (i / 200 for i in range(1, 211))
    return next((share for share in shares if middle_of(curves["asha"], share * budget) <= goal), math.inf)


def asha(out: Path, repetitions: int, full: int, length: int) -> None:
    ensure_ray()
    budget = full * length
    rules = {"asha": "asha", "random": "random"}  # as they are by default
    curves: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in rules}
    began = time.time()
    with tempfile.TemporaryDirectory() as name:
        data = tokens(Path(name) / "shakespeare")
        for repetition in range(repetitions):
            for rule, words in rules.items():
                folder = Path(name) / f"{rule}{repetition}"
                run_search(
                    [
                        str(SPACES / "asha_ten.yaml"),
                        f"data={data}",
                        f"out={folder}",
                        f"rule={words}",
                        f"tokens={budget}",
                        f"search_seed={repetition}",
                        f"fixed.tokens={length}",
                    ]
                )
                curves[rule].append(curve(folder))
            print(f"{repetition}: " + ", ".join(f"{r} {c[-1][-1][1]:.4f}" for r, c in curves.items()), flush=True)
    finals = {rule: dict(enumerate(at(c, budget * 1.05) for c in found)) for rule, found in curves.items()}
    difference = paired(finals["random"], finals["asha"])
    fractions = []
    for ours_, theirs in zip(curves["asha"], curves["random"], strict=True):
        goal = theirs[-1][1]
        fractions.append(next((used / budget for used, loss in ours_ if loss <= goal), math.inf))
    reached = sorted(fractions)
    middle = statistics.median(reached)
    mean = {rule: interval(list(found.values())) for rule, found in finals.items()}
    lines = [
        "# Successive halving against random draws at equal compute",
        "",
        f"Command: `python -m benchmarks.search asha repetitions={repetitions} full={full} tokens={length}`.",
        f"{machine()}. Data: {TITLE}, characters, sha256 {SHA256[:16]}.",
        "Space: tune_spaces/asha_ten.yaml (12 settings).",
        f"Budget of each search: {budget:,} tokens, that is {full} trials of {length:,} tokens.",
        f"{repetitions} repetitions, paired by the seed of the draws; {(time.time() - began) / 60:.0f} minutes in all.",
        "",
        "| rule | settings tried, mean | best validation loss, bits per byte (95 % interval over repetitions) |",
        "| --- | ---: | ---: |",
    ]
    for rule, found in mean.items():
        tried = statistics.mean(len(c) for c in curves[rule])
        lines.append(f"| {rule} | {tried:.1f} pieces | {found.mean:.4f} ({found.low:.4f} to {found.high:.4f}) |")
    lines += [
        "",
        f"Paired difference, asha less random: {difference.mean:+.4f} bits per byte "
        f"({difference.low:+.4f} to {difference.high:+.4f}, p = {difference.p:.2g}).",
        f"Fraction of the budget at which asha reaches random's final best: median {middle:.2f}; all: "
        + ", ".join("never" if math.isinf(f) else f"{f:.2f}" for f in reached)
        + ".",
        f"The median of asha's best losses falls below random's final median at {crossing(curves, budget):.2f} of "
        "the budget.",
        "",
        "![best loss over tokens](search_asha.png)",
    ]
    plot(out / "search_asha.png", curves, budget)
    write(out / "search_asha", lines, {"curves": curves, "budget": budget, "machine": machine()})


def plot(path: Path, curves: Mapping[str, list[list[tuple[int, float]]]], budget: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), dpi=110)
    where = [budget * i / 100 for i in range(4, 101)]
    for rule, colour in (("random", "#888888"), ("asha", "#1f77b4")):
        for found in curves[rule]:
            axis.step(
                [used / 1e6 for used, _ in found], [loss for _, loss in found], colour, where="post", lw=0.6, alpha=0.35
            )
        middle = [x if math.isfinite(x := middle_of(curves[rule], w)) else math.nan for w in where]
        axis.step(
            [w / 1e6 for w in where], middle, colour, where="post", lw=2.2, label=f"{rule} (median of repetitions)"
        )
    axis.set(xlabel="million tokens trained by the search", ylabel="best validation loss, bits per byte", yscale="log")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def write(path: Path, lines: list[str], record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps(record) + "\n")
    print("\n".join(lines))


def main(argv: Sequence[str]) -> int:
    what, *rest = argv or ["help"]
    asked = dict(word.split("=", 1) for word in rest)
    out = Path(asked.pop("out", "benchmarks/results"))
    numbers = {key: int(value) for key, value in asked.items()}
    if what == "overhead":
        overhead(out, numbers.get("trials", 24))
    elif what == "asha":
        asha(out, numbers.get("repetitions", 10), numbers.get("full", 16), numbers.get("tokens", 163840))
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
