"""Weights from and to public layouts.

`read(folder)` opens a GPT-2 or Llama folder as our model, `write(model, folder, layout)` writes one of ours as such a
folder. Local folders only; nothing from a folder is run.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from transformers import AutoModelForCausalLM

from models.convert import gpt2, llama
from models.gpt.model import GPTForCausalLM
from models.spec import ConfigError, near

LAYOUTS: dict[str, ModuleType] = {"gpt2": gpt2, "llama": llama}


def read(folder: str | Path) -> GPTForCausalLM:
    """A local Hugging Face folder in one of LAYOUTS as our model. Raises ConfigError for another layout."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    kind = model.config.model_type
    if kind not in LAYOUTS:
        raise ConfigError(f"{folder} is a {kind!r} model{near(kind, LAYOUTS)}")
    return LAYOUTS[kind].from_layout(model)


def write(model: GPTForCausalLM, folder: str | Path, layout: str) -> None:
    """Writes our model as a folder that transformers opens without our code. Raises ConfigError if it cannot be."""
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} does not exist{near(layout, LAYOUTS)}")
    LAYOUTS[layout].to_layout(model).save_pretrained(folder)
