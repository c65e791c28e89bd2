"""``megatron-bdpo train`` and ``score``: a job on this machine; training on several ranks, too, through torchrun."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from megatron_bdpo.cli import common
from megatron_bdpo.training import entry
from megatron_bdpo.training.flags import first_look, flag_table


class _Job(click.Command):
    """A command whose flags are a job's: they are passed on, and a shell completes them."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names of the job's flags, and what click completes by itself."""
        found = super().shell_complete(ctx, incomplete)
        if not incomplete.startswith("-"):
            return found
        groups = flag_table.read().groups.values()
        names = [name for flags in groups for flag in flags for name in flag.all_names if name.startswith(incomplete)]
        return [*found, *(CompletionItem(name) for name in names)]


@click.command(
    "train",
    cls=_Job,
    epilog=common.example(first_look.EXAMPLE.replace("train ", "train --ranks 8 ")),
    **common.PASS_THROUGH,
)
@click.option("--ranks", type=common.POSITIVE, default=1, show_default=True, help="Processes, as a rule one per GPU.")
@common.passed_on
@click.pass_context
def train(context: click.Context, ranks: int, flags: tuple[str, ...]) -> None:
    """Train on preference pairs.

    FLAGS are Megatron's and those of the preference loss; they follow below. With --ranks above 1 this is
    torchrun --nproc-per-node RANKS -m megatron_bdpo.train FLAGS. On several nodes, use torchrun itself, or slurm/.
    """
    if common.asks_for_help(flags):
        click.echo(context.get_help() + "\n")
    if ranks > 1:
        first_look.look_at(flags, "train")
        from megatron_bdpo.cli import launch  # imports torch, which help and mistakes need not wait for

        launch.launch(ranks, flags)
    else:
        with entry.end_told():
            entry.train(flags)


@click.command(
    "score",
    cls=_Job,
    epilog=common.example(
        "megatron-bdpo score --hf-model MODEL --pair-data pairs.jsonl --seq-length 4096 --bf16 --reference-cache SCORES"
    ),
    **common.PASS_THROUGH,
)
@common.passed_on
@click.pass_context
def score(context: click.Context, flags: tuple[str, ...]) -> None:
    """Score all pairs of a job's data with its reference, ahead of training; or with a reward model.

    FLAGS are those of the training run; those about steps and optimizer may be left out. They follow below. On
    several ranks: torchrun --nproc-per-node N -m megatron_bdpo.score FLAGS

    With --objective reward, --hf-model names a reward model, and --rewards the file for the rewards of all pairs, or
    --scored-rows that for rows of answers that nobody has judged, with their scores.
    """
    if common.asks_for_help(flags):
        click.echo(context.get_help() + "\n")
    with entry.end_told():
        entry.score(flags)
