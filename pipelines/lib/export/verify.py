"""Proof that an exported folder is the model: opened in a process of its own, it must give the same figures.

The stage runs it before a folder gets its name, so a folder that does not load is never left behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.lib.config import InputError
from pipelines.lib.export import alone

TOLERANCE = 1e-5  # of logits in float32, in units of the largest one where that is above 1
LONGEST, NEW = 32, 8  # tokens of the longest row, and tokens continued
TIMEOUT_S = 1800
OURS = ("models", "kernels", "pipelines", "serving")
CHAT = [{"role": "user", "content": "Who sat on the mat?"}]


@dataclass(frozen=True)
class Verified:
    """What was found.

    model_class: as transformers opened it.  difference: the largest one between logits, float32.  scale: the largest
    logit.  n_tensors: weights that are the same bit for bit.  rows: lengths of the rows that were continued as one
    left-padded batch.  versions: of what opened it.
    """

    model_class: str
    difference: float
    scale: float
    n_tensors: int
    rows: tuple[int, ...]
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return (
            f"opened by transformers {self.versions['transformers']} and torch {self.versions['torch']} alone: "
            f"{self.n_tensors} weights are equal bit for bit, logits within {self.difference:.1e} "
            f"(float32; the largest is {self.scale:.3g}), a left-padded batch continues as its rows do"
        )


def questions(vocab_size: int, context: int) -> list[list[int]]:
    """Three rows of tokens of different lengths, which with their continuations fit into the context."""
    longest = max(1, min(LONGEST, context - NEW))
    pick = torch.Generator().manual_seed(0)
    lengths = (longest, max(1, longest // 2), max(1, longest // 5))
    return [torch.randint(0, vocab_size, (n,), generator=pick).tolist() for n in lengths]


def verify(
    folder: Path,
    model: Any,
    weights: Mapping[str, str],
    *,
    code: bool,
    tokenizer: Any = None,
    hide: Sequence[str] = (),
    python: Sequence[str] = (sys.executable, "-I"),
) -> Verified:
    """Open `folder` in another process and compare it with `model`, which becomes float32 in place.

    weights: name -> `digest` of what was written, named as by the folder's class.  code: whether it brings its own.
    hide: packages that must not be found, beside ours.  python: the command of the other process.
    Raises InputError with what differs.
    """
    model = model.float().eval()
    context = int(getattr(model.config, "max_position_embeddings", LONGEST + NEW))
    vocab_size = model.get_input_embeddings().weight.shape[0]
    rows = questions(vocab_size if tokenizer is None else min(vocab_size, len(tokenizer)), context)
    new = max(1, min(NEW, context - max(map(len, rows))))
    text = text_of(tokenizer, rows[0])
    asked = {
        "rows": rows,
        "new": new,
        "code": code,
        "hide": sorted({*OURS, *hide}),
        "text": text,
        "chat": CHAT if getattr(tokenizer, "chat_template", None) else None,
        "threads": torch.get_num_threads(),
    }
    found, logits = ask(folder, asked, python)
    if found["imported"]:
        raise InputError(f"{folder.name}: it still imports {', '.join(found['imported'])}; it does not stand alone")
    if found["missing"]:
        raise InputError(f"{folder.name}: {found['missing'][0]} is missing from its weights or has another shape")
    n_tensors = same_weights(weights, found["weights"])
    with torch.no_grad():
        mine = [model(torch.tensor([row])).logits[0] for row in rows]
    theirs = torch.cat([logits[f"row_{i}"] for i in range(len(rows))])
    scale, difference = (float(x.abs().max()) for x in (torch.cat(mine), torch.cat(mine) - theirs))
    limit = TOLERANCE * max(1.0, scale)
    if not difference <= limit:
        raise InputError(f"{folder.name}: its logits differ by {difference:.2e}; at most {limit:.1e} is allowed")
    continued_alike(model, rows, found["generated"], 10 * limit)
    if text is not None:
        same_tokens(tokenizer, text, found)
    return Verified(found["class"], difference, scale, n_tensors, tuple(map(len, rows)), found["versions"])


def ask(folder: Path, asked: Mapping[str, Any], python: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Run `alone` on a folder. Raises InputError with the last line of its error."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
        secret = ("TOKEN", "SECRET", "PASSWORD", "KEY")
        environment = {
            **{k: v for k, v in os.environ.items() if not any(word in k.upper() for word in secret)},
            "HF_MODULES_CACHE": f"{place}/modules",  # the folder's code is copied there before it runs
            "HF_HUB_OFFLINE": "1",
        }
        words = [*python, alone.__file__, str(folder), f"{place}/asked.json", f"{place}/answers"]
        try:
            done = subprocess.run(
                words,
                cwd=place,
                env=environment,
                stdin=subprocess.DEVNULL,  # transformers would ask whether code may run, and wait
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"{folder.name}: did not open within {TIMEOUT_S} s") from None
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(" ")]
            raise InputError(f"{folder.name} does not open alone: {(said or ['it was killed'])[-1][:400]}")
        found = json.loads((Path(place) / "answers.json").read_text(encoding="utf-8"))
        return found, load_file(f"{place}/answers.safetensors")


def same_weights(weights: Mapping[str, str], found: Mapping[str, str]) -> int:
    """The number of tensors, all equal. Raises InputError that names one that is not."""
    for name, written in weights.items():
        if found.get(name) != written:
            raise InputError(f"{name} is not what was written")
    if extra := sorted(set(found) - set(weights)):
        raise InputError(f"{extra[0]} is not among the model's weights")
    return len(weights)


def continued_alike(
    model: Any, rows: Sequence[Sequence[int]], generated: Sequence[Sequence[int]], limit: float
) -> None:
    """Whether each token of a left-padded batch's greedy continuation is the likeliest one for its row alone.

    Seen through whole forward passes, so it also proves cached decoding. limit: how far below the largest logit a
    token may lie, since two may be equal but for rounding. Raises InputError.
    """
    for i, (row, more) in enumerate(zip(rows, generated, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([[*row, *more]])).logits[0, len(row) - 1 : -1]
        behind = logits.max(-1).values - logits.gather(1, torch.tensor(more)[:, None])[:, 0]
        if not float(behind.max()) <= limit:
            at = int(behind.argmax())
            raise InputError(f"row {i} of a left-padded batch continues otherwise than alone, at its token {at + 1}")


def text_of(tokenizer: Any, ids: Sequence[int]) -> str | None:
    """A text that the tokenizer can encode: what random tokens read as."""
    return None if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)


def same_tokens(tokenizer: Any, text: str, found: Mapping[str, Any]) -> None:
    """Whether the folder's tokenizer is the given one, on one text. Raises InputError."""
    ids = tokenizer(text, verbose=False)["input_ids"]  # it may be longer than the model's context
    if found["tokens"] != ids or found["decoded"] != tokenizer.decode(ids, skip_special_tokens=True):
        raise InputError("the folder's tokenizer gives other tokens than the model's")
    if "chat" in found:
        chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        if chat != found["chat"]:
            raise InputError("the folder's chat template gives another text than the one that was set")
