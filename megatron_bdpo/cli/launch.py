"""A training run on several ranks of this machine, through torchrun."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence

import click
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def launch(ranks: int, flags: Sequence[str]) -> None:
    """Run ``torchrun -m megatron_bdpo.train`` with the flags.

    Raises:
        SystemExit: a rank has failed; 2 where the ranks have said what the user can put right.
    """
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
