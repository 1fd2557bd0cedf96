"""Finished models to the Hugging Face Hub: checked before any work is done, uploaded when all of it is."""

import re
from pathlib import Path

from micota_fast.errors import InputError

STALE = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]
"""What an earlier upload may have left in the repository, and a loader would take for this model's; removed with it."""
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def require_upload(name: str | None) -> None:
    """Check that a model can be uploaded as ORG/NAME; nothing is asked of the hub. None: none will be.

    Raises:
        InputError: the name has another form, no token is at hand, or the hub must not be asked.
    """
    if name is None:
        return
    if _NAME.fullmatch(name) is None:
        raise InputError(f"`push_to_hub` must be ORG/NAME, not {name!r}")
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise InputError("`push_to_hub` needs the hub, and HF_HUB_OFFLINE is set: unset it, or leave `push_to_hub` out")
    if get_token() is None:
        raise InputError("`push_to_hub` needs a token with write access: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, name: str) -> None:
    """Upload a model's folder as ORG/NAME, whose repository is made private if there is none; the same again is quick.

    Raises:
        InputError: the hub does not take it. The folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message="Upload by micota-fast",
            delete_patterns=STALE,
        )
    except Exception as error:  # of the hub's client, of its HTTP library and of its uploads, which share no base
        raise InputError(
            f"{folder} is finished but was not uploaded to {name}: {error}; rerun the same command"
        ) from None
    print(f"{folder}: uploaded to {name}", flush=True)
