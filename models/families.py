"""All model families: the registry, and how a model is made or opened.

Importing this file loads configs only; the models themselves (5 s of transformers) come with the first create or load.
A family or part of your own lives in a module of yours that calls `register` (or adds to a part's `kinds`); name it in
the environment, NOVELLA_IMPORTS=my.module[,...], and every stage, worker and endpoint knows it.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from models.family import Family, FamilyConfig
from models.gpt.config import GPT, GPTConfig
from models.gpt.presets import PRESETS
from models.spec import ConfigError, near

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from models.lm import LM

IMPORTS = "NOVELLA_IMPORTS"
Family.kinds = {}
CONFIGS: dict[type[Family], type[FamilyConfig]] = {}
_MODELS: dict[type[Family], Callable[[], type[LM]]] = {}


def register(name: str, family: type[Family], config: type[FamilyConfig], model: Callable[[], type[LM]]) -> None:
    """Make a family known under a name. model: returns its class; called when the first model is made or loaded."""
    Family.kinds[name] = family
    CONFIGS[family], _MODELS[family] = config, model
    AutoConfig.register(config.model_type, config, exist_ok=True)
    classes.cache_clear()


@functools.cache
def classes() -> dict[type[Family], tuple[type[FamilyConfig], type[LM]]]:
    """family -> its config and model class. Registers the models with AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM

    table = {family: (CONFIGS[family], model()) for family, model in _MODELS.items()}
    for config, model_class in table.values():
        AutoModelForCausalLM.register(config, model_class, exist_ok=True)
    return table


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
    config_class, model_class = classes()[type(spec)]
    return model_class(config_class.of(spec))


def load(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model from a local Hugging Face folder, ours or any causal one of transformers, in eval mode.

    dtype: None: as saved.  No code from the folder is run. Raises FileNotFoundError for what is no such folder, and
    ConfigError for weights that are missing or of another shape, which transformers alone would make up with a warning.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json; a Hugging Face model folder is needed")
    classes()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is a table; ours is a line
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    if wrong := sorted(info["mismatched_keys"]):
        name, found, expected = wrong[0]
        raise ConfigError(f"{path}: {name} has shape {list(found)}, but config.json asks for {list(expected)}")
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{path}: its files hold no weights for {missing[0]}{more}, so this is not the whole model")
    return model.eval()


def _gpt() -> type[LM]:
    from models.gpt.model import GPTForCausalLM

    return GPTForCausalLM


register("gpt", GPT, GPTConfig, _gpt)
for _name in filter(None, os.environ.get(IMPORTS, "").split(",")):
    importlib.import_module(_name.strip())
