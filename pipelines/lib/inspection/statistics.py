"""`pipelines.compare statistics`: run models on a text, measure activations and weights, write and track the page."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.spec import build
from pipelines.lib.config import InputError
from pipelines.lib.inspection.activations import Activations, States, observe
from pipelines.lib.inspection.weights import QUANTILES, Change, TensorFigures, change, figures_of, tensors
from pipelines.lib.jobs import storage_path
from pipelines.lib.jsonl import finite
from pipelines.lib.output import check_writable

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.compare import StatisticsConfig

FORMAT_VERSION = 1
LONGEST_CONTEXT = 1024  # of a row, unless told: attention weights grow with its square
TOKENS_PER_BATCH = 2048
BYTES_PER_TOKEN = 64  # of a text, that are read at most for each token asked for


@dataclass
class Model:
    """One model's figures. name: on the page.  run, step: where it belongs, if to a run.  text: what it read."""

    name: str
    folder: Path
    run: Path | None
    step: int
    parameters: int
    context: int
    text: str
    activations: Activations
    states: States
    tensors: list[TensorFigures]


def make(config: StatisticsConfig) -> int:
    """The whole command. Returns the exit code."""
    from pipelines.lib.inspection.statistics_page import statistics_page
    from pipelines.lib.run import write_atomic

    words = config.which * len(config.runs) if len(config.which) == 1 else config.which
    out = storage_path(config.out) if config.out else None
    subjects = [subject(config, run, which) for run, which in zip(config.runs, words, strict=True)]
    first = subjects[0][0]
    out = out or (first.run / "statistics" if first.run is not None else storage_path("statistics"))
    check_writable(out / "statistics.html", f"out={out}")
    models = [look_at(config, one, asked, first) for one, asked in subjects]
    if len(models) == 2 and models[0].name == models[1].name:
        for model in models:
            model.name = str(model.folder)
    changes, alone = changed(config, *(m.folder for m in models)) if len(models) == 2 else ([], [])
    title = config.title or " and ".join(model.name for model in models)
    page = statistics_page(models, changes, alone, title, repeated(config))
    tree = {
        "format_version": FORMAT_VERSION,
        "models": [plain_data(model) for model in models],
        "changes": [asdict(c) for c in changes],
    }
    out.mkdir(parents=True, exist_ok=True)
    try:
        write_atomic(out / "statistics.html", page)
        write_atomic(out / "tensors.csv", as_csv(models))
        write_atomic(out / "statistics.json", json.dumps(finite(tree), allow_nan=False, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"out={out}: {error.strerror}") from None
    for model in models:
        figures = headline(model)
        print(f"{model.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    print(f"wrote {out / 'statistics.html'}, statistics.json and tensors.csv")
    if config.track == "mlflow":
        track(models[0], out)
    return 0


def subject(config: StatisticsConfig, run: str, which: str) -> tuple[Any, Any]:
    """Where a model lies and whose it is, and what pipelines.evaluate would be asked to read this text."""
    from pipelines.evaluate import EvaluateConfig
    from pipelines.lib.results import open_subject

    on: dict[str, Any] = {"text": config.text} if config.text is not None else {"data_tokens": config.tokens}
    if config.text is None:
        on |= {"data": config.data, "split": config.split}
    else:
        on["text_mb"] = max(1, config.tokens * BYTES_PER_TOKEN / 2**20)
    options = {"device": config.device, "dtype": config.dtype, "threads": config.threads}
    asked = build(EvaluateConfig, {"run": run, "which": which, **on, **options})
    return open_subject(asked), asked


def look_at(config: StatisticsConfig, one: Any, asked: Any, first: Any) -> Model:
    """Opens a model, runs it on the text and reads its weights. first: whose validation split serves all."""
    import dataclasses

    from models.lm import LM
    from pipelines.evaluate import open_texts, trained_on
    from pipelines.lib.results import context_of, open_model

    if config.text is None and config.data is None:
        asked = dataclasses.replace(asked, data=trained_on(first))
    (text,) = open_texts(asked, one)[1]
    model = open_model(one, asked)
    if not isinstance(model, LM):
        model.set_attn_implementation("eager")  # the others do not say their attention weights
    own = context_of(model, config.context)
    context = config.context or min(own, LONGEST_CONTEXT)
    if text.largest >= (vocab := int(model.get_input_embeddings().weight.shape[0])):
        raise InputError(f"{text.name}: token {text.largest} is not in the vocabulary of {one.folder}, 0..{vocab - 1}")
    seen = observe(model, batches(text.sequences, context, config.tokens))
    if not seen.tokens:
        raise InputError(f"{text.name}: not one row of 2 tokens to run {one.folder} on")
    name = f"{one.run.name} {one.folder.name}" if one.run is not None else one.folder.name
    figures = [figures_of(n, x) for n, x in tensors(one.folder) if re.search(config.tensors, n)]
    parameters = int(model.num_parameters())
    return Model(name, one.folder, one.run, one.step, parameters, context, text.name, seen, seen.states(), figures)


def batches(sequences: Sequence[Any], context: int, tokens: int) -> Iterator[Tensor]:
    """Rows [B, T] side by side over the sequences until there are `tokens` of them; shorter last rows go alone."""
    import numpy as np
    import torch

    rows: list[Any] = []
    left = tokens
    for sequence in sequences:
        for begin in range(0, len(sequence) - 1, context):
            row = np.asarray(sequence[begin : min(begin + context, len(sequence), begin + left)]).astype(np.int64)
            if len(row) < 2:
                continue
            left -= len(row)
            if len(row) < context:
                yield torch.from_numpy(row)[None]
            else:
                rows.append(row)
            if len(rows) * context >= TOKENS_PER_BATCH:
                yield torch.from_numpy(np.stack(rows))
                rows = []
            if left < 2:
                break
        if left < 2:
            break
    if rows:
        yield torch.from_numpy(np.stack(rows))


def changed(config: StatisticsConfig, a: Path, b: Path) -> tuple[list[Change], list[str]]:
    """How each tensor of b lies to its namesake in a, and the names that have none of the same shape."""
    ours, theirs = ({n: x for n, x in tensors(p) if re.search(config.tensors, n)} for p in (a, b))
    found, alone = [], []
    for name, x in ours.items():
        y = theirs.pop(name, None)
        if y is None or y.shape != x.shape:
            alone.append(name)
        else:
            found.append(change(name, x, y))
    return found, [*alone, *theirs]


def headline(model: Model) -> dict[str, float]:
    """The few figures that go to the terminal and to MLflow."""
    streams = list(model.activations.stream.values())
    heads = [head.mean()["share"] for layer in model.activations.heads.values() for head in layer]
    out = {
        "nats_per_token": model.activations.nats_per_token,
        "rankme": model.states.rankme,
        "alpha_req": model.states.alpha_req,
        "residual_rms_last": streams[-2].rms,
        "residual_kurtosis_max": max((s.kurtosis for s in streams), default=float("nan")),
        "activation_max": max((s.largest for s in streams), default=float("nan")),
    }
    if heads:
        out["attention_entropy_share"] = sum(heads) / len(heads)
    return out


def plain_data(model: Model) -> dict[str, Any]:
    """All figures of a model as plain data."""
    seen = model.activations

    def running(r: Any) -> dict[str, Any]:
        return {"rms": r.rms, "kurtosis": r.kurtosis, "largest": r.largest, "not_finite": r.bad}

    return {
        "name": model.name,
        "folder": str(model.folder),
        "step": model.step,
        "parameters": model.parameters,
        "text": model.text,
        "tokens": seen.tokens,
        "context": model.context,
        "figures": headline(model),
        "stream": {name: running(r) for name, r in seen.stream.items()},
        "mixers": [running(r) for r in seen.mixers],
        "mlps": [running(r) for r in seen.mlps],
        "heads": {str(layer): [head.mean() for head in heads] for layer, heads in seen.heads.items()},
        "states": asdict(model.states),
        "tensors": [
            {**asdict(t), "stable_rank": t.stable_rank, "effective_rank": t.effective_rank} for t in model.tensors
        ],
    }


def as_csv(models: Sequence[Model]) -> str:
    """A row per tensor and model with every figure that is one number; what is not known is empty."""
    rows = []
    for model in models:
        for t in model.tensors:
            row: dict[str, Any] = {"model": model.name, "tensor": t.name, "shape": " x ".join(map(str, t.shape))}
            row |= asdict(t.moments) | {"stable_rank": t.stable_rank, "effective_rank": t.effective_rank}
            row |= {f"quantile_{q:g}": v for q, v in zip(QUANTILES, t.quantiles, strict=False)}
            row |= asdict(t.axes) if t.axes is not None else {}
            rows.append({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(k for row in rows for k in row)), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def track(model: Model, out: Path) -> None:
    """Page and figures on the first model's MLflow run, at its checkpoint's step; a run without one gets nothing."""
    from pipelines.lib.tracking import Tracker

    if model.run is None:
        return
    with Tracker.attach(model.run) as tracker:
        if tracker.run_id is None:
            return
        tracker.metrics({f"statistics/{name}": value for name, value in headline(model).items()}, model.step)
        for name in ("statistics.html", "statistics.json", "tensors.csv"):
            tracker.artifact(out / name, "statistics")
    print("the page is an artifact of the run in MLflow, too", file=sys.stderr)


def repeated(config: StatisticsConfig) -> str:
    """The command that makes this page again."""
    words = ["python", "-m", "pipelines.compare", "statistics", *config.runs]
    for name, f in config.__dataclass_fields__.items():
        value = getattr(config, name)
        if name != "runs" and value != f.default:
            words += [f"{name}={v}" for v in (value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)
