"""Tables and facts for people: drawn by rich in a terminal, as wide as that is; plain lines in a file or a pipe.

What is shown is a list of blocks: a string, which may have several lines, a :class:`Table` or :class:`Facts`. The plain
form holds the same words and needs neither colour nor a width, so logs can be searched. In a terminal, ``NO_COLOR`` and
``COLUMNS`` are heeded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Table:
    """Columns under their titles.

    Attributes:
        titles: of the columns; empty strings draw no heading.
        rows: cells as text, as many as there are titles.
        left: columns whose cells begin at the left; the others end at the right.
        whole: columns that are never wrapped: flags, numbers that belong together.
        title: a line above.
        gap: blanks between columns in the plain form.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Iterable[int] = (0,)
    whole: Iterable[int] = ()
    title: str = ""
    gap: int = 2

    def plain(self) -> str:
        """Aligned columns. Long texts are wrapped, between words."""
        left, whole = set(self.left), set(self.whole)
        lines: list[list[str]] = [list(self.titles)] if any(self.titles) else []
        for row in self.rows:
            cells = [
                _wrapped(cell) if place in left - whole else cell.splitlines() or [""] for place, cell in enumerate(row)
            ]
            lines += map(list, zip_longest(*cells, fillvalue=""))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            (" " * self.gap)
            .join(
                cell.ljust(width) if place in left else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            .rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *(f"  {line}" for line in text)] if self.title else text)

    def rich(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            box=box.SIMPLE_HEAD,
            show_header=any(self.titles),
            header_style="bold cyan",
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        left, whole = set(self.left), set(self.whole)
        for place, title in enumerate(self.titles):
            side: Literal["left", "right"] = "left" if place in left else "right"
            table.add_column(
                Text(title),
                justify=side,
                overflow="fold",
                no_wrap=place in whole or place not in left,
                style="" if place or any(self.titles) else "cyan",
            )
        for row in self.rows:
            table.add_row(*map(Text, row))
        return Group(Text(self.title, style="bold"), table) if self.title else table


@dataclass(frozen=True)
class Facts:
    """Names with what they are, a line each.

    Attributes:
        indent: blanks before each name in the plain form.
    """

    items: Sequence[tuple[str, str]]
    indent: int = 2

    @classmethod
    def of(cls, lines: Iterable[str]) -> Facts:
        """From ``name: value`` lines; one that begins with a blank goes on with the value before it."""
        items: list[tuple[str, str]] = []
        for line in lines:
            name, colon, value = line.partition(": ")
            if line.startswith(" ") and items:
                items[-1] = (items[-1][0], f"{items[-1][1]}\n{line.strip()}")
            else:
                items.append((name, value) if colon else ("", line))
        return cls(items)

    def plain(self) -> str:
        blanks = " " * self.indent
        return "\n".join(
            (f"{blanks}{name}: {value}" if name else f"{blanks}{value}").replace("\n", f"\n{blanks}  ")
            for name, value in self.items
        )

    def rich(self) -> RenderableType:
        from rich.table import Table as RichTable
        from rich.text import Text

        grid = RichTable.grid(padding=(0, 2))
        grid.add_column(style="cyan")
        grid.add_column(overflow="fold")
        for name, value in self.items:
            grid.add_row(Text(name), Text(value))
        return grid


#: Characters of a cell's line in the plain form.
_CELL = 46


def _wrapped(cell: str) -> list[str]:
    """The lines of a cell; what has no blanks, a path for one, stays whole."""
    wrap = TextWrapper(_CELL, break_long_words=False, break_on_hyphens=False).wrap
    return [part for line in cell.splitlines() for part in (wrap(line) if len(line) > _CELL else [line])] or [""]


type Block = str | Table | Facts


def plain(blocks: Iterable[Block]) -> str:
    """All of them as lines of text."""
    return "\n".join(block if isinstance(block, str) else block.plain() for block in blocks)


def show(*blocks: Block, stream: TextIO | None = None) -> None:
    """Print for people, flushed: to ``stream``, or what is ``sys.stdout`` now."""
    stream = stream or sys.stdout
    if not is_terminal(stream):
        print(plain(blocks), file=stream, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, width=width(stream), highlight=False, emoji=False, markup=False)
    for block in blocks:
        if isinstance(block, str):
            console.print(Text(block, style="yellow" if block.startswith("WARNING") else ""))
        else:
            console.print(block.rich())
    stream.flush()


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
