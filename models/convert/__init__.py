"""Weights from and to public layouts.

`read(folder)` opens a folder of one of LAYOUTS as our model, `write(model, folder, layout)` writes one of ours as such
a folder; code.py writes a folder that keeps every part. Local folders only; nothing from a folder is run.
"""

from __future__ import annotations

from pathlib import Path

from models.convert import gpt2, llama
from models.convert.common import Layout
from models.families import load
from models.gpt.model import GPTForCausalLM
from models.spec import ConfigError, near

LAYOUTS: dict[str, Layout] = {**gpt2.LAYOUTS, **llama.LAYOUTS}


def read(folder: str | Path) -> GPTForCausalLM:
    """A local Hugging Face folder in one of LAYOUTS as our model.

    Raises ConfigError for another layout, and for weights that are not all there.
    """
    model = load(folder)
    kind = model.config.model_type
    if kind not in LAYOUTS:
        raise ConfigError(f"{folder} is a {kind!r} model{near(kind, LAYOUTS)}")
    return LAYOUTS[kind].from_layout(model)


def write(model: GPTForCausalLM, folder: str | Path, layout: str) -> None:
    """Writes our model as a folder that transformers opens without our code. Raises ConfigError if it cannot be."""
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} does not exist{near(layout, LAYOUTS)}")
    LAYOUTS[layout].to_layout(model).save_pretrained(folder)
