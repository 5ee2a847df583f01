"""What an export costs and how equal it is: pipelines.export on models of several sizes, layouts and number formats.

    python -m benchmarks.export [out=benchmarks/results]

Each row writes a model (random weights, except for the trained stories260K under $NOVELLA_DATA) as pipelines.export
does, which opens the folder in a process that has transformers and torch only and compares. The logits' difference is
in float32, beside the largest logit; the time is the whole command's in this process, with the check's process in it.
There is no public peer; the floor is a copy of the weights file, timed in the same run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from models.convert import llama2c
from models.families import create, preset
from models.parts.attention import Causal
from models.parts.qk_norm import RMSQKNorm
from pipelines.export import main as export


def rows() -> Iterator[tuple[str, Callable[[], Any], str, str]]:
    """Name, how the model is made, layout, number format."""
    stories = Path(os.environ.get("NOVELLA_DATA", "")) / "stories260K" / "stories260K.bin"
    if stories.is_file():
        for layout, dtype in (("own", "float32"), ("own", "bfloat16"), ("llama", "float32")):
            yield "stories260K, trained", partial(llama2c.load, stories), layout, dtype
    normed = Causal(n_heads=4, n_kv_heads=2, qk_norm=RMSQKNorm(eps=1e-5))
    public: tuple[tuple[str, Any, str, str], ...] = (
        ("hypersphere_tiny", preset("hypersphere_tiny"), "own", "float32"),
        ("tiny with QK-norm", dataclasses.replace(cast(Any, preset("tiny")), attention=normed), "qwen3", "float32"),
        ("gpt2_124m", preset("gpt2_124m"), "gpt2", "float32"),
        ("smollm2_135m", preset("smollm2_135m"), "llama", "bfloat16"),
        ("hypersphere_124m", preset("hypersphere_124m"), "own", "float32"),
        ("hypersphere_124m", preset("hypersphere_124m"), "own", "bfloat16"),
    )
    for name, spec, layout, dtype in public:
        yield name, partial(create, dataclasses.replace(spec, vocab_size=spec.vocab_size or 4096)), layout, dtype


def measure(make: Callable[[], Any], layout: str, dtype: str, place: Path) -> dict[str, Any]:
    """One export, its sizes and its check. Raises RuntimeError if it was refused."""
    torch.manual_seed(0)
    make().save_pretrained(place / "source")
    began = time.perf_counter()
    code = export([str(place / "source"), str(place / "out"), f"layout={layout}", f"dtype={dtype}", "track=none"])
    seconds = time.perf_counter() - began
    if code:
        raise RuntimeError(f"the export ended with {code}")
    record = json.loads((place / "out/export.json").read_text(encoding="utf-8"))
    began = time.perf_counter()
    shutil.copyfile(place / "out/model.safetensors", place / "copy")
    size = sum(path.stat().st_size for path in (place / "out").iterdir())
    return {
        **record["check"],
        "seconds": seconds,
        "copy_s": time.perf_counter() - began,
        "mib": size / 2**20,
        "files": len(list((place / "out").glob("*.py"))),
    }


def main(words: list[str]) -> int:
    out = Path(dict(word.split("=", 1) for word in words).get("out", "benchmarks/results"))
    head = ["model", "layout", "format", "parameters", "folder, MiB", "code files", "weights equal"]
    head += ["logits apart", "largest logit", "seconds", "copy of the weights, s"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * 3 + ['---:'] * (len(head) - 3))} |"]
    versions: dict[str, str] = {}
    for name, make, layout, dtype in rows():
        with tempfile.TemporaryDirectory() as place:
            row, parameters = measure(make, layout, dtype, Path(place)), make().num_parameters()
        versions = row["versions"]
        cells = [name, layout, dtype, f"{parameters:,}", f"{row['mib']:.1f}", str(row["files"]), str(row["n_tensors"])]
        cells += [f"{row['difference']:.1e}", f"{row['scale']:.3g}", f"{row['seconds']:.1f}", f"{row['copy_s']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    title = (
        f"# Exports, opened by transformers and torch alone\n\nCommand: `python -m benchmarks.export`. "
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads, {said}, "
        f"load average {os.getloadavg()[0]:.1f} at the end.\n"
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "export_check.md").write_text("\n".join([title, *lines]) + "\n", encoding="utf-8")
    print(f"wrote {out / 'export_check.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
