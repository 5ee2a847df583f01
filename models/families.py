"""All model families: the registry, and how a model is made or opened."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from models.gpt.config import GPT, GPTConfig
from models.gpt.model import GPTForCausalLM
from models.gpt.presets import PRESETS
from models.lm import LM, Family, FamilyConfig
from models.spec import ConfigError, near

Family.kinds = {"gpt": GPT}

MODELS: dict[type[Family], tuple[type[FamilyConfig], type[LM]]] = {
    GPT: (GPTConfig, GPTForCausalLM)
}  # family -> its config and model

for _config, _model in MODELS.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)


def preset(name: str) -> Family:
    """A known shape by name (`gpt2_124m`). Raises ConfigError that names the nearest one."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} does not exist{near(name, PRESETS)}")
    return PRESETS[name]()


def create(spec: Family) -> LM:
    """A new model. Its weights come from PyTorch's generator: call under `torch.manual_seed`.

    Raises ConfigError when vocab_size is not known yet.
    """
    assert spec.vocab  # raises for None
    config_class, model_class = MODELS[type(spec)]
    return model_class(config_class.of(spec))


def load(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model from a local Hugging Face folder, ours or any causal one of transformers, in eval mode.

    dtype: None: as saved.  No code from the folder is run. Raises FileNotFoundError for what is no such folder.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json; a Hugging Face model folder is needed")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True)
    return model.eval()
