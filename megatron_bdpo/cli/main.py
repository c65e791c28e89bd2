"""The program ``megatron-bdpo``: its sub-commands, and how it ends."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from megatron_bdpo.cli import convert, data, jobs, losses, migrate, plan, report
from megatron_bdpo.cli.common import example
from megatron_bdpo.display import show
from megatron_bdpo.errors import UserError, visible

_DEBUG = "MEGATRON_BDPO_DEBUG"  # as in training.entry, which takes seconds to import


def _print_versions(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from megatron_bdpo.cli.version_table import versions  # imports torch

        show(versions())
        context.exit()


@click.group(
    "megatron-bdpo",
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


for _subcommand in (
    data.data,
    jobs.score,
    jobs.train,
    convert.convert,
    plan.plan,
    migrate.migrate,
    report.report,
    losses.losses,
):
    cli.add_command(_subcommand)


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
        code: Any = cli.main(arguments, prog_name="megatron-bdpo", standalone_mode=False)
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
            asked = UserError(error.format_message().rstrip())
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
    words, command = ["megatron-bdpo"], cli
    for word in arguments:
        if isinstance(command, click.Group) and word in command.commands:
            command = command.commands[word]  # type: ignore[assignment]
            words.append(word)
    return " ".join(words)


if __name__ == "__main__":
    raise SystemExit(main())
