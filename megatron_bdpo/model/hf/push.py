"""A model's directory on the Hugging Face hub: in a private repository, with a token that the environment holds."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, validate_repo_id

from megatron_bdpo.errors import PassingError, UserError

FLAG = "--push-to-hub"

#: Where the token is looked for, and nowhere else: what a login left on a machine may be somebody else's.
TOKEN = "HF_TOKEN"


def check_name(name: str) -> None:
    """Refuse what can be no repository, and a push without a token.

    Raises:
        UserError: with the way out.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{FLAG} {name}: {error} Give OWNER/NAME, or NAME alone for one of your own.") from error
    if not os.environ.get(TOKEN):
        raise UserError(
            f"{FLAG} {name}: the environment has no {TOKEN}. Set it to a token that may write, from "
            f"{constants.ENDPOINT}/settings/tokens."
        )
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{FLAG} {name}: HF_HUB_OFFLINE is set. Unset it, or push later: hf upload {name} DIR.")


def make_repository(name: str) -> str:
    """Make a private repository, or find it as it is. So a token that may not write is told before a training run.

    Returns:
        The full name.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    check_name(name)
    try:
        return str(_hub().create_repo(name, private=True, exist_ok=True).repo_id)
    except Exception as error:  # of the hub, of HTTP
        raise UserError(
            f"{FLAG} {name}: the repository cannot be made: {_told(error)}. Look at the token's rights and at the "
            f"network from here; or push later: hf upload {name} DIR."
        ) from error


def push_directory(directory: Path, name: str) -> str:
    """Upload a directory, as one commit; what is there already is not sent again.

    Returns:
        Where it is, and who can see it.

    Raises:
        PassingError: what is at ``directory`` stays, and the message says how to push it.
    """
    try:
        hub = _hub()
        # What an interrupted export has left is none of it; hidden files are none of a model's.
        hub.upload_folder(
            repo_id=name, folder_path=directory, commit_message="Trained with megatron_bdpo", ignore_patterns=[".*"]
        )
        is_private = hub.model_info(name).private
    except Exception as error:  # as above
        raise PassingError(
            f"{FLAG} {name}: {directory} could not be pushed: {_told(error)}. It is complete there: hf upload {name} "
            f"{directory} sends it, and so does the same command once more."
        ) from error
    return f"{constants.ENDPOINT}/{name} ({'private: its settings make it public' if is_private else 'public'})"


def _hub() -> huggingface_hub.HfApi:
    return huggingface_hub.HfApi(endpoint=constants.ENDPOINT, token=os.environ.get(TOKEN) or False)


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
