"""What the sub-commands share: kinds of values, help with an example, flags that are passed on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)
NOT_NEGATIVE = click.IntRange(min=0)


class _Amount(click.FloatRange):
    """A number above 0 that arithmetic can be done with."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


AMOUNT = _Amount(min=0, max=1e9, min_open=True)


def example(*lines: str) -> str:
    """A help text's end: commands, as they are typed."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


#: For a sub-command that leaves its flags, ``--help`` too, to a job's parser.
PASS_THROUGH: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"ignore_unknown_options": True},
}


def passed_on(function: Callable[..., Any]) -> Callable[..., Any]:
    """All that the sub-command does not know itself, untouched and in its order."""
    return click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="FLAGS...")(function)


def asks_for_help(flags: tuple[str, ...]) -> bool:
    """Whether a job's parser would print its help."""
    return not {"--help", "--help-all", "-h"}.isdisjoint(flags)


def only_one(**given: object) -> None:
    """Raise UsageError unless exactly one of the named options is given."""
    flags = [f"--{name.replace('_', '-')}" for name in given]
    count = sum(value not in (None, (), "") for value in given.values())
    if count != 1:
        raise click.UsageError(f"{'one' if count == 0 else 'only one'} of {', '.join(flags)} is needed.")
