"""Blocks drawn by rich, as wide as the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from megatron_bdpo.display.blocks import BETWEEN, Block, Facts, Line, Mood, Table
from megatron_bdpo.errors import visible


def draw(blocks: Iterable[Block], stream: TextIO, width: int | None) -> None:
    """Draw them, flushed."""
    draw_on(Console(file=stream, width=width, highlight=False, emoji=False, markup=False), blocks)
    stream.flush()


def draw_on(console: Console, blocks: Iterable[Block]) -> None:
    """Draw them with a console of rich's that is there already."""
    for block in blocks:
        console.print(_drawn(block))


def _text(text: str, style: str = "") -> Text:
    """What is drawn: rich hands controls on to the terminal."""
    return Text(visible(text), style=style)


def _drawn(block: Block) -> RenderableType:
    match block:
        case Line():
            return _text(BETWEEN).join(_text(part, _STYLES[mood]) for part, mood in block.parts)
        case Table():
            table = _table(block)
            return Group(_text(block.title, style="bold"), table) if block.title else table
        case Facts():
            grid = RichTable.grid(padding=(0, 2))
            grid.add_column(style="cyan")
            grid.add_column(overflow="fold")
            for name, value in block.items:
                grid.add_row(_text(name), _text(value))
            return grid
        case _:
            opening = block.partition(":")[0]
            return _text(block, style={"WARNING": "yellow", "error": "bold red"}.get(opening, ""))


_STYLES: dict[Mood, str] = {"": "", "doubtful": "yellow", "wrong": "bold red"}


def _table(block: Table) -> RichTable:
    left, whole, titled = set(block.left), set(block.whole), any(block.titles)
    table = RichTable(
        box=box.SIMPLE_HEAD,
        show_header=titled,
        header_style="bold cyan",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for place, title in enumerate(block.titles):
        table.add_column(
            _text(title),
            justify="left" if place in left else "right",
            overflow="fold",
            no_wrap=place in whole or place not in left,
            style="" if place or titled else "cyan",
        )
    for row in block.rows:
        table.add_row(*map(_text, row))
    return table
