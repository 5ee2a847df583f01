"""The report card of one run: what it was, what it came to, what it cost, and how well that was foretold."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.spec import ConfigError, build, flatten, plain
from pipelines.lib.comparison import words
from pipelines.lib.comparison.collect import SEEDS, RunRecord, read_json, read_run
from pipelines.lib.comparison.curves import AXES, seed_curve, thinned
from pipelines.lib.comparison.html import Safe, buttons, document, plot, say, section, table, tag
from pipelines.lib.comparison.page import COLOURS, axes_of, data_of
from pipelines.lib.comparison.paper import fenced, image
from pipelines.lib.comparison.paper import plain as marked
from pipelines.lib.comparison.paper import table as markdown_table
from pipelines.lib.comparison.variants import word
from pipelines.lib.config import write_yaml
from pipelines.lib.run import Run
from pipelines.lib.training import TrainConfig

FIGURES = (  # a plot each: title, columns of metrics.jsonl
    ("loss, nats per token", ("train/nll", "val/nll")),
    ("learning rate", ("train/lr",)),
    ("gradient norm", ("train/grad_norm",)),
    ("update to weight ratio", ("train/update_ratio",)),
    ("tokens per second", ("train/tokens_per_s",)),
)
COST_NAMES = {
    "parameters": "parameters",
    "tokens": "tokens",
    "flops": "training FLOP",
    "macs_per_token": "multiplications per token",
    "step_time_s": "time per update",
    "seconds": "training time",
    "memory_gb": "peak memory",
    "energy_j": "energy",
    "disk_gb": "disk",
}
CLOSE = 1.25  # an estimate this many times too high or low is still called close


@dataclass(frozen=True)
class Row:
    """One line of a table of the card."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """Everything on the card, as text and numbers.

    losses: the figures of its validations;  cost: name, figure, where it is from;  estimate: name, estimated, actual,
    ratio;  evaluations: what, figure, standard error, on what;  unusual: settings that are not at their default
    """

    run: RunRecord
    losses: tuple[Row, ...]
    cost: tuple[Row, ...]
    estimate: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    data: tuple[Row, ...]
    hardware: tuple[Row, ...]
    unusual: tuple[Row, ...]
    checkpoints: str


def card_of(path: Path) -> Card:
    """Read a run folder. Raises InputError for one that holds no training."""
    run = read_run(path)
    return Card(
        run,
        losses_of(run),
        cost_of(run),
        estimate_of(run),
        evaluations_of(run),
        data_of_run(run),
        hardware_of(run),
        unusual_of(run),
        checkpoints_of(run),
    )


# ---- what it holds ---------------------------------------------------------------------------------------------------


def losses_of(run: RunRecord) -> tuple[Row, ...]:
    """Each figure of the validations: at the end, and at its best."""
    keys = dict.fromkeys(k for row in run.rows for k in row if k.startswith(("val/", "eval/")))
    rows = []
    for key in keys:
        points = run.column(key)
        finite = [(v, int(row["step"])) for row, v in points if math.isfinite(v)]
        more = "score" in key or "rank" in key
        best, step = (max(finite) if more else min(finite)) if finite else (math.nan, 0)
        is_loss = key.endswith(("nll", "bpb", "ppl", "score"))
        at = f"{words.figure(best)} at step {step:,}" if finite and is_loss else "–"
        rows.append(Row(key, (words.figure(points[-1][1]), at)))
    return tuple(rows)


def cost_of(run: RunRecord) -> tuple[Row, ...]:
    how = read_json(run.path / "cost.json").get("how")
    how = how if isinstance(how, dict) else {}
    rows = []
    for key, name in COST_NAMES.items():
        if key == "disk_gb" and key not in run.cost:
            continue
        source = "metrics.jsonl and config" if key in run.derived else "cost.json" if key in run.cost else ""
        said = how.get(key)
        text = ", ".join(map(str, said)) or "no meter to be read" if isinstance(said, list) else str(said or "")
        rows.append(Row(name, (words.cost(key, run.cost.get(key)), "; ".join(w for w in (source, text) if w))))
    return tuple(rows)


def estimate_of(run: RunRecord) -> tuple[Row, ...]:
    """What estimate.json foretold beside what was measured; empty without that file."""
    foretold = {k: v for k, v in read_json(run.path / "estimate.json").items() if k in COST_NAMES}
    rows = []
    for key, value in foretold.items():
        if not isinstance(value, int | float):
            continue
        actual = disk_gb(run.path) if key == "disk_gb" else run.cost.get(key)
        ratio = actual / value if actual is not None and value else math.nan
        said = "–" if not math.isfinite(ratio) else f"{ratio:.2f}"
        if math.isfinite(ratio) and not 1 / CLOSE <= ratio <= CLOSE:
            said += " (far off)"
        rows.append(Row(COST_NAMES[key], (words.cost(key, value), words.cost(key, actual), said)))
    return tuple(rows)


def disk_gb(folder: Path) -> float:
    """What a run has left on the disk, GiB, without what other stages made of it."""
    made_later = {folder / "card", folder / "evaluation"}
    files = (
        p for top in folder.iterdir() if top not in made_later for p in ([top] if top.is_file() else top.rglob("*"))
    )
    return sum(p.stat().st_size for p in files if p.is_file()) / 2**30


def evaluations_of(run: RunRecord) -> tuple[Row, ...]:
    """The figures of every RUN/evaluation/*/results.json."""
    rows = []
    for path in sorted((run.path / "evaluation").glob("*/results.json")):
        results = read_json(path)
        step = (results.get("model") or {}).get("step", "?")
        for name, figures in (results.get("text") or {}).items():
            value, error = figures.get("bits_per_byte"), figures.get("bits_per_byte_stderr")
            kind = "bits per byte"
            if value is None:
                value, error, kind = (
                    figures.get("nats_per_token"),
                    figures.get("nats_per_token_stderr"),
                    "nats per token",
                )
            rows.append(
                Row(f"{name}, {kind}", (_number(value, error), _number(error), f"step {step}", path.parent.name))
            )
        for name, entry in (results.get("tasks") or {}).items():
            for metric, figure in (entry.get("metrics") or {}).items():
                value, error = figure.get("value"), figure.get("stderr")
                rows.append(
                    Row(f"{name}, {metric}", (_number(value, error), _number(error), f"step {step}", path.parent.name))
                )
    return tuple(rows)


