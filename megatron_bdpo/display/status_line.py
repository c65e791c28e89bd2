"""One line with a bar that stays under what is printed, as long as a job goes on. In a terminal only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megatron_bdpo.display.blocks import Block
from megatron_bdpo.display.terminal import draw_on
from megatron_bdpo.errors import visible

#: Seconds between two drawings of the bar: steps may be shorter.
_EVERY = 0.1


class StatusLine:
    """Drawn when it is told something, by no thread of its own: a rank that stands still shows that it does."""

    def __init__(self, stream: TextIO) -> None:
        """
        Args:
            stream: a terminal.
        """
        self._console = _CursorStays(file=stream, highlight=False, emoji=False, markup=False)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(None), TextColumn("{task.fields[what]}"))
        # It is gone when the job is over: the log has all that is to stay.
        self._bar = Progress(
            *columns,
            console=self._console,
            auto_refresh=False,
            transient=True,
            expand=True,
            redirect_stdout=False,  # it is Megatron's, and goes to a file
            redirect_stderr=sys.stderr.isatty(),  # warnings come above the line
        )
        self._task = self._bar.add_task("", total=None, what="")
        self._drawn = -_EVERY
        self._bar.start()

    def tell(self, done: int, of: int, what: str) -> None:
        """Draw the bar, unless it has just been drawn.

        Args:
            what: a few words behind it.
        """
        self._bar.update(self._task, completed=done, total=of, description=f"{done}/{of}", what=visible(what))
        if done == of or time.monotonic() - self._drawn >= _EVERY:
            self._drawn = time.monotonic()
            self._bar.refresh()

    def print_above(self, blocks: Iterable[Block]) -> None:
        """Print for good, above the line."""
        draw_on(self._console, blocks)

    def close(self) -> None:
        """Take the line away."""
        self._bar.stop()


class _CursorStays(Console):
    """A job may be killed while the line is there: the terminal keeps its cursor."""

    def show_cursor(self, show: bool = True) -> bool:
        return False
