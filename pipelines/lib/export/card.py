"""The model card (README.md) of an exported folder, filled with the run's own figures; what was not measured is absent.

It goes to other people, so it names no path, host or store of the machine that trained the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.spec import flatten, plain
from pipelines.lib.comparison import words
from pipelines.lib.comparison.card import Row, data_of_run, evaluations_of, unusual_of
from pipelines.lib.comparison.collect import RunRecord, read_run
from pipelines.lib.comparison.paper import fenced, table
from pipelines.lib.config import InputError
from pipelines.lib.export.verify import Verified

LOSSES = {
    "val/nll": "validation loss, nats per token",
    "val/ppl": "validation perplexity",
    "val/bpb": "validation loss, bits per byte of text",
    "train/nll": "training loss, nats per token",
}
COSTS = {"flops": "training FLOP of the run", "seconds": "training time of the run", "energy_j": "energy of the run"}
PRIVATE = (
    "init_from",
    "name",
    "experiment",
    "tags",
    "track",
)  # settings that say something of the place, not the model


@dataclass(frozen=True)
class Subject:
    """What the card is about.

    name: as `from_pretrained` takes it.  spec: the family's.  run, step: where the weights are from; None: from no run.
    layout: own, or a class of transformers.  dtype: of the weights.  tokenizer: as saved, with its sha256.
    files: Python files in the folder, the model's own first.
    """

    name: str
    spec: Any
    run: Path | None
    step: int
    layout: str
    dtype: str
    tokenizer: Any
    tokenizer_sha256: str | None
    files: tuple[str, ...]
    verified: Verified


def model_card(subject: Subject) -> str:
    """README.md of the folder."""
    run = record(subject.run)
    parts = [
        front_matter(subject),
        f"# {subject.name}",
        opening(subject, run),
        "## Use",
        use(subject),
        "## Figures",
        table(("figure", ""), figures(subject, run)),
        *(["## Data", data(run)] if run else []),
        "## Tokenizer",
        tokenizer(subject),
        "## Architecture",
        table(("setting", "value"), [(k, v) for k, v in flatten(plain(subject.spec)).items() if v is not None]),
        *(["## Training", training(run)] if run else []),
        "## Check",
        f"When this folder was written it was {subject.verified}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def record(run: Path | None) -> RunRecord | None:
    """The run's record; None for what is no run, or one that cannot be read any more."""
    if run is None:
        return None
    try:
        return read_run(run)
    except InputError:
        return None


def front_matter(subject: Subject) -> str:
    tags = ["novella", *([] if subject.layout == "own" else [subject.layout])]
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def opening(subject: Subject, run: RunRecord | None) -> str:
    size = f"A causal language model of {subject.spec.n_parameters():,} parameters ({subject.dtype})"
    if run is None:
        return f"{size}. It comes from no training run of Novella, so nothing is told here of its training."
    source = run.config.get("init_from")
    began = f", which started from {Path(str(source)).name}" if source else ", trained from scratch"
    step = f"step {subject.step:,}" if subject.step else "a checkpoint"
    ended = "" if run.status == "complete" else f" The run is {run.status}: {run.note}." if run.note else ""
    return f"{size}, {step} of the run {run.name}{began}.{ended}"


def use(subject: Subject) -> str:
    flag = ", trust_remote_code=True" if subject.layout == "own" else ""
    code = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{subject.name}"{flag})',
    ]
    if subject.tokenizer is not None:
        code += [
            f'tokenizer = AutoTokenizer.from_pretrained("{subject.name}"{flag})',
            'inputs = tokenizer("The ", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    text = "```python\n" + "\n".join(code) + "\n```"
    if subject.layout == "own":
        text += (
            f"\n\nThe model's code lies in this folder ({len(subject.files)} Python files, the first to read is "
            f"{subject.files[0]}) and runs with `trust_remote_code=True`; it needs transformers and torch alone."
        )
    else:
        text += f"\n\nThe weights are in the layout of transformers' own class {subject.verified.model_class}."
    return text + f" It was made for contexts of up to {subject.spec.seq_len:,} tokens."


def figures(subject: Subject, run: RunRecord | None) -> list[tuple[str, str]]:
    """Parameters, and of a run the figures at the exported step."""
    rows = [("parameters", f"{subject.spec.n_parameters():,}")]
    if run is None:
        return rows
    at: dict[str, float] = {}
    for row in run.rows:
        if subject.step and row["step"] <= subject.step:
            at.update({k: v for k, v in row.items() if row["step"] == subject.step or not k.startswith("val/")})
    if "train/tokens" in at:
        rows.append(("tokens trained on", f"{int(at['train/tokens']):,}"))
    rows += [(name, words.figure(at[key])) for key, name in LOSSES.items() if key in at]
    rows += [(name, words.cost(key, run.cost[key])) for key, name in COSTS.items() if key in run.cost]
    for evaluation in evaluations_of(run):
        value, error, step, _ = evaluation.cells
        if step == f"step {subject.step}":
            said = f"{value} ± {error}" if error != words.MISSING else value
            rows.append((f"evaluation: {evaluation.name}", said))
    return rows


def data(run: RunRecord) -> str:
    named = [Row(Path(row.name).name, row.cells) for row in data_of_run(run)]
    return table(("tokens", "fingerprint", "holds"), [(row.name, *row.cells) for row in named])


def tokenizer(subject: Subject) -> str:
    if subject.tokenizer is None:
        return "None: the run was trained on ids without a tokenizer."
    special: Mapping[str, Any] = subject.tokenizer.special_tokens_map
    said = ", ".join(f"{role.removesuffix('_token')} `{token}`" for role, token in special.items())
    template = "It has a chat template. " if subject.tokenizer.chat_template else ""
    return (
        f"{len(subject.tokenizer):,} ids ({said or 'no special tokens'}). {template}"
        f"sha256 of tokenizer.json: `{subject.tokenizer_sha256}`."
    )


def training(run: RunRecord) -> str:
    rows = [
        row for row in unusual_of(run) if row.name.split(".")[0] not in PRIVATE and row.name.split(".")[0] != "model"
    ]
    versions = ", ".join(
        f"{k.removeprefix('version.')} {v}" for k, v in run.machine.items() if k.startswith("version.")
    )
    said = "Settings that are not at their default:\n\n" + table(
        ("setting", "value"), [(r.name, *r.cells) for r in rows]
    )
    return said + (f"\n\n{fenced(versions)}" if versions else "")
