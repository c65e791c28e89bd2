"""Two kinds of output: what is meant to be read goes to the terminal, what Megatron prints goes to a file.

Megatron prints its 800 arguments and a few lines per step, which bury a run's own: the data report, the plan, a line
per step. They are kept in ``megatron.log`` in the directory of ``--save``; ``--megatron-output terminal`` shows them.

In a terminal a line with a bar stays under what is printed while steps are made; a file has lines only.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megatron_bdpo import display
from megatron_bdpo.errors import visible

if TYPE_CHECKING:
    from megatron_bdpo.display.status_line import StatusLine

#: Where lines for people go while ``sys.stdout`` is Megatron's; None for ``sys.stdout`` itself.
_terminal: TextIO | None = None

#: Under what is printed by this rank, once it has told how far it is.
_status: StatusLine | None = None

#: Whether there may be one.
_has_status = False


def show(*blocks: display.Block) -> None:
    """Print for people, whoever has ``sys.stdout``."""
    stream = _terminal or sys.stdout
    if _status:
        _status.print_above(blocks)
        return
    if _has_status and display.is_terminal(stream):
        stream.write("\r\x1b[K")  # where another rank's line may be
    display.show(*blocks, stream=stream)


@contextlib.contextmanager
def status_line() -> Iterator[None]:
    """Inside the block :func:`tell_status` draws, and what it has drawn is taken away at its end."""
    global _status, _has_status
    _has_status = True
    try:
        yield
    finally:
        if _status:
            _status.close()
        _status, _has_status = None, False


def tell_status(done: int, of: int, what: str) -> None:
    """Show how far the job is, in a terminal. One rank does."""
    global _status
    if not _has_status or _terminal is None or not display.is_terminal(_terminal):
        return  # what Megatron prints between our lines would tear it
    if _status is None:
        from megatron_bdpo.display.status_line import StatusLine  # rich: see display

        _status = StatusLine(_terminal)
    _status.tell(done, of, what)


def width() -> int | None:
    """Columns of the terminal; None where the output is a file or a pipe, which can take any line."""
    return display.width(_terminal or sys.stdout)


@contextlib.contextmanager
def megatron_in_file(path: Path | None) -> Iterator[None]:
    """Inside the block, ``sys.stdout`` and the log handlers that write to it are the file; :func:`show` is not.

    Args:
        path: appended to; None discards. It is made with the first line: what comes before the flags are checked
            leaves nothing behind.
    """
    global _terminal
    terminal, file = sys.stdout, _LazyFile(path)
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is terminal
    ]
    _terminal = terminal
    sys.stdout = file
    for handler in handlers:
        handler.setStream(file)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(terminal)
        sys.stdout = terminal
        _terminal = None
        file.close()


class _LazyFile(io.TextIOBase):
    """A text file for appending, made at the first write; what cannot be written is dropped."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: TextIO | None = None

    def write(self, text: str) -> int:
        if self._file is None:
            self._file = self._open()
        self._file.write(visible(text))
        return len(text)

    def _open(self) -> TextIO:
        with contextlib.suppress(OSError):
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                return self._path.open("a", buffering=1, encoding="utf-8")
        return open(os.devnull, "w")

    def flush(self) -> None:
        if self._file is not None and not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
