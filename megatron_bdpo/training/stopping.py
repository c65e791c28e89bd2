"""Being asked to stop: a signal on any rank, a file that rank 0 sees, a time that is over. All ranks hear of it.

Megatron's loop asks its signal handler after each step and, when one of the ranks has had a signal, saves a checkpoint
and exits. We answer in the handler's place (``platform.seams``), because a batch script can signal neither srun nor
torchrun without killing the ranks: it touches a file instead. All other phases ask too, between two units of their
work: before the first step and after the last there is no loop of Megatron's.

A first Ctrl-C asks for what SIGTERM asks for; a second one ends the process where it is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Self

import torch

from megatron_bdpo.training.distributed import gather, is_raised, is_rank_zero, sum_over_ranks
from megatron_bdpo.training.phases import beat
from megatron_bdpo.training.settings import Settings

#: ``--exit-duration-in-mins`` counts from here, and Megatron's own count from its import a moment later.
_BEGAN = time.monotonic()

#: Seconds in which a second Ctrl-C is the first one, passed on by a launcher too.
_SAME = 1.0

#: Exit code of a process that SIGINT ends.
_INTERRUPTED = 128 + signal.SIGINT


class StopRequested(SystemExit):
    """Raised on all ranks to leave before the first step; ``code`` is 0, as when Megatron's loop ends early."""

    def __init__(self, reason: str) -> None:
        super().__init__(0)
        self.reason = reason


_ELSEWHERE = "another rank was asked to"


@dataclass
class _Ear:
    """The signals of this process: one set of handlers, whoever listens."""

    listeners: int = 0
    signal: str = ""
    """The first that was heard."""
    interrupted: dict[str, float] = field(default_factory=dict)
    """When the first Ctrl-C was, by who has heard it."""

    def hear(self, number: int, by: str) -> None:
        """From a handler, which Python runs between two instructions of the main thread, or from a thread."""
        self.signal = self.signal or signal.Signals(number).name
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self.interrupted.setdefault(by, now) > _SAME:
                os.write(2, b"interrupted again: left at once\n")
                os._exit(_INTERRUPTED)


_ear = _Ear()


def hear(number: int) -> None:
    """From a thread that hears of signals while the main thread cannot; see ``watch``. Unknown ones are left."""
    if _ear.listeners and signal.getsignal(number) is _receive:
        _ear.hear(number, "thread")


def signal_heard() -> str:
    """Name of the signal that has asked this process to stop; empty if none has."""
    return _ear.signal


def _receive(number: int, frame: FrameType | None) -> None:
    _ear.hear(number, "handler")


@contextlib.contextmanager
def listening(*signals: signal.Signals) -> Iterator[None]:
    """Inside the block SIGTERM, SIGINT and these ask to stop, instead of ending this process at once.

    A signal that was heard is forgotten when nobody listens any more.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main one may set handlers
        yield
        return
    wanted = {signal.SIGTERM, signal.SIGINT, *signals}
    before = {number: old for number in wanted if (old := signal.getsignal(number)) is not _receive}
    for number in before:
        signal.signal(number, _receive)
    _ear.listeners += 1
    try:
        yield
    finally:
        _ear.listeners -= 1
        for number, handler in before.items():
            signal.signal(number, handler)
        if not _ear.listeners:
            _ear.signal = ""
            _ear.interrupted.clear()


class StopRequest:
    """Collects requests to stop."""

    def __init__(self, files: Sequence[str] = (), minutes: float | None = None) -> None:
        """
        Args:
            files: any of them asks to stop by being there. Rank 0 looks.
            minutes: of the process, after which it is to stop.
        """
        self.reason = ""
        """Why the run is to stop, once ``signals_received`` or ``leave_if_asked`` has said so; else empty."""
        self._files = [Path(file) for file in files]
        self._minutes = minutes
        self._left = ""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """As a job's flags have it."""
        return cls(settings.checkpoints.stop_file or (), settings.schedule.exit_duration_in_mins)

    def signals_received(self) -> list[bool]:
        """What ``megatron.training.dist_signal_handler.DistributedSignalHandler`` answers. Collective."""
        own = self._own_reason()
        if sum_over_ranks(torch.tensor([float(bool(own))])).item() and not self.reason:
            self.reason = next(filter(None, gather(own)))
        return [bool(self.reason)]

    def _own_reason(self) -> str:
        if _ear.signal:
            return f"{_ear.signal} received"
        return self.reason_of_rank_zero() if is_rank_zero() else ""

    def reason_of_rank_zero(self) -> str:
        """What only one rank looks at: files and the time."""
        if self._minutes and time.monotonic() - _BEGAN > self._minutes * 60:
            return f"--exit-duration-in-mins {self._minutes:g} is over"
        return next((f"{file} is there" for file in self._files if file.exists()), "")

    def leave_if_asked(self) -> None:
        """Between two units of work outside of Megatron's loop. Collective.

        Raises:
            StopRequested: on all ranks.
        """
        if any(self.signals_received()):
            raise StopRequested(self.reason)

    @contextlib.contextmanager
    def working_alone(self) -> Iterator[None]:
        """The block is work that ranks do on their own; one that leaves it, by :meth:`leave_alone_if_asked`, goes on
        behind it, to :meth:`leave_together`."""
        try:
            yield
        except StopRequested as stopped:
            self._left = stopped.reason

    def leave_together(self) -> None:
        """After work that some rank has left. Collective.

        Raises:
            StopRequested: on all ranks.
        """
        if reasons := list(filter(None, gather(self._left))):
            raise StopRequested(min(reasons, key=_ELSEWHERE.__eq__))

    def leave_alone_if_asked(self) -> None:
        """Between two units of work that ranks do on their own. Not collective.

        Raises:
            StopRequested: on this rank.
        """
        beat()
        own = f"{_ear.signal} received" if _ear.signal else self.reason_of_rank_zero()
        if is_raised("stop", here=bool(own)):
            raise StopRequested(own or _ELSEWHERE)