def _number(value: Any, error: Any = None) -> str:
    if not isinstance(value, int | float):
        return words.MISSING
    return words.figure(float(value), float(error) if isinstance(error, int | float) else math.nan)


def data_of_run(run: RunRecord) -> tuple[Row, ...]:
    """Folder, fingerprint, and what the folder says of itself if it still is the one that was trained on."""
    mix = run.config.get("data")
    folders = [(m.get("path"), m.get("weight", 1.0)) for m in mix] if isinstance(mix, list) else [(mix, None)]
    rows = []
    for i, (folder, weight) in enumerate(folders):
        fingerprint = run.data[i] if i < len(run.data) else None
        manifest = read_json(Path(str(folder)) / "manifest.json")
        if not manifest:
            now = "the folder is not here now"
        elif fingerprint is not None and manifest.get("fingerprint") != fingerprint:
            now = "the folder holds other data now"
        else:
            now = manifest_words(manifest)
        share = f", weight {weight:g}" if isinstance(weight, int | float) and len(folders) > 1 else ""
        rows.append(Row(f"{folder}{share}", (fingerprint or words.MISSING, now)))
    return tuple(rows)


def manifest_words(manifest: Mapping[str, Any]) -> str:
    tokenizer = manifest.get("tokenizer") or {}
    parts = [f"{tokenizer.get('kind', 'tokenizer')} of {tokenizer.get('vocab_size', '?')} ids"]
    for name, split in (manifest.get("splits") or {}).items():
        tokens = sum(shard.get("tokens", 0) for shard in split.get("shards", []))
        if tokens:
            parts.append(f"{name} {tokens:,} tokens")
    return ", ".join(parts)


def hardware_of(run: RunRecord) -> tuple[Row, ...]:
    names = {"host": "host", "version.torch": "torch", "version.ray": "ray"}
    rows = [Row(names.get(k, k), (v,)) for k, v in run.machine.items()]
    log = Run(run.path).log
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    if worker := next((line for line in reversed(lines) if " workers: " in line), None):
        rows.append(Row("workers", (worker.split(" workers: ", 1)[1],)))
    rows.append(Row("asked for", (f"device {run.config.get('device')}, num_workers {run.config.get('num_workers')}",)))
    mlflow = read_json(run.path / "mlflow.json")
    if mlflow.get("run_id"):
        rows.append(Row("MLflow run", (f"{mlflow['run_id']} in {mlflow.get('tracking_uri', '?')}",)))
    return tuple(rows)


