"""The programs: training, its dry run, scoring, tokenizing. Imported once the platform is prepared: see ``entry``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_bdpo.training import token_stores
from megatron_bdpo.training.distributed import process_groups, say
from megatron_bdpo.training.dry_run import dry_run, make_up_ranks
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.flags.determinism import settle_environment
from megatron_bdpo.training.phases import PhaseLimits, start_clock
from megatron_bdpo.training.reference.scoring_job import score_pairs
from megatron_bdpo.training.reporting.console import megatron_in_file, show, status_line
from megatron_bdpo.training.reporting.notify import limit, notify
from megatron_bdpo.training.reporting.status import ENVIRONMENT as STATUS_FILE
from megatron_bdpo.training.reporting.status import State, refresh_status, write_status
from megatron_bdpo.training.run import PreferenceRun, tables
from megatron_bdpo.training.settings import Settings
from megatron_bdpo.training.stopping import StopRequest, StopRequested, listening
from megatron_bdpo.training.watch import Watch, keeping


def train(argv: Sequence[str] | None) -> PreferenceRun:
    """See ``entry.train``."""
    arguments = _parse(argv)
    if arguments.settings.dry_run.is_wanted:
        make_up_ranks(arguments)
        with process_groups(arguments.settings.process):
            show(*dry_run(arguments))
        raise SystemExit(0)
    save = arguments.settings.directories.save
    with _ranks(arguments.settings, save):
        with _stop_told(save):
            run = PreferenceRun(arguments)
        with status_line():
            run.pretrain()
        if run.settings.process.is_last:  # Megatron has taken its groups down
            show(*tables(run))
    return run


def score(argv: Sequence[str] | None) -> list[Path]:
    """See ``entry.score``."""
    arguments = _parse(argv)
    with _ranks(arguments.settings):
        return score_pairs(arguments)


def tokenize(argv: Sequence[str] | None) -> list[Path]:
    """See ``entry.tokenize``."""
    arguments = _parse(argv)
    with _ranks(arguments.settings), _stop_told(None):
        stores = token_stores.tokenize(arguments)
        write_status("finished", None)
        return [store.directory for store in stores]


@contextlib.contextmanager
def _stop_told(save: str | None) -> Iterator[None]:
    """If the block is left because of a request to stop, say so, and leave word for the launcher."""
    try:
        yield
    except StopRequested as stopped:
        write_status("stopped", save, reason=stopped.reason)
        say(f"stopped ({stopped.reason}); the same command goes on.")
        raise


def _parse(argv: Sequence[str] | None) -> Arguments:
    arguments = Arguments.parse(argv)
    settle_environment(arguments.settings)
    return arguments


@contextlib.contextmanager
def _ranks(settings: Settings, save: str | None = None) -> Iterator[None]:
    """This process as one of the ranks, with Megatron's own lines where they are wanted.

    Args:
        save: where a hang, or a stop before the job is set up, leaves its status.
    """
    output: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if settings.output.megatron_output == "file":
        # Megatron prints on the first and the last rank.
        process, save = settings.process, settings.directories.save
        is_first, is_last = process.rank == 0, process.is_last
        name = "megatron.log" if is_first else "megatron-last-rank.log"
        output = megatron_in_file(Path(save) / name if save and (is_first or is_last) else None)
    with (
        process_groups(settings.process),
        output,
        listening(settings.schedule.exit_signal),
        _watched(settings, save),
    ):
        yield


@contextlib.contextmanager
def _watched(settings: Settings, save: str | None) -> Iterator[None]:
    """Inside the block a rank that stands still ends the job; see ``watch``."""
    process, stop = settings.process, StopRequest.of(settings)
    own = start_clock(PhaseLimits.parse(settings.watch.phase_limit or ()))
    status_file = os.environ.get(STATUS_FILE)
    directory = settings.directories.save or (status_file and str(Path(status_file).parent))

    def conclude(state: State, cause: str) -> None:
        write_status(state, save, step=own.step, of=own.of, reason=cause, by_any_rank=True)
        notify(state, step=own.step, of=own.of, cause=cause, run=save or "")

    watch = Watch(own, process.rank, process.ranks, Path(directory) if directory else None, conclude, limit())
    kept: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if process.rank == 0:
        kept = keeping(own, refresh_status, lambda: watch.ask(stop.reason_of_rank_zero()))
    with watch.watching(), kept:
        yield
