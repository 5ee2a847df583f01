"""A Hugging Face folder of a causal language model, ours or another's, opened with errors that name the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.lib.config import InputError

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def open_folder(folder: Path, dtype: str = "auto") -> Any:
    """The model in evaluation mode. dtype: a name of torch, or auto: as saved. Raises InputError for what is none."""
    import torch
    from transformers.utils import logging

    from models.families import load
    from models.spec import ConfigError

    logging.disable_progress_bar()  # of its loading, which is over before a bar can be read
    try:
        return load(folder, None if dtype == "auto" else getattr(torch, dtype))
    except ConfigError as error:  # says it all
        raise InputError(f"{error}") from error
    except Exception as error:  # transformers, safetensors, json and torch each have their own
        said = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise InputError(f"{folder}: not a model that can be opened ({said[:300]})") from error


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


def same_tokenizer(model: Path, data: Path) -> bool:
    """Whether a model's folder and a data's tokenizer folder read text alike.

    Files may differ (another program wrote them): every token of the data must have the same id in the model's, and
    hard texts must become the same ids.
    """
    from pipelines.lib.vocab import hard_texts, load_tokenizer

    theirs, ours = load_tokenizer(model), load_tokenizer(data)
    ids = theirs.get_vocab()
    if any(ids.get(token) != i for token, i in ours.get_vocab().items()):
        return False
    encode = lambda tokenizer: [tokenizer.encode(text, add_special_tokens=False) for text in hard_texts(200)]
    try:
        return encode(theirs) == encode(ours)
    except Exception:  # tokenizers raises a bare one where a character is unknown to a vocabulary of characters
        return True
