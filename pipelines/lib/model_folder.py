"""A Hugging Face folder of a causal language model, ours or another's, opened with errors that name the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.lib.config import InputError

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def open_folder(folder: Path, dtype: str = "auto") -> Any:
    """The model in evaluation mode. dtype: a name of torch, or auto: as saved. Raises InputError for what is none.

    As models.families.load, but weights that the files lack are refused: transformers makes them up, with a warning.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from models.families import classes

    classes()  # makes our families known to transformers
    logging.disable_progress_bar()  # of its loading, which is over before a bar can be read
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is a table; ours is a line
    options = {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype), "local_files_only": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # transformers, safetensors, json and torch each have their own
        said = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise InputError(f"{folder}: not a model that can be opened ({said[:300]})") from error
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    if wrong := sorted(info["mismatched_keys"]):
        name, found, expected = wrong[0]
        raise InputError(f"{folder}: {name} has shape {list(found)}, but config.json asks for {list(expected)}")
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder}: its files hold no weights for {missing[0]}{more}, so this is not the whole model")
    return model.eval()


def weight_hashes(folder: Path) -> dict[str, str]:
    """{file: sha256} of the weights in a folder. Raises InputError if there are none."""
    from pipelines.lib.shards import file_sha256

    files = [path for pattern in WEIGHTS for path in sorted(folder.glob(pattern))]
    if not files:
        raise InputError(f"{folder}: no weights here ({' or '.join(WEIGHTS)})")
    return {path.name: file_sha256(path) for path in files}


def context_length(model: Any) -> int | None:
    """Tokens that a model was made for; None where its config does not say."""
    config = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        if (found := getattr(config, name, None)) is not None:
            return int(found)
    return None