def unusual_of(run: RunRecord) -> tuple[Row, ...]:
    """Settings that are not at their default, seeds among them; all of them if the config is not of this program."""
    tree = {k: v for k, v in run.config.items() if k not in ("data", "out")}
    usual: dict[str, Any] = {}
    try:
        resolved = plain(build(TrainConfig, dict(run.config)))
        model = {"kind": resolved["model"]["kind"]}
        bare = {"data": "", "out": "", "steps": 1, "model": model}
        usual = flatten({k: v for k, v in plain(build(TrainConfig, bare)).items() if k not in ("steps", *SEEDS)})
        tree = {k: v for k, v in resolved.items() if k not in ("data", "out")}
    except (ConfigError, KeyError, TypeError):
        pass
    never = object()
    unset: tuple[Any, ...] = (None, [], {})
    return tuple(Row(k, (word(v),)) for k, v in flatten(tree).items() if usual.get(k, never) != v and v not in unset)


def checkpoints_of(run: RunRecord) -> str:
    folder = Run(run.path)
    steps = ", ".join(f"step_{s}" for s in reversed(folder.steps())) or "none"
    return f"{steps}; best: {folder.pointed('best') or 'none'}, last: {folder.pointed('last') or 'none'}"


# ---- the page --------------------------------------------------------------------------------------------------------


def card_page(card: Card, command: str) -> str:
    """The card as one HTML page."""
    run = card.run
    plots: dict[str, Any] = {}
    bar = tag("div", buttons("axis", [(a["key"], f"over {a['short']}") for a in axes_of()]), class_="buttons")
    (title, keys), *small = FIGURES
    plots["plot-loss"] = figure_of(run, title, keys, 400)
    grid = []
    for i, (name, columns) in enumerate(small):
        plots[f"plot-{i}"] = figure_of(run, name, columns, 260)
        grid.append(tag("div", tag("h3", name), plot(f"plot-{i}")))
    body = [
        tag(
            "header",
            tag("h1", run.name),
            tag("div", subtitle(card), class_="sub"),
            tag("div", *tiles(card), class_="tiles"),
        ),
        Safe("".join(tag("div", text, class_=f"note {kind}") for kind, text in notes_of(card))),
        section("curves", "Curves", bar, plot("plot-loss"), tag("div", *grid, class_="grid2")),
        section("validation", "Validation", rows_table(card.losses, ("figure", "at the end", "best"))),
        section("estimate", "Estimate against actual", *estimate_block(card)),
        section("cost", "Cost", rows_table(card.cost, ("", "figure", "from"))),
        section("evaluation", "Evaluation", evaluation_block(card)),
        section("samples", "Samples", *samples_block(run)),
        section("data", "Data", rows_table(card.data, ("folder", "fingerprint", "holds"), numbers=False)),
        section("hardware", "Hardware and versions", rows_table(card.hardware, ("", ""), numbers=False)),
        section("config", "Config", *config_block(card)),
        tag("footer", f"{run.path} · checkpoints: {card.checkpoints} · made by {command}"),
    ]
    return document(f"{run.name}: report card", body, plots)


def subtitle(card: Card) -> str:
    run = card.run
    step = int(run.rows[-1]["step"])
    return f"Report card · {run.status}, step {step:,} · seed {run.seed} · {time.strftime('%Y-%m-%d %H:%M')}"


def notes_of(card: Card) -> list[tuple[str, str]]:
    run = card.run
    found = []
    if run.status in ("diverged", "failed"):
        found.append(("stop", f"This run {'diverged' if run.status == 'diverged' else 'failed'}: {run.note}."))
    elif run.note:
        found.append(("care", f"This run is {run.status}: {run.note}."))
    if not run.data:
        found.append(("care", "Nothing tells what data it was trained on."))
    if run.derived:
        names = [name for key, name in COST_NAMES.items() if key in run.derived]
        found.append(("info", f"Not in cost.json, and taken from metrics.jsonl or the config: {', '.join(names)}."))
    return found


def tiles(card: Card) -> list[Safe]:
    """The figures that are asked for first."""
    run = card.run
    key = "val/bpb" if run.column("val/bpb") else "val/nll"
    big = [(key, words.figure(run.last(key)) if run.column(key) else words.MISSING)]
    for name in ("parameters", "tokens", "flops", "seconds", "step_time_s", "memory_gb", "energy_j"):
        big.append((COST_NAMES[name], words.cost(name, run.cost.get(name))))
    return [tag("div", tag("b", value), tag("span", name), class_="tile") for name, value in big]


def figure_of(run: RunRecord, title: str, keys: Sequence[str], height: int) -> dict[str, Any]:
    lines = [
        {
            "name": key,
            "color": COLOURS[i],
            "quiet": False,
            "band": False,
            "mean": None,
            "seeds": [{"seed": run.seed, **data_of(seed_curve(run, key))}],
        }
        for i, key in enumerate(keys)
        if run.column(key)
    ]
    return {"kind": "curves", "figures": [{"name": title, "lines": lines}], "axes": axes_of(), "height": height}


