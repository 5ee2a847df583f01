"""Greedy decoding through our memory beside transformers' own, with the same weights and the same tokens out.

    python -m benchmarks.decode [shape=smollm2_135m] [new=64] [out=benchmarks/results]

Peer: LlamaForCausalLM with its DynamicCache, from our weights by models.convert; ours and peer take turns. The floor is
the bytes of the weights, read once per step, over the memory rate measured in the same run. One thread on a CPU.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from models.convert import llama
from models.families import create, preset


def memory_rate() -> float:
    """Bytes per second of reading a large float32 matrix once, as a matrix-vector product does."""
    w, x = torch.randn(8192, 8192), torch.randn(8192)
    return w.numel() * 4 / best(lambda: w @ x, 10)


def best(f: Callable[[], object], times: int) -> float:
    """Shortest time of f in seconds."""
    out = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        f()
        out = min(out, time.perf_counter() - start)
    return out


@torch.no_grad()
def run(shape: str = "smollm2_135m", new: int = 64, out: str = "benchmarks/results") -> list[dict]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours = create(preset(shape)).eval()
    theirs = llama.to_layout(ours)
    weights = sum(p.numel() * p.element_size() for p in ours.parameters())
    rate, rows = memory_rate(), []
    for batch, prompt in ((1, 32), (1, 512), (8, 32)):
        ids = torch.randint(0, preset(shape).vocab, (batch, prompt))
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        times: dict[str, float] = {"ours": float("inf"), "transformers": float("inf")}
        tokens = {}
        for _ in range(3):
            for name, model in (("ours", ours), ("transformers", theirs)):
                start = time.perf_counter()
                tokens[name] = model.generate(ids, **options)
                times[name] = min(times[name], time.perf_counter() - start)
        row = {
            "work": f"{shape}, batch {batch}, prompt {prompt}, {new} new tokens, float32, 1 thread",
            "ours_s": round(times["ours"], 3),
            "transformers_s": round(times["transformers"], 3),
            "floor_s": round(new * weights / rate, 3),
            "ratio_to_peer": round(times["transformers"] / times["ours"], 3),
            "same_tokens": bool(torch.equal(tokens["ours"], tokens["transformers"])),
        }
        print(row, flush=True)
        rows.append(row)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.decode shape={shape} new={new}",
        "machine": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "decode_cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    given = dict(arg.split("=", 1) for arg in sys.argv[1:])
    run(given.get("shape", "smollm2_135m"), int(given.get("new", 64)), given.get("out", "benchmarks/results"))
