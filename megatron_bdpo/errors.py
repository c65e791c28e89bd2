"""The one exception for everything a user can put right: bad data, bad flags, a cache that does not fit."""

from __future__ import annotations

import re

#: White space between a sentence and the next one.
_BETWEEN_SENTENCES = re.compile(r"(?<=\S[.?!]) +(?=[A-Z`])")


#: What a terminal obeys, or shows in another order than it is written: controls but for the line feed and the tab,
#: marks of direction, separators of lines.
_CONTROLS = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)


def visible(text: str) -> str:
    """A text for a terminal or a log, with escapes for what would change what is shown: ``\\x1b`` for ESC.

    Texts of rows, names of files and values of configurations are anybody's: whatever is shown goes through here.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


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
        message = visible(str(self))
        if "\n" in message:
            return f"error{where}: {message}"
        cause, *advice = _BETWEEN_SENTENCES.split(message, maxsplit=1)
        return f"error{where}: {cause}\nadvice: {advice[0] if advice else otherwise}"


class PassingError(UserError):
    """What may be gone at the next try: a disk that is full, a number that only one machine got wrong."""

    is_final = False
