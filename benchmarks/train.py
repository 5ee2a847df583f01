"""Training on Tiny Shakespeare, character level, at nanoGPT's published CPU setting, beside a plain eager loop.

    python -m benchmarks.train [seeds=3] [updates=2000] [out=benchmarks/results]

Rows: the peer (the same model and optimizer written straightforwardly below, the default settings of PyTorch), our loop
with the same recipe in float32, with bf16 autocast, with that compiled too, and our best recipe at the same number of
tokens. Peer and ours take turns, seed by seed, so that they see the same minutes of the machine. Losses are
nats per character over the whole validation split; the floor is the matrix work over the product rate measured here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from models.families import create
from models.spec import build
from pipelines.lib.config import InputError, overlay, recipe
from pipelines.lib.loop import train
from pipelines.lib.measure import peak_flops
from pipelines.lib.shards import TokenFolder
from pipelines.lib.training import TrainConfig

TITLE, SHA256 = "Tiny Shakespeare", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
EXACT = "shakespeare_char"
ROWS: dict[str, dict[str, Any] | None] = {  # our rows as changes of the recipe; None is the peer
    "peer: plain eager loop": None,
    "ours, float32 eager": {},
    "ours, bf16 autocast": {"precision": "bf16"},
    "ours, bf16 compiled": {"compile": True, "precision": "bf16"},
    "ours, best recipe, bf16": {"recipe": "shakespeare_char_best", "precision": "bf16"},
}


def text() -> str:
    root = Path(os.environ.get("NOVELLA_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    path = root / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        raise InputError(f"{TITLE} is not there ({path}); set NOVELLA_DATA to the folder that holds it")
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise InputError(f"{path}: expected sha256 {SHA256[:16]}, found {found[:16]}")
    return data.decode()


def tokens(folder: Path) -> Path:
    """Character tokens in nanoGPT's own layout: the alphabet sorted, the first 90 % to train on."""
    whole = text()
    alphabet = sorted(set(whole))
    ids = np.array([alphabet.index(c) for c in alphabet], np.uint16)
    table = dict(zip(alphabet, ids.tolist(), strict=True))
    stream = np.array([table[c] for c in whole], np.uint16)
    cut = int(len(stream) * 0.9)
    folder.mkdir(parents=True)
    stream[:cut].tofile(folder / "train.bin")
    stream[cut:].tofile(folder / "val.bin")
    import pickle

    meta = {"vocab_size": len(alphabet), "stoi": table, "itos": {v: k for k, v in table.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


# ---- the peer: one file of plain PyTorch


class PeerBlock(nn.Module):
    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.c_attn, self.attn_proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.c_fc, self.mlp_proj = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class Peer(nn.Module):
    def __init__(self, vocab: int, d: int = 128, layers: int = 4, heads: int = 4, block: int = 64):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(block, d)
        self.blocks = nn.ModuleList(PeerBlock(d, heads) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(d, bias=False), nn.Linear(d, vocab, bias=False)
        self.head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if name.endswith("proj.weight") else 0.02)

    def forward(self, ids, targets):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def run_peer(folder: Path, seed: int, updates: int) -> dict[str, float]:
    torch.manual_seed(seed)
    stream = {s: np.fromfile(folder / f"{s}.bin", np.uint16).astype(np.int64) for s in ("train", "val")}
    model = Peer(65)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    T, B, warm = 64, 12, 100
    began = time.perf_counter()
    for step in range(updates):
        share = (step - warm) / max(1, updates - 1 - warm)
        lr = 1e-3 * ((step + 1) / warm if step < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        at = torch.randint(len(stream["train"]) - T, (B,))
        x = torch.stack([torch.from_numpy(stream["train"][i : i + T]) for i in at])
        y = torch.stack([torch.from_numpy(stream["train"][i + 1 : i + 1 + T]) for i in at])
        loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    val, total, count = torch.from_numpy(stream["val"]), 0.0, 0
    with torch.no_grad():
        for i in range(0, len(val) - 1, T):
            piece = val[i : i + T + 1]
            total += float(model(piece[None, :-1], piece[None, 1:])) * (len(piece) - 1)
            count += len(piece) - 1
    return {"val": total / count, "seconds": seconds, "tokens_per_s": updates * B * T / seconds}


# ---- ours


def run_ours(folder: Path, out: Path, seed: int, updates: int, changes: dict[str, Any]) -> dict[str, float]:
    changes = dict(changes)
    tree = recipe(changes.pop("recipe", EXACT))
    own = {
        "data": str(folder), "out": str(out), "seed": seed, "steps": updates, "num_workers": 0, "track": "none",
        "device": "cpu", "eval_every": updates, "log_every": 50, "sample_prompts": [], "model": {"vocab_size": 65},
    }  # fmt: skip
    config = overlay(overlay(tree, own), changes)
    model = build(TrainConfig, config).model
    assert model.vocab == TokenFolder.open(folder).vocab_size
    began = time.perf_counter()
    outcome = train({"config": config, "run": str(out)})
    wall = time.perf_counter() - began
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # Steps without validation and saving; the first windows hold compilation and caches, so the middle one counts.
    rate = statistics.median(line["train/tokens_per_s"] for line in lines[2:-1])
    return {"val": outcome.metrics["val/nll"], "seconds": wall, "tokens_per_s": rate, "n": model.n_parameters()}


def main(argv: list[str] | None = None) -> None:
    options = dict(word.split("=", 1) for word in (sys.argv[1:] if argv is None else argv))
    seeds, updates = int(options.get("seeds", 3)), int(options.get("updates", 2000))
    results = Path(options.get("out", Path(__file__).parent / "results"))
    chosen = [name for name in ROWS if options.get("only", "") in name]
    work = Path(tempfile.mkdtemp(prefix="novella-bench-"))
    try:
        folder = tokens(work / "tokens")
        found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        for seed in range(seeds):
            for name in chosen:
                changes = ROWS[name]
                if changes is None:
                    row = run_peer(folder, seed, updates)
                else:
                    row = run_ours(folder, work / f"{name}-{seed}".replace(" ", "_"), seed, updates, changes)
                found[name].append(row)
                print(f"seed {seed}  {name:26} val {row['val']:.4f}  {row['tokens_per_s']:,.0f} tokens/s", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(found, updates, results)


def report(found: dict[str, list[dict[str, float]]], updates: int, results: Path) -> None:
    peak = peak_flops(torch.device("cpu"), "fp32")
    spec = build(TrainConfig, overlay(recipe(EXACT), {"data": "-", "out": "-", "model": {"vocab_size": 65}})).model
    torch.manual_seed(0)
    flops = create(spec).flops_per_token(64)
    floor = peak.flops / flops
    base = statistics.mean(r["tokens_per_s"] for r in found[next(iter(found))])
    lines = [
        f"# Training, {TITLE}, characters, {updates} updates of 768 tokens",
        "",
        f"Command: `python -m benchmarks.train seeds={len(next(iter(found.values())))} updates={updates}`. "
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}. "
        f"Data: {TITLE}, sha256 {SHA256[:16]}. nanoGPT publishes 1.88 for this setting (20 random batches).",
        f"Floor: {flops / 1e6:.2f} MFLOP a token over {peak.flops / 1e9:.0f} GFLOP/s of float32 products measured here "
        f"= {floor:,.0f} tokens/s.",
        "",
        "| row | validation, nats per character (standard error over seeds) | tokens/s | of the peer | of the floor |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, rows in found.items():
        vals = [r["val"] for r in rows]
        error = statistics.stdev(vals) / math.sqrt(len(vals)) if len(vals) > 1 else float("nan")
        rate = statistics.mean(r["tokens_per_s"] for r in rows)
        shares = f"{rate / base:.2f} | {rate / floor:.3f}"
        lines.append(f"| {name} | {statistics.mean(vals):.4f} ({error:.4f}) | {rate:,.0f} | {shares} |")
    results.mkdir(parents=True, exist_ok=True)
    (results / "train_shakespeare.md").write_text("\n".join(lines) + "\n")
    (results / "train_shakespeare.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
