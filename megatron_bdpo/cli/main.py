"""The program ``megatron-bdpo``: its sub-commands, and how it ends."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from megatron_bdpo.cli.common import example
from megatron_bdpo.cli.completion import PROGRAM
from megatron_bdpo.cli.version_table import versions
from megatron_bdpo.display import show
from megatron_bdpo.errors import UserError, visible
from megatron_bdpo.training import entry

_DEBUG = entry.DEBUG


def _print_versions(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        show(versions())
        context.exit()


#: Sub-command -> the module of this package that has it under its name.
_SUB_COMMANDS = {
    "completion": "completion",
    "convert": "convert",
    "data": "data",
    "losses": "losses",
    "migrate": "migrate",
    "plan": "plan",
    "report": "report",
    "score": "jobs",
    "train": "jobs",
}


class _Lazy(click.Group):
    """Loads the sub-command that is asked for, and no other."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all."""
        return sorted(_SUB_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """None where there is none of that name."""
        module = _SUB_COMMANDS.get(cmd_name)
        return getattr(importlib.import_module(f"megatron_bdpo.cli.{module}"), cmd_name) if module else None


@click.group(
    "megatron-bdpo",
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example("megatron-bdpo data check pairs.jsonl"),
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_versions, help="Show all versions."
)
def cli(debug: bool) -> None:
    """Align language models on preference pairs with NVIDIA Megatron.

    `megatron-bdpo SUBCOMMAND --help` says more of each.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command. Returns the exit code: 2 for what the user can put right, with a line of cause and one of
    advice, 1 for what is a fault, with one line. Tracebacks only with ``--debug``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = _wants_debug(arguments)
    before = os.environ.get(_DEBUG)
    if debug:
        os.environ[_DEBUG] = "1"  # for ranks, which are processes of their own
    try:
        code: Any = cli.main(arguments, prog_name=PROGRAM, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _explain(error, arguments, debug)
    except click.exceptions.Abort:  # Ctrl-C
        click.echo("stopped", err=True)
        return 130
    finally:
        if debug and before is None:
            del os.environ[_DEBUG]


def _wants_debug(arguments: list[str]) -> bool:
    """Whether ``--debug`` stands before the sub-command: behind it, a flag may be Megatron's."""
    for word in arguments:
        if not word.startswith("-"):
            return False
        if word == "--debug":
            return True
    return False


def _explain(error: Exception, arguments: list[str], debug: bool) -> int:
    help_of = f"{_command_of(arguments)} --help"
    match error:
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.format_message(), err=True)
        case click.exceptions.Abort():
            click.echo("stopped", err=True)
            return 130
        case click.ClickException():
            asked = UserError(" ".join(error.format_message().split()))
            click.echo(asked.as_text(otherwise=f"{help_of} has its options and an example."), err=True)
        case UserError():
            if not error.shown:
                click.echo(error.as_text(otherwise=f"{help_of} has its options and an example."), err=True)
        case _:
            click.echo(visible(f"error: {type(error).__name__}: {' '.join(str(error).split())}"), err=True)
            if not debug:
                again = " ".join(["megatron-bdpo --debug", *arguments])
                click.echo(visible(f"advice: this should not happen. Its traceback: {again}"), err=True)
            return 1
    return 2


def _command_of(arguments: list[str]) -> str:
    """``megatron-bdpo data check``, as far as the arguments name commands."""
    words: list[str] = [PROGRAM]
    command: click.Command = cli
    context = click.Context(cli)
    for word in arguments:
        inner = command.get_command(context, word) if isinstance(command, click.Group) else None
        if inner is not None:
            command = inner
            words.append(word)
    return " ".join(words)


if __name__ == "__main__":
    raise SystemExit(main())