def rows_table(rows: Sequence[Row], head: Sequence[str], numbers: bool = True) -> Safe:
    if not rows:
        return say("None.")
    kinds = ["", *("n" if numbers and i == 0 else "wrap" for i in range(len(head) - 1))]
    return table(list(zip(head, kinds, strict=True)), [[row.name, *row.cells] for row in rows])


def estimate_block(card: Card) -> list[Safe]:
    if not card.estimate:
        return [say("No estimate: this run has no estimate.json.")]
    head = [("", ""), ("estimated", "n"), ("actual", "n"), ("actual / estimated", "n")]
    return [
        table(head, [[row.name, *row.cells] for row in card.estimate]),
        say("estimate.json: what the pace of the run's first updates foretold."),
    ]


def evaluation_block(card: Card) -> Safe:
    if not card.evaluations:
        return say(f"Not evaluated yet: python -m pipelines.evaluate {card.run.path}")
    head = [
        ("measured on", ""),
        ("figure", "n"),
        ("standard error", "n"),
        ("checkpoint", ""),
        ("results in evaluation/", "wrap"),
    ]
    return table(head, [[row.name, *row.cells] for row in card.evaluations])


def samples_block(run: RunRecord) -> list[Safe]:
    newest = list({row["prompt"]: row for row in run.samples}.values())
    if not newest:
        return [say("No samples (samples.txt).")]
    cards = [
        tag(
            "div",
            tag("h4", f"{row['prompt']!r}, step {row['step']}"),
            tag("pre", tag("mark", row["prompt"]), str(row["text"]).removeprefix(str(row["prompt"]))),
            class_="sample",
        )
        for row in newest
    ]
    return [tag("div", *cards, class_="samples")]


def config_block(card: Card) -> list[Safe]:
    whole = tag("details", tag("summary", "The whole config"), tag("pre", write_yaml(dict(card.run.config))))
    return [
        say("Settings that are not at their default."),
        rows_table(card.unusual, ("setting", "value"), numbers=False),
        whole,
    ]


# ---- paper -----------------------------------------------------------------------------------------------------------


def card_paper(card: Card, command: str, folder: Path) -> str:
    """The card as Markdown; draws curves.png into `folder`."""
    run = card.run
    parts = [f"# {marked(run.name)}", marked(subtitle(card)), *(f"> {marked(text)}" for _, text in notes_of(card))]
    if image(folder, "curves", lambda figure: draw(figure, run), (11, 6)):
        parts.append("![curves](curves.png)")
    estimate = _markdown(("", "estimated", "actual", "actual / estimated"), card.estimate)
    evaluations = _markdown(("measured on", "figure", "standard error", "checkpoint", "results"), card.evaluations)
    newest = list({row["prompt"]: row for row in run.samples}.values())
    parts += [
        "## Validation",
        _markdown(("figure", "at the end", "best"), card.losses) or "None.",
        "## Estimate against actual",
        estimate or "No estimate: this run has no estimate.json.",
        "## Cost",
        _markdown(("", "figure", "from"), card.cost),
        "## Evaluation",
        evaluations or "Not evaluated yet.",
        "## Samples",
        *([f"Step {row['step']}:\n\n{fenced(str(row['text']))}" for row in newest] or ["No samples (samples.txt)."]),
        "## Data",
        _markdown(("folder", "fingerprint", "holds"), card.data),
        "## Hardware and versions",
        _markdown(("", ""), card.hardware),
        "## Config",
        "Settings that are not at their default:",
        _markdown(("setting", "value"), card.unusual) or "None.",
        fenced(write_yaml(dict(run.config)).rstrip()),
        f"{marked(run.path)}; checkpoints: {marked(card.checkpoints)}.",
        f"Made by\n\n{fenced(command)}",
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(head: Sequence[str], rows: Sequence[Row]) -> str:
    return markdown_table(head, [[row.name, *row.cells] for row in rows]) if rows else ""


def draw(figure: Any, run: RunRecord) -> bool:
    drawn = [(title, [k for k in keys if run.column(k)]) for title, keys in FIGURES]
    drawn = [(title, keys) for title, keys in drawn if keys]
    if not drawn:
        return False
    places = figure.subplots(2, 3).flat
    for axes, (title, keys) in zip(places, drawn, strict=False):
        for i, key in enumerate(keys):
            curve = thinned(seed_curve(run, key))
            if "tokens" in curve.x:
                axes.plot(curve.x["tokens"], curve.y, color=COLOURS[i], lw=1.2, label=key)
        axes.set_title(title)
        axes.set_xlabel(AXES["tokens"])
        axes.grid(alpha=0.25)
        if len(keys) > 1:
            axes.legend()
    for axes in list(figure.axes)[len(drawn) :]:
        axes.set_visible(False)
    return True
