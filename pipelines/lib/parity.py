"""One model, four ways to its log-likelihoods: `python -m pipelines.evaluate parity RUN endpoint=... exported=...`.

in process   lm-eval on the model in memory, as `tasks=` measures: what the others are compared with
CORE         the scorer of `pipelines.evaluate core`
endpoint=    a server of the model, asked by lm-eval's `local-completions` (its key: OPENAI_API_KEY)
exported=    a folder that pipelines.export wrote, asked by lm-eval in a process where none of our code can be imported

python -m pipelines.evaluate parity runs/demo endpoint=http://127.0.0.1:8000 exported=exported/demo
python -m pipelines.evaluate parity runs/demo bundle=eval_bundle        (also on prompts of CORE)

Each way tokenizes the same texts itself and says for each the log-likelihood of its continuation in nats, and whether
it is the greedy one. Two agree when every log-likelihood differs by at most `tolerance` times the larger of 1 and
itself, and all greedy flags are equal. The ways here compute in float32; serve a model whose weights are of less with
dtype=float32. Exit code 1 where one does not agree. Measured on a CPU: at most 2e-7, where 1e-5 is the default.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from models.spec import ConfigError
from pipelines.lib.config import InputError

TIMEOUT_S = 1800
OURS = ("models", "kernels", "pipelines", "serving")
SENTENCES = (
    "The grey cat sat on the mat, and the dog, who had seen it all, lay down beside the door and slept.",
    "Once upon a time there was a little girl named Lily. She liked to play in the park with her friends.",
    "Question: Which of these is a fruit?\nA. stone\nB. apple\nC. river\nAnswer: B",
    "In 1969, three men flew to the Moon; two of them walked on it for 2 hours and 31 minutes.",
    "def add(a, b):\n    return a + b\n",
    "«Où est le chat?» — «Il dort.» 你好，世界! 🙂",
)


@dataclass(frozen=True)
class ParityConfig:
    """Compare the ways to a model's log-likelihoods.

    run: run folder, checkpoint folder or any local Hugging Face folder
    which: the checkpoint of a run: best, last or step_N
    endpoint: address of a server of the same model; null: not asked
    exported: folder of the same model as pipelines.export wrote it; null: not asked
    bundle: also ask prompts of CORE's task files, a folder; null: the built-in sentences only
    limit: items of each task of the bundle
    tolerance: of a log-likelihood in nats, times itself where that is larger than 1
    device: of the in-process model: auto, cpu, cuda, mps or xpu
    out: JSON file with every figure; null: none is written
    """

    run: str
    which: str = "best"
    endpoint: str | None = None
    exported: str | None = None
    bundle: str | None = None
    limit: int = 2
    tolerance: float = 1e-5
    device: str = "auto"
    out: str | None = None

    def __post_init__(self) -> None:
        if self.tolerance <= 0 or self.limit < 1:
            raise ConfigError("tolerance must be above 0, limit at least 1")
        if self.endpoint is not None and urlsplit(self.endpoint).scheme not in ("http", "https"):
            raise ConfigError(f"endpoint={self.endpoint}: an address is needed, as http://127.0.0.1:8000")


class Pair(NamedTuple):
    """A text whose second part is scored."""

    context: str
    continuation: str


class Answer(NamedTuple):
    """Of a pair: the continuation's log-likelihood in nats, and whether every token is the model's first choice."""

    loglikelihood: float
    greedy: bool


# ---- what is asked ---------------------------------------------------------------------------------------------------


def pairs_for(config: ParityConfig, encode: Any, longest: int) -> tuple[list[Pair], int]:
    """Pairs that fit into `longest` tokens, and how many did not. Characters without an id are left out.

    Of every sentence three beginnings are asked, which end at different places: where two pairs are the same text, only
    parted elsewhere, lm-eval 0.4.13 gives one the figures of the other (it keeps logits by text). Of a bundle's tasks
    the first items are asked, with examples.
    """
    found: list[Pair] = []
    for sentence in (_known(encode, s) for s in SENTENCES):
        n = len(sentence)
        ends = [(n // 4, n // 2), (n // 2, 3 * n // 4), (n - 3, n)]
        found += [Pair(sentence[:k], sentence[k:end]) for k, end in ends if k > 0]
    if config.bundle is not None:
        found += [pair for pair in _of_bundle(config) if _known(encode, "".join(pair)) == "".join(pair)]
    fit = [
        pair for pair in found if pair.context and pair.continuation.strip() and len(encode("".join(pair))) < longest
    ]
    if not fit:
        raise InputError(f"no text fits into {longest} tokens of this tokenizer, so nothing can be compared")
    return list(dict.fromkeys(fit)), len(found) - len(fit)


def _known(encode: Any, text: str) -> str:
    """The text without the characters that the tokenizer has no id for."""
    try:
        encode(text)
        return text
    except InputError:
        return "".join(c for c in text if _has_id(encode, c))


def _has_id(encode: Any, character: str) -> bool:
    try:
        encode(character)
        return True
    except InputError:
        return False


def _of_bundle(config: ParityConfig) -> Iterator[Pair]:
    from pipelines.lib.core.prompts import texts_of
    from pipelines.lib.core.tasks import open_bundle, read_items
    from pipelines.lib.jobs import storage_path

    for task in open_bundle(storage_path(str(config.bundle))):
        items = read_items(task)
        for i in range(min(config.limit, len(items))):
            texts = texts_of(task, items, i)
            if task.kind == "language_modeling":
                yield Pair(texts[0], texts[1][len(texts[0]) :])
            else:
                end = items[i]["choices"] if task.kind == "multiple_choice" else [items[i]["continuation"]] * len(texts)
                yield from (Pair(text.removesuffix(last), last) for text, last in zip(texts, end, strict=True))


# ---- who is asked ----------------------------------------------------------------------------------------------------


def instances(pairs: Sequence[Pair]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)]


def by_core(harness: Any, pairs: Sequence[Pair], context: int) -> list[Answer]:
    """CORE's scorer, on the tokens that lm-eval makes of each pair."""
    from pipelines.lib.core.prompts import Span
    from pipelines.lib.core.scorer import score_spans

    encoded = [harness._encode_pair(*pair) for pair in pairs]
    spans = [Span(np.array([*before, *after]), len(before)) for before, after in encoded]
    return [Answer(s.loglikelihood, s.greedy) for s in score_spans(harness.model, spans, context)]


