"""Secrets and flags: flags are kept in logs, recipes, checkpoints and model cards, so a secret is no flag's value."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from megatron_bdpo.errors import UserError

_NAME = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_SHORTEST = 8
_IN_ADDRESS = re.compile(r"\w://[^/\s:@]*:[^/\s@]+@")


def refuse_secrets(settings: Mapping[str, object]) -> None:
    """Refuse flags that hold a secret.

    Args:
        settings: by flag, without its dashes.

    Raises:
        UserError: naming the flag, and not the secret.
    """
    for flag, given in settings.items():
        parts: Sequence[object] = given if isinstance(given, list | tuple) else [given]
        for text in map(str, parts):
            for name, value in _secrets():
                if value in text and not os.path.exists(value):  # a path to a key is none
                    raise UserError(
                        f"--{flag} holds what the environment has as {name}. Flags are kept in logs and checkpoints: "
                        "leave the secret in the environment, where the libraries look for it."
                    )
            if _IN_ADDRESS.search(text):
                raise UserError(
                    f"--{flag} holds an address with a password in it. Flags are kept in logs and checkpoints: leave "
                    "the password to the environment, or to ~/.netrc."
                )


def _secrets() -> Iterator[tuple[str, str]]:
    """Names and values in the environment."""
    return ((name, value) for name, value in os.environ.items() if _NAME.search(name) and len(value) >= _SHORTEST)
