"""``megatron-bdpo train`` and ``score``: a job on this machine; a training on several ranks, too, through torchrun."""

from __future__ import annotations

import logging
import signal

import click

from megatron_bdpo.cli import common


@click.command(
    "train",
    epilog=common.example(
        "megatron-bdpo train --ranks 8 --hf-model MODEL --pair-data pairs.jsonl --seq-length 4096 "
        "--pairs-per-step 64 --pair-epochs 1 --lr 5e-7 --bf16 --save RUN --save-interval 100"
    ),
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
        ranks = 1
    if ranks > 1:
        _launch(ranks, flags)
    else:
        from megatron_bdpo.training import entry  # imports torch

        with entry.end_told():
            entry.train(flags)


def _launch(ranks: int, flags: tuple[str, ...]) -> None:
    from torch.distributed import run  # torch takes seconds, the help needs none of it
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Of the ranks that it ends when one has failed; which one that is, stands in the error.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(["--nproc-per-node", str(ranks), "-m", "megatron_bdpo.train", *flags]))
    except ChildFailedError as error:
        # 2 is ours: the ranks have said what is wrong, and what torchrun adds is of no use. Those that are slower to
        # leave than the first have been sent SIGTERM by then.
        if {failure.exitcode for failure in error.failures.values()} - {-signal.SIGTERM} == {2}:
            raise SystemExit(2) from None
        click.echo(str(error), err=True)
        raise SystemExit(1) from None


@click.command(
    "score",
    epilog=common.example(
        "megatron-bdpo score --hf-model MODEL --pair-data pairs.jsonl --seq-length 4096 --bf16 --reference-cache SCORES"
    ),
    **common.PASS_THROUGH,
)
@common.passed_on
@click.pass_context
def score(context: click.Context, flags: tuple[str, ...]) -> None:
    """Score all pairs of a job's data with its reference, ahead of training; or with a reward model.

    FLAGS are the training's, of which those about steps and optimizer may be left out; they follow below. On several
    ranks: torchrun --nproc-per-node N -m megatron_bdpo.score FLAGS

    With --objective reward, --hf-model names a reward model, and --rewards the file for the rewards of all answers.
    """
    from megatron_bdpo.training import entry  # imports torch

    if common.asks_for_help(flags):
        click.echo(context.get_help() + "\n")
    with entry.end_told():
        entry.score(flags)