def by_endpoint(address: str, folder: Path, pairs: Sequence[Pair], context: int, adds_bos: bool) -> list[Answer]:
    """lm-eval's local-completions. Raises InputError for a server that does not answer."""
    import requests
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    base = address.rstrip("/").removesuffix("/v1")
    key = os.environ.get("OPENAI_API_KEY", "")
    try:
        listed = requests.get(f"{base}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=30)
        listed.raise_for_status()
        name = listed.json()["data"][0]["id"]
    except (requests.RequestException, ValueError, LookupError, TypeError) as error:
        said = str(error).splitlines()[0]
        raise InputError(
            f"endpoint={address}: no model is served there ({said}); start one with serve run serving.app:build run=..."
        ) from None
    api = LocalCompletionsAPI(
        base_url=f"{base}/v1/completions",
        model=name,
        tokenizer_backend="huggingface",
        tokenizer=str(folder),
        batch_size=4,
        max_length=context,
        add_bos_token=adds_bos,
    )
    try:
        return [Answer(*answer) for answer in api.loglikelihood(instances(pairs), disable_tqdm=True)]
    except Exception as error:  # requests, tenacity and lm-eval's own assertions
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"endpoint={address}: it could not be asked ({type(error).__name__}: {said})") from None


def by_export(folder: Path, pairs: Sequence[Pair], context: int, adds_bos: bool, python: Sequence[str]) -> list[Answer]:
    """lm-eval on an exported folder, in a process that has our packages hidden. Raises InputError with what it said.

    python: the command of that process.
    """
    from pipelines.lib import parity_alone

    if not (folder / "config.json").is_file():
        raise InputError(f"exported={folder}: no config.json; write one with python -m pipelines.export RUN {folder}")
    with tempfile.TemporaryDirectory() as made:
        asked = {"folder": str(folder.resolve()), "pairs": pairs, "context": context, "hide": OURS, "bos": adds_bos}
        (Path(made) / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
        call = [*python, parity_alone.__file__, str(Path(made) / "asked.json"), str(Path(made) / "answers.json")]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(call, cwd=made, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no word"]
            said = next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])
            raise InputError(f"exported={folder}: it cannot be opened without our code: {said}")
        return [Answer(*row) for row in json.loads((Path(made) / "answers.json").read_text(encoding="utf-8"))]


