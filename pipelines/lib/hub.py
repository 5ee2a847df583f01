"""Whether a name is on the Hugging Face Hub: asked once, before a library asks twelve times and prints it all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

TIMEOUT_S = 10.0  # as long as the Hub's own library waits for one answer

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
