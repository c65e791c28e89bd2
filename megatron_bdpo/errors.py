"""The one exception for everything a user can put right: bad data, bad flags, a cache that does not fit."""

from __future__ import annotations

import re

#: White space between a sentence and the next one.
_BETWEEN_SENTENCES = re.compile(r"(?<=\S[.?!]) +(?=[A-Z`])")


class UserError(ValueError):
    """Something the user gave us cannot be used.

    The message names the file, line, field or flag and the way out. Entry points show it without a
    traceback, once, and every rank ends with a non-zero exit code.
    """

    shown: bool = False
    """Already printed."""

    is_final: bool = True
    """The same flags and data will end the same way: a launcher need not try again."""

    def as_text(self, where: str = "", otherwise: str = "--help describes every flag.") -> str:
        """The message for a terminal: a line of cause, which is its first sentence, and a line of advice, the rest.

        Args:
            where: what stands behind the word "error".
            otherwise: the advice, where the message is one sentence. A message of several lines stays as it is.
        """
        message = str(self)
        if "\n" in message:
            return f"error{where}: {message}"
        cause, *advice = _BETWEEN_SENTENCES.split(message, maxsplit=1)
        return f"error{where}: {cause}\nadvice: {advice[0] if advice else otherwise}"


class PassingError(UserError):
    """What may be gone at the next try: a disk that is full, a number that only one machine got wrong."""

    is_final = False
