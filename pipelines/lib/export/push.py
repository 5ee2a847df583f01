"""Upload of an exported folder to the Hugging Face Hub.

The token comes from the environment alone and is written nowhere: not into a config, a log or a message.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipelines.lib.config import InputError
from pipelines.lib.hub import is_offline

TOKEN = "HF_TOKEN"
LOCAL_ONLY = ("export.json",)  # holds paths of this machine


def client(repo: str) -> Any:
    """The Hub's API with the user's token. Raises InputError for a name that cannot be, no token, or no network."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"push_to_hub={repo}: {str(error).splitlines()[0]}") from None
    if is_offline():
        raise InputError(f"push_to_hub={repo}: HF_HUB_OFFLINE is set; unset it, or export without push_to_hub")
    token = os.environ.get(TOKEN)
    if not token:
        raise InputError(f"push_to_hub={repo}: put a write token of the Hub into the environment variable {TOKEN}")
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)


def push(api: Any, folder: Path, repo: str, private: bool) -> str:
    """Make the repository if there is none and upload the folder. Returns its address.

    Raises InputError with the Hub's answer, and for a repository that is public already though private was asked for.
    """
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        if private and not api.repo_info(repo).private:
            raise InputError(f"push_to_hub={repo}: it exists and is public; private=false says that this is meant")
        api.upload_folder(
            folder_path=folder, repo_id=repo, commit_message="Export from Novella", ignore_patterns=list(LOCAL_ONLY)
        )
    except InputError:
        raise
    except Exception as error:  # the Hub's and its HTTP library's own classes, which change with their versions
        said = " ".join(str(error).replace(str(api.token), "***").split()) or type(error).__name__
        raise InputError(f"push_to_hub={repo}: {said[:300]}; {folder} is complete, so push it again") from None
    return url
