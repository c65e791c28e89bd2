"""The one exception for everything a user can put right: bad data, bad flags, a cache that does not fit."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave us cannot be used.

    The message names the file, line, field or flag and the way out. Entry points show it without a
    traceback, once, and every rank ends with a non-zero exit code.
    """

    shown: bool = False
    """Already printed."""
