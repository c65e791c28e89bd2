"""Being asked to stop: a signal on any rank, or a file that rank 0 sees. All ranks hear of it at the same moment.

Megatron's loop asks its signal handler after each step and, when one of the ranks has had a signal, saves a checkpoint
and exits. We answer in the handler's place (``platform.seams``), because a batch script can signal neither srun nor
torchrun without killing the ranks: it touches a file instead. Scoring the reference asks too; it has no loop of
Megatron's around it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch

from megatron_bdpo.training.distributed import gather, is_raised, is_rank_zero, sum_over_ranks


class StopRequested(SystemExit):
    """Raised on all ranks to leave before the first step; ``code`` is 0, as when Megatron's loop ends early."""

    def __init__(self, reason: str) -> None:
        super().__init__(0)
        self.reason = reason


_ELSEWHERE = "another rank was asked to"


class StopRequest:
    """Collects requests to stop."""

    def __init__(self, files: Sequence[str] = ()) -> None:
        """
        Args:
            files: any of them asks to stop by being there. Rank 0 looks.
        """
        self.reason = ""
        """Why the run is to stop, once ``signals_received`` or ``leave_if_asked`` has said so; else empty."""
        self._files = [Path(file) for file in files]
        self._signal = ""
        self._left = ""

    @contextlib.contextmanager
    def listening(self, *signals: signal.Signals) -> Iterator[None]:
        """Inside the block the signals ask to stop, instead of ending this process at once."""
        if threading.current_thread() is not threading.main_thread():  # only the main one may set handlers
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in {*signals}}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def signals_received(self) -> list[bool]:
        """What ``megatron.training.dist_signal_handler.DistributedSignalHandler`` answers. Collective."""
        own = self._own_reason()
        if sum_over_ranks(torch.tensor([float(bool(own))])).item() and not self.reason:
            self.reason = next(filter(None, gather(own)))
        return [bool(self.reason)]

    def _own_reason(self) -> str:
        if self._signal:
            return f"{self._signal} received"
        return self._file_there() if is_rank_zero() else ""

    def _file_there(self) -> str:
        return next((f"{file} is there" for file in self._files if file.exists()), "")

    def leave_if_asked(self) -> None:
        """For the places before the first step. Collective.

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
        """Where ranks work on their own. Not collective.

        Raises:
            StopRequested: on this rank.
        """
        own = f"{self._signal} received" if self._signal else self._file_there()
        if is_raised("stop", here=bool(own)):
            raise StopRequested(own or _ELSEWHERE)
