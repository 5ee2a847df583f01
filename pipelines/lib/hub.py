"""The Hugging Face Hub: whether a name is there, asked once where a library asks twelve times; and a model's files."""

from __future__ import annotations

import difflib
import logging
import re
from pathlib import Path
from typing import Literal

from pipelines.lib.config import InputError

TIMEOUT_S = 10.0  # as long as the Hub's own library waits for one answer

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model")  # no pickles, no code

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

Answer = Literal["there", "missing", "unreachable"]


def ask(repo_type: Literal["model", "dataset"], name: str, timeout_s: float = TIMEOUT_S) -> Answer:
    """Ask the Hub once for a repository. "there" also where only loading it can tell (a server's error, a revision).

    "unreachable": no network, no answer within timeout_s, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what fails is said once, by the error
    try:
        HfApi().repo_info(name, repo_type=repo_type, timeout=timeout_s)
    except (RepositoryNotFoundError, HFValidationError):
        return "missing"
    except HfHubHTTPError:
        return "there"
    except Exception:  # the HTTP library's own classes, which change with its versions
        return "unreachable"
    return "there"


def is_offline() -> bool:
    """Whether the user has switched the network off for the Hub's libraries (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def loaded_names(repo_type: Literal["model", "dataset"]) -> list[str]:
    """The repositories that the local cache of the Hub holds, as owner/name."""
    from huggingface_hub import constants

    prefix = f"{repo_type}s--"
    try:
        found = sorted(p.name for p in Path(constants.HF_HUB_CACHE).iterdir())
    except OSError:
        return []
    return [name.removeprefix(prefix).replace("--", "/") for name in found if name.startswith(prefix)]


def looks_like_name(text: str) -> bool:
    """Whether a word can be a repository: `gpt2`, `owner/name`."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) is not None


def model_folder(name: str) -> Path:
    """A model's config, weights and tokenizer in the local cache, loaded from the Hub if they are not there yet.

    Raises InputError for a name that the Hub does not have, or cannot give now.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    answer = ask("model", name)
    if answer == "missing":
        raise InputError(f"{name}: neither a folder here nor a model of the Hub{_nearest(name)}")
    disable_progress_bars()
    try:
        folder = snapshot_download(name, allow_patterns=list(MODEL_FILES), local_files_only=answer == "unreachable")
    except Exception as error:  # the Hub's and its HTTP library's own classes, which change with their versions
        said = "the Hub cannot be reached, and nothing of that name was loaded before"
        raise InputError(
            f"{name}: no such folder, and {said if answer == 'unreachable' else str(error).splitlines()[0]}"
        ) from None
    if not list(Path(folder).glob("*.safetensors")):
        raise InputError(f"{name}: the Hub has no safetensors of it, and weights in pickles are not read")
    return Path(folder)


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, [*GPT2_NAMES, *loaded_names("model")], 1)
    return f"; did you mean {close[0]!r}?" if close else ""
