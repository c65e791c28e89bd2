"""Tables and facts for people: drawn by rich in a terminal, as wide as that is; plain lines in a file or a pipe.

What is shown is a list of blocks: a string, which may have several lines, a :class:`Table`, :class:`Facts` or a
:class:`Line`. In a terminal, ``NO_COLOR`` and ``COLUMNS`` are heeded.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

from megatron_bdpo.display.blocks import BETWEEN, Block, Facts, Line, Mood, Table, plain

__all__ = ["BETWEEN", "Block", "Facts", "Line", "Mood", "Table", "is_terminal", "plain", "show", "width"]


def show(*blocks: Block, stream: TextIO | None = None) -> None:
    """Print for people, flushed: to ``stream``, or what is ``sys.stdout`` now."""
    stream = stream or sys.stdout
    if not is_terminal(stream):
        print(plain(blocks), file=stream, flush=True)
        return
    from megatron_bdpo.display import terminal  # rich takes longer to import than the program's help takes

    terminal.draw(blocks, stream, width(stream))


def is_terminal(stream: TextIO) -> bool:
    """Whether tables can be drawn there."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def width(stream: TextIO) -> int | None:
    """Columns of the terminal; None where the output is a file or a pipe, which can take any line."""
    if not stream.isatty():
        return None
    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"])
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
