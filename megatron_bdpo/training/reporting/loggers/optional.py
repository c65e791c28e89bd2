"""Packages that only those need who log there: the one place that imports them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from megatron_bdpo.errors import UserError


def is_installed(package: str) -> bool:
    """Without importing it."""
    return importlib.util.find_spec(package) is not None


def load(package: str, flag: str) -> Any:
    """The package.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except Exception as error:  # a package that is there may raise anything
        raise UserError(
            f"{flag} needs {package}, which cannot be imported: {type(error).__name__}: {error}. pip install {package}."
        ) from error
