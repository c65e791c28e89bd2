"""``megatron-bdpo completion``: what a shell reads to complete sub-commands, their options and a training's flags."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from megatron_bdpo.cli.common import example

PROGRAM = "megatron-bdpo"


@click.command("completion", epilog=example('eval "$(megatron-bdpo completion bash)"'))
@click.argument("name", metavar="{bash|zsh|fish}", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, name: str) -> None:
    """Print the completion script of a shell.

    For every new shell: the line of the example in ~/.bashrc or ~/.zshrc; for fish, write the script to
    ~/.config/fish/completions/megatron-bdpo.fish.
    """
    found = get_completion_class(name)
    assert found is not None, "click has all three"
    click.echo(found(context.find_root().command, {}, PROGRAM, "_MEGATRON_BDPO_COMPLETE").source())
