"""What is shown: text, tables and facts, and their plain form.

The plain form holds the same words as what rich draws and needs neither colour nor a width, so logs can be searched. It
is made here because rich takes five times as long for it, breaks what belongs together, and has to be imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from textwrap import TextWrapper
from typing import Literal

from megatron_bdpo.errors import visible


@dataclass(frozen=True)
class Table:
    """Columns under their titles."""

    titles: Sequence[str]
    """Empty strings draw no heading."""
    rows: Sequence[Sequence[str]]
    """Cells as text, as many as there are titles."""
    left: Iterable[int] = (0,)
    """Columns whose cells begin at the left; the others end at the right."""
    whole: Iterable[int] = ()
    """Columns that are never wrapped: flags, numbers that belong together."""
    title: str = ""
    """A line above."""
    gap: int = 2
    """Blanks between columns in the plain form."""

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


@dataclass(frozen=True)
class Facts:
    """Names with what they are, a line each."""

    items: Sequence[tuple[str, str]]
    indent: int = 2
    """Blanks before each name in the plain form."""

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


type Mood = Literal["", "doubtful", "wrong"]


@dataclass(frozen=True)
class Line:
    """One line of parts with bars between them; a terminal shows in colour which of them is not as it should be."""

    parts: Sequence[tuple[str, Mood]]
    """The most wanted first."""

    def fitting(self, columns: int | None) -> Line:
        """As many of the parts as so many columns have room for, the first in any case. None is room for all."""
        if columns is None:
            return self
        kept, used = 0, -len(BETWEEN)
        for text, _ in self.parts:
            used += len(BETWEEN) + len(text)
            if used > columns:
                break
            kept += 1
        return Line(self.parts[: max(kept, 1)])

    def plain(self) -> str:
        return BETWEEN.join(text for text, _ in self.parts)


#: What stands between the parts of a line.
BETWEEN = " | "


#: Characters of a cell's line in the plain form.
_CELL = 45


def _wrapped(cell: str) -> list[str]:
    """The lines of a cell; what has no blanks, a path for one, stays whole."""
    wrap = TextWrapper(_CELL, break_long_words=False, break_on_hyphens=False).wrap
    return [part for line in cell.splitlines() for part in (wrap(line) if len(line) > _CELL else [line])] or [""]


type Block = str | Table | Facts | Line


def plain(blocks: Iterable[Block]) -> str:
    """All of them as lines of text."""
    return visible("\n".join(block if isinstance(block, str) else block.plain() for block in blocks))
