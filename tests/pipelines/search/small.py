"""A search over tiny training runs: a few milliseconds per update, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.pipelines.tiny import make_tokens, tiny_config

OWN = ("data", "out", "num_workers", "track", "sample_prompts")  # a search sets these itself


def recipe_file(folder: Path) -> Path:
    """A training recipe of the tiny model."""
    tree = {k: v for k, v in tiny_config(folder, folder).items() if k not in OWN}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def search_words(folder: Path, **changes: Any) -> list[str]:
    """Command-line words of a search over two norms and two learning rates, without Ray and MLflow."""
    data = folder / "data"
    if not data.is_dir():
        make_tokens(data)
        recipe_file(folder)
    tree = {
        "recipe": str(folder / "small.yaml"),
        "fixed": {"steps": 6, "eval_every": 3},
        "vary": {"model.norm": ["rmsnorm", "layernorm"], "optim.lr": [0.001, 0.01]},
        "rule": "sweep",
        "objective": {"metric": "val/nll"},
        "track": "none",
        "parallel": 0,
        **changes,
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return [str(path), f"data={data}", f"out={folder / 'out'}"]
