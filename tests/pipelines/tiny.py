"""Tiny token folders and training configs that the training tests share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.lib.shards import write_manifest, write_shard

WORDS = "the model reads a token and predicts another one while we wait for its loss to fall under two".split()


def make_tokens(folder: Path, n_documents: int = 60, seed: int = 0, vocab_size: int = 128) -> Path:
    """A folder of byte-valued tokens: sentences of random words, one document each, id 0 between them."""
    folder.mkdir(parents=True, exist_ok=True)
    pick = random.Random(seed)
    splits = {}
    for split, count in (("train", n_documents), ("val", max(2, n_documents // 10))):
        documents = []
        for _ in range(count):
            text = " ".join(pick.choice(WORDS) for _ in range(pick.randint(5, 60)))
            documents.append(np.frombuffer(text.encode() + b"\0", np.uint8).astype(np.uint16))
        half = max(1, len(documents) // 2)
        shards = []
        for i, part in enumerate((documents[:half], documents[half:])):
            tokens = np.concatenate(part)
            offsets = np.cumsum([0, *(len(d) for d in part)])
            entry = write_shard(folder / f"{split}-{i:05d}.arrow", tokens, offsets, len(tokens) - len(part))
            shards.append(entry)
        splits[split] = {"shards": shards}
    write_manifest(
        folder,
        {
            "dtype": "uint16",
            "eot_id": 0,
            "tokenizer": {"sha256": "none", "vocab_size": vocab_size, "kind": "bytes"},
            "source": {"kind": "test"},
            "splits": splits,
        },
    )
    return folder


def tiny_config(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A plain TrainConfig of a two-layer model that takes milliseconds a step, laid under `changes`."""
    from pipelines.lib.config import overlay

    tree = {
        "data": str(data),
        "out": str(out),
        "model": {
            "kind": "gpt",
            "vocab_size": 128,
            "d_model": 32,
            "n_layers": 2,
            "seq_len": 32,
            "attention": {"kind": "causal", "n_heads": 2},
            "norm": "rmsnorm",
            "position": "rotary",
        },
        "optim": {"kind": "adamw", "lr": 3e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 5},
        "batch_tokens": 32 * 12,
        "micro_batch": 4,
        "steps": 20,
        "eval_every": 10,
        "log_every": 1,
        "num_workers": 0,
        "sample_prompts": [],
        "track": "none",
        "threads": 1,
        "device": "cpu",
    }
    return overlay(tree, changes)
