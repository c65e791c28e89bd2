"""Starting a program: a look at its flags, then the platform, then everything that imports Megatron."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from megatron_bdpo.errors import UserError, visible
from megatron_bdpo.training.failing import FAILURE, is_first_of_launcher, left_alone
from megatron_bdpo.training.flags.first_look import look_at
from megatron_bdpo.training.phases import clock
from megatron_bdpo.training.reporting.notify import notify
from megatron_bdpo.training.reporting.status import end_of_job, forget_status, run_directory, write_status

if TYPE_CHECKING:
    from megatron_bdpo.training.run import PreferenceRun

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
    look_at(argv, "train")
    return _programs().train(argv)


def score(argv: Sequence[str] | None = None) -> list[Path]:
    """Score a job's pairs with its reference, forward only, and keep the scores for its training.

    Args:
        argv: the flags of the training run; those of its steps and its optimizer may be left out.

    Returns:
        The directories with the scores of the training pairs and, if there are any, of the held-out ones. Read them
        with ``megatron_bdpo.training.reference.cache.open_scores``.

    Raises:
        UserError: on every rank, printed once, for anything the user can put right.
    """
    look_at(argv, "score")
    return _programs().score(argv)


def tokenize(argv: Sequence[str] | None = None) -> list[Path]:
    """Tokenize a job's pairs ahead of it, each node its part; its training finds them in the cache.

    Args:
        argv: the flags of the training run; those of model, steps and optimizer may be left out.

    Returns:
        The directories of the training pairs' tokens and, if there are any, of the held-out ones'.

    Raises:
        UserError: on every rank, printed once, for anything the user can put right.
    """
    look_at(argv, "tokenize")
    return _programs().tokenize(argv)


def prepare_platform() -> None:
    """See ``platform.boot``: before anything that imports Megatron."""
    from megatron_bdpo.platform import boot  # imports torch, which a mistake in the flags need not wait for

    boot.prepare_platform()


def _programs() -> ModuleType:
    prepare_platform()
    from megatron_bdpo.training import programs  # imports Megatron, for which the platform has to be prepared

    return programs


def main(argv: Sequence[str] | None = None) -> PreferenceRun:
    """:func:`train` for programs: a UserError ends them with exit code 2 instead of a traceback.

    Of anything else the rank that fails first shows the traceback, and those that fail for want of it a line.
    """
    return _program(train, argv)


def score_main(argv: Sequence[str] | None = None) -> list[Path]:
    """:func:`score` for programs."""
    return _program(score, argv)


def tokenize_main(argv: Sequence[str] | None = None) -> list[Path]:
    """:func:`tokenize` for programs."""
    return _program(tokenize, argv)


def _program[Result](job: Callable[[Sequence[str] | None], Result], argv: Sequence[str] | None) -> Result:
    try:
        with end_told():
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
        if not FAILURE.is_after_others:
            raise
        rank = os.environ.get("RANK", "0")
        print(f"rank {rank}: left after another rank ({_first_line(error)})", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _leave_if_alone() -> None:
    """End this process at once if the other ranks wait for it in a collective: a clean end might wait for them."""
    if left_alone():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def _first_line(error: Exception) -> str:
    return visible(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:120])


@contextlib.contextmanager
def end_told() -> Iterator[None]:
    """Around a program: leave word of how it ends, for a launcher in ``status.json`` and for people by ``BDPO_NOTIFY``.

    A UserError says that there is no use in trying again; anything else leaves ``running``, with its cause.
    """
    forget_status()
    try:
        yield
    except UserError as error:
        if error.is_final:
            write_status("refused", None, reason=str(error))
        _tell_end("crashed", str(error))
        raise
    except SystemExit as leaving:
        _tell_end("crashed" if leaving.code else "", f"exit code {leaving.code}")
        raise
    except Exception as error:
        cause = FAILURE.cause or _first_line(error)
        with contextlib.suppress(OSError):
            write_status("running", None, step=clock().step, of=clock().of, reason=cause)
        _tell_end("crashed", cause)
        raise
    _tell_end("", "")


def _tell_end(otherwise: str, cause: str) -> None:
    """From rank 0, by what it has written of its end, or else of an end that nobody has written of, if there is one."""
    state, reason = end_of_job() or (otherwise, cause)
    if state and is_first_of_launcher():
        notify(state, step=clock().step, of=clock().of, cause=reason, run=run_directory())
