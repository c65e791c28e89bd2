"""Starting a preference job: the platform first, then everything that imports Megatron."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bdpo.display import Block, show
from megatron_bdpo.errors import UserError
from megatron_bdpo.platform.boot import prepare_platform

if TYPE_CHECKING:
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.run import PreferenceRun
    from megatron_bdpo.training.settings import Settings

#: Set to anything, programs show the traceback of what the user can put right, too.
DEBUG = "MEGATRON_BDPO_DEBUG"


def train(argv: Sequence[str] | None = None) -> PreferenceRun:
    """Run a whole preference job from its flags, as ``examples/pretrain_bdpo.py`` does.

    Args:
        argv: Megatron's flags and ours; ``sys.argv[1:]`` when None.

    Returns:
        The finished run; its ``progress`` holds the metrics on the last rank.

    Raises:
        UserError: on every rank, printed once, for anything the user can put right.
        SystemExit: when Megatron's loop ends early (``--exit-interval``, a signal, ...), after its checkpoint, and at
            the end of a ``--dry-run``.
    """
    prepare_platform()
    from megatron_bdpo.training.run import PreferenceRun

    arguments = _parse(argv)
    settings = arguments.settings
    if settings.dry_run.is_wanted:
        show(*_dry_run(arguments))
        raise SystemExit(0)
    with _ranks(settings):
        run = PreferenceRun(arguments)
        run.pretrain()
        run.print_table()
    return run


def _parse(argv: Sequence[str] | None) -> Arguments:
    from megatron_bdpo.training.flags import arguments, determinism

    parsed = arguments.Arguments.parse(argv)
    determinism.settle_environment(parsed.settings)
    return parsed


def _dry_run(arguments: Arguments) -> list[Block]:
    from megatron_bdpo.training.distributed import process_groups
    from megatron_bdpo.training.dry_run import dry_run, make_up_ranks

    make_up_ranks(arguments)
    with process_groups(arguments.settings.process):
        return dry_run(arguments)


@contextlib.contextmanager
def _ranks(settings: Settings) -> Iterator[None]:
    """This process as one of the ranks, with Megatron's own lines where they are wanted."""
    from megatron_bdpo.training.distributed import process_groups
    from megatron_bdpo.training.reporting.console import megatron_in_file

    output: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if settings.output.megatron_output == "file":
        # Megatron prints on the first and the last rank.
        process, save = settings.process, settings.directories.save
        is_first, is_last = process.rank == 0, process.rank == process.ranks - 1
        name = "megatron.log" if is_first else "megatron-last-rank.log"
        output = megatron_in_file(Path(save) / name if save and (is_first or is_last) else None)
    with process_groups(settings.process), output:
        yield


def score(argv: Sequence[str] | None = None) -> list[Path]:
    """Score a job's pairs with its reference, forward only, and keep the scores for its training.

    Args:
        argv: the flags of the training; those of its steps and its optimizer may be left out.

    Returns:
        The directories with the scores of the training pairs and, if there are any, of the held-out ones. Read them
        with ``megatron_bdpo.training.reference.cache.open_scores``.

    Raises:
        UserError: on every rank, printed once, for anything the user can put right.
    """
    prepare_platform()
    from megatron_bdpo.training.reference.scoring_job import score_pairs

    arguments = _parse(argv)
    with _ranks(arguments.settings):
        return score_pairs(arguments)


def main(argv: Sequence[str] | None = None) -> PreferenceRun:
    """:func:`train` for programs: a UserError ends them with exit code 2 instead of a traceback.

    Of anything else the rank that fails first shows the traceback, and those that fail for want of it a line.
    """
    return _program(train, argv)


def score_main(argv: Sequence[str] | None = None) -> list[Path]:
    """:func:`score` for programs."""
    return _program(score, argv)


def _program[Result](job: Callable[[Sequence[str] | None], Result], argv: Sequence[str] | None) -> Result:
    try:
        with refusals_told():
            return job(argv)
    except UserError as error:
        if os.environ.get(DEBUG):
            raise
        # Before the ranks know of each other each node tells its own: a recipe may be missing on one of them alone.
        if not error.shown and int(os.environ.get("LOCAL_RANK", "0")) == 0:
            node = f" on {socket.gethostname()}" if os.environ.get("RANK", "0") != "0" else ""
            print(error.as_text(node), file=sys.stderr, flush=True)
        _leave_if_alone()
        raise SystemExit(2) from None
    except Exception as error:
        from megatron_bdpo.training.distributed import failed_after_others

        if not failed_after_others():
            raise
        rank = os.environ.get("RANK", "0")
        print(f"rank {rank}: left after another rank ({_first_line(error)})", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _leave_if_alone() -> None:
    """End this process at once if the other ranks wait for it in a collective: a clean end might wait for them."""
    from megatron_bdpo.training.distributed import left_alone

    if left_alone():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:120]


@contextlib.contextmanager
def refusals_told() -> Iterator[None]:
    """If the block ends with a UserError, leave word for the launcher that there is no use in trying again."""
    try:
        yield
    except UserError as error:
        from megatron_bdpo.training.reporting.status import write_status

        if error.is_final:
            write_status("refused", None, reason=str(error))
        raise
