"""``megatron-bdpo score``: what the reference says about every pair, in one process."""

from __future__ import annotations

import click

from megatron_bdpo.cli import common


@common.passed_on
@click.pass_context
def _score(context: click.Context, flags: tuple[str, ...]) -> None:
    """Score all pairs of a job's data with its reference, ahead of training.

    FLAGS are the training's, of which those about steps and optimizer may be left out; they follow below. On several
    ranks: torchrun --nproc-per-node N -m megatron_bdpo.score FLAGS
    """
    from megatron_bdpo.training import entry

    if common.asks_for_help(flags):
        click.echo(context.get_help() + "\n")
    with entry.refusals_told():
        entry.score(flags)


score = click.command(
    "score",
    epilog=common.example(
        "megatron-bdpo score --hf-model MODEL --pair-data pairs.jsonl --seq-length 4096 --bf16 --reference-cache SCORES"
    ),
    **common.PASS_THROUGH,
)(_score)
