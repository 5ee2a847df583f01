"""Training steps of two checkouts of this project: tokens per second and peak memory of the same models.

    python -m benchmarks.before_after BEFORE [after=.] [rounds=3] [seconds=8] [threads=1] [only=CASE,...]
        [out=benchmarks/results/before_after]

BEFORE and after are folders that hold the project's code at two commits (`git worktree add FOLDER COMMIT`). Every case
is a fresh process in each folder in turn, `rounds` times; the figure is the median. A step is forward, backward and
AdamW over the same random tokens; the losses of the two must agree. Peak memory is the process's resident peak less
what it held before the model was made. Writes out.md and out.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PLAIN = {"kind": "gpt", "d_model": 128, "n_layers": 4, "seq_len": 64, "vocab_size": 65,
         "attention": {"kind": "causal", "n_heads": 4}, "position": "learned"}  # fmt: skip
MODERN = {"kind": "gpt", "d_model": 256, "n_layers": 4, "seq_len": 256, "vocab_size": 4096, "norm": "rmsnorm",
          "position": "rotary", "mlp": {"kind": "swiglu", "hidden": 704},
          "attention": {"kind": "causal", "n_heads": 4, "n_kv_heads": 2, "qk_norm": "rms"}}  # fmt: skip
WINDOW = {**MODERN, "seq_len": 1024, "attention": {**MODERN["attention"], "window": 256}}  # type: ignore[dict-item]
CASES: dict[str, dict[str, Any]] = {
    "characters (4 x 128, T 64, V 65)": {"model": PLAIN, "rows": 12},
    "modern (4 x 256, T 256, V 4,096)": {"model": MODERN, "rows": 8},
    "modern, bf16": {"model": MODERN, "rows": 8, "bf16": True},
    "modern, compiled": {"model": MODERN, "rows": 8, "compile": True},
    "modern, documents (mean 64 tokens)": {"model": MODERN, "rows": 8, "documents": 64},
    "modern, window 256 of T 1,024": {"model": WINDOW, "rows": 2},
    "modern, V 50,257": {"model": {**MODERN, "vocab_size": 50257}, "rows": 8},
    "modern, V 50,257, bf16": {"model": {**MODERN, "vocab_size": 50257}, "rows": 8, "bf16": True},
    "soft-cap 30, z-loss": {"model": {**MODERN, "logit_softcap": 30.0}, "rows": 8, "z_loss": 1e-4},
}

WORKER = """
import contextlib, json, sys, time
import torch
case = json.loads(sys.argv[1])
torch.set_num_threads(case["threads"])
from models.families import create
from models.gpt.config import GPT
from models.loss import Loss
from models.optim.groups import AdamW
from models.spec import build
def resident(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
torch.manual_seed(0)
tree = dict(case["model"])
tree.pop("kind")
spec = build(GPT, tree)
B, T = case["rows"], spec.seq_len
ids = torch.randint(spec.vocab_size, (B, T + 1))
doc = (torch.rand(B, T) < 1 / case["documents"]).cumsum(1) if case.get("documents") else None
pos = None
if doc is not None:
    step = torch.arange(T).expand(B, T)
    starts = torch.cat([torch.ones(B, 1, dtype=torch.bool), doc[:, 1:] != doc[:, :-1]], 1)
    pos = step - torch.where(starts, step, 0).cummax(1).values
small = {"d_model": 16, "n_layers": 1, "vocab_size": 8, "attention": {"kind": "causal", "n_heads": 2}}
create(build(GPT, small))  # imports what models need
before = resident("VmRSS")
model = create(spec).train()
loss = Loss(model, case.get("z_loss", 0.0))
run = torch.compile(loss, dynamic=False) if case.get("compile") else loss
optimizers = AdamW().build(model)
def update():
    with torch.autocast("cpu", torch.bfloat16) if case.get("bf16") else contextlib.nullcontext():
        value = run(ids[:, :-1], ids[:, 1:].contiguous(), pos, doc)[0]
    (value / (B * T)).backward()
    for o in optimizers.values():
        o.step()
        o.zero_grad(set_to_none=True)
    return value.item() / (B * T)
losses = [update() for _ in range(3)]
times, began = [], time.perf_counter()
while time.perf_counter() - began < case["seconds"] or len(times) < 3:
    t = time.perf_counter()
    update()
    times.append(time.perf_counter() - t)
times.sort()
peak = resident("VmHWM") - before
print(json.dumps({"tokens_per_s": B * T / times[len(times) // 2], "peak": peak, "losses": losses}))
"""


def measure(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """One process in one checkout."""
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(case["threads"]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WORKER, json.dumps(case)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def commit(folder: Path) -> str:
    answer = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return answer.stdout.strip() or "?"


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    given = dict(word.split("=", 1) for word in words if "=" in word)
    folders = {
        "before": Path(next(word for word in words if "=" not in word)).resolve(),
        "after": Path(given.get("after", ".")).resolve(),
    }
    rounds, only = int(given.get("rounds", 3)), given.get("only", "").split(",")
    extra = {"seconds": float(given.get("seconds", 8)), "threads": int(given.get("threads", 1))}
    commits = {name: commit(folder) for name, folder in folders.items()}
    lines = [
        f"# Training steps before and after: {commits['before']} and {commits['after']}",
        "",
        f"Command: `python -m benchmarks.before_after BEFORE rounds={rounds} seconds={extra['seconds']:g} "
        f"threads={extra['threads']}`. {time.strftime('%Y-%m-%d')}, {platform.machine()}. Forward, backward and AdamW "
        "on random tokens, a process of its own in each checkout in turn, median of the rounds.",
        "",
        "| case | tokens/s before | after | ratio | peak MiB before | after | ratio | losses differ by |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        if given.get("only") and not any(word in name for word in only):
            continue
        found: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
        for _ in range(rounds):
            for which, folder in folders.items():
                found[which].append(measure(folder, {**case, **extra}))
        results[name] = found
        speed = {w: statistics.median(r["tokens_per_s"] for r in rows) for w, rows in found.items()}
        peak = {w: statistics.median(r["peak"] for r in rows) for w, rows in found.items()}
        pairs = zip(found["before"][0]["losses"], found["after"][0]["losses"], strict=True)
        apart = max(abs(a - b) for a, b in pairs)
        lines.append(
            f"| {name} | {speed['before']:,.0f} | {speed['after']:,.0f} | {speed['after'] / speed['before']:.2f} | "
            f"{peak['before'] / 2**20:,.0f} | {peak['after'] / 2**20:,.0f} | {peak['after'] / peak['before']:.2f} | "
            f"{apart:.1e} |"
        )
        print(lines[-1], flush=True)
    out = Path(given.get("out", Path(__file__).parent / "results" / "before_after"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    out.with_suffix(".json").write_text(json.dumps({"commits": commits, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