# ---- the comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """One way beside the in-process one. worst: the largest difference in units of max(1, |nats|); at: of which pair.

    flags: pairs whose greedy flag differs.
    """

    name: str
    worst: float
    at: int
    flags: int
    agrees: bool


def compare(name: str, ours: Sequence[Answer], theirs: Sequence[Answer], tolerance: float) -> Compared:
    a, b = (np.array([answer.loglikelihood for answer in side]) for side in (ours, theirs))
    difference = np.abs(a - b) / np.maximum(1, np.abs(a))
    difference[~np.isfinite(difference)] = np.inf
    flags = sum(x.greedy != y.greedy for x, y in zip(ours, theirs, strict=True))
    worst = float(difference.max())
    return Compared(name, worst, int(difference.argmax()), flags, worst <= tolerance and not flags)


def run_parity(config: ParityConfig, python: Sequence[str] = (sys.executable, "-I")) -> int:
    """Ask all ways, show a table. Returns 1 if one does not agree with the in-process model."""
    from pipelines.lib.harness import Harness, quiet
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.output import check_writable
    from pipelines.lib.results import Measuring, context_of, open_model, open_subject
    from pipelines.lib.shards import write_json
    from pipelines.lib.texts import open_tokenizer

    out = storage_path(config.out) if config.out is not None else None
    if out is not None:
        check_writable(out, f"out={config.out}")
    settings = Measuring(config.run, config.which, config.device, "float32")
    subject = open_subject(settings)
    model = open_model(subject, settings)
    context = context_of(model, None)
    with quiet():
        harness = Harness(model, open_tokenizer(subject.folder), context, batch_size=4)
        pairs, left_out = pairs_for(config, harness.tok_encode, context)
        text = pairs[0].context
        adds_bos = harness.tok_encode(text) != harness.tok_encode(text, add_special_tokens=False)
        ways = {"in process": [Answer(*a) for a in harness.loglikelihood(instances(pairs), disable_tqdm=True)]}
        ways["CORE"] = by_core(harness, pairs, context)
        if config.endpoint is not None:
            ways["endpoint"] = by_endpoint(config.endpoint, subject.folder, pairs, context, adds_bos)
        if config.exported is not None:
            ways["exported"] = by_export(storage_path(config.exported), pairs, context, adds_bos, python)
    ours = ways["in process"]
    rows = [compare(name, ours, theirs, config.tolerance) for name, theirs in ways.items() if theirs is not ours]
    show(config, rows, ours, pairs, left_out)
    if out is not None:
        answers = {name: [tuple(answer) for answer in several] for name, several in ways.items()}
        tree = {"tolerance": config.tolerance, "weights": subject.weights, "pairs": pairs, "answers": answers}
        write_json(out, {**tree, "compared": [vars(row) for row in rows]})
        print(f"wrote {out}")
    return 0 if all(row.agrees for row in rows) else 1


def show(
    config: ParityConfig, rows: Sequence[Compared], ours: Sequence[Answer], pairs: Sequence[Pair], left_out: int
) -> None:
    from rich import box
    from rich.table import Table

    from pipelines.lib.terminal import print_table

    table = Table(box=box.SIMPLE)
    for column in ("beside the model in process", "largest difference", "greedy flags that differ", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(row.name, f"{row.worst:.1e}", str(row.flags), "agrees" if row.agrees else "DIFFERS")
    print_table(table)
    greedy, total = sum(answer.greedy for answer in ours), -sum(answer.loglikelihood for answer in ours)
    print(f"{len(pairs)} texts, {total:,.1f} nats, {greedy} continuations greedy; tolerance {config.tolerance:g}")
    if left_out:
        print(f"{left_out} texts are longer than the context, or empty for this tokenizer, and were not asked")
    for row in rows:
        if not row.agrees:
            print(f"{row.name} differs most on {pairs[row.at].context[-40:]!r} + {pairs[row.at].continuation[:40]!r}")
    for name in ("endpoint", "exported"):
        if getattr(config, name) is None:
            print(f"not asked: {name}=")
