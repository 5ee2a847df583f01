"""A small bundle of CORE's layout, with every kind of task, and tiny models that can be asked."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from models.families import create
from models.gpt.config import GPT
from models.parts.attention import Causal
from models.parts.norm import RMSNorm
from models.parts.position import Rotary
from pipelines.lib.vocab import Bytes

CONTEXT = 96
WORDS = "cat dog sat ran mat hat red blue é".split()
CHANCE = {"letters": 25, "stories": 50, "who": 50, "next": 0, "next_again": 0}


def write_bundle(folder: Path, n_items: int = 20) -> Path:
    """`letters`: one-letter choices; `stories`: choices of several lengths; `who`: schema; `next`: two of one file."""
    pick = random.Random(0)
    say = lambda n: " ".join(pick.choice(WORDS) for _ in range(n))
    rows = {
        "letters": [
            {"query": f"Q: {say(4)}?\nA. {say(1)}\nB. {say(1)}\nAnswer:", "choices": ["A", "B", "C"], "gold": i % 3}
            for i in range(n_items)
        ],
        "stories": [
            {"query": f"{say(3)} ", "choices": [say(1 + i % 3), say(4)], "gold": i % 2} for i in range(n_items)
        ],
        "who": [
            {"context_options": [f"{say(2)} so Ann", f"{say(3)} so Bo"], "continuation": say(2), "gold": i % 2}
            for i in range(n_items)
        ],
        "next": [{"context": f" {say(3 + 9 * (i == 1))} ", "continuation": pick.choice("abé")} for i in range(n_items)],
    }
    tasks = [
        ("letters", "a/letters.jsonl", 2, "multiple_choice", "continuation_delimiter: ' '"),
        ("stories", "a/stories.jsonl", 0, "multiple_choice", 'continuation_delimiter: "\\nAnswer: "'),
        ("who", "b/who.jsonl", 0, "schema", ""),
        ("next", "b/next.jsonl", 0, "language_modeling", ""),
        ("next_again", "b/next.jsonl", 1, "language_modeling", "has_categories: true"),
    ]
    for name, items in rows.items():
        path = folder / "eval_data" / next(uri for label, uri, *_ in tasks if label == name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    entries = [
        f"-\n  label: {label}\n  dataset_uri: {uri}\n  num_fewshot: [{shots}]\n  icl_task_type: {kind}\n  {more}\n"
        for label, uri, shots, kind, more in tasks
    ]
    (folder / "core.yaml").write_text("icl_tasks:\n" + "".join(entries))
    lines = ["Eval Task,Task Category,Random baseline", *(f"{k},x,{v}" for k, v in CHANCE.items())]
    (folder / "eval_meta_data.csv").write_text("\n".join(lines) + "\n")
    return folder


def save_model(folder: Path, context: int = CONTEXT) -> Path:
    """A random model of ours with the bytes tokenizer; large weights make its guesses differ."""
    torch.manual_seed(0)
    spec = GPT(
        vocab_size=257,
        d_model=32,
        n_layers=2,
        seq_len=context,
        attention=Causal(n_heads=4),
        norm=RMSNorm(),
        position=Rotary(),
        init_std=0.3,
    )
    create(spec).save_pretrained(folder)
    Bytes().make(lambda: ()).save_pretrained(folder)
    return folder


def save_llama(folder: Path, context: int = CONTEXT) -> Path:
    """The same for an unmodified model of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=257, max_position_embeddings=context, initializer_range=0.3, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    Bytes().make(lambda: ()).save_pretrained(folder)
    return folder
