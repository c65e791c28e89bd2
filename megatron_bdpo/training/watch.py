"""Threads beside a job: one on every rank ends all of them when one stands still, one of rank 0 keeps ``status.json``.

The main thread may be stuck where no Python runs: in a read, in a collective, in a kernel. So the watch is a thread. It
hears signals through a pipe that C code writes to, and touches no disk but through helpers that it waits for only so
long. For a main thread that does not let go of the interpreter ``faulthandler`` has a thread in C, which writes the
stacks to stderr and ends the process.

Ranks speak through the launcher's store, on a connection of their own: the job's may be held by the main thread.

What there is elsewhere: Megatron's ``ft_integration`` wants ``ft_launcher`` in torchrun's place and
nvidia-resiliency-ext; it knows set-up, steps and checkpoints, but not what comes before ``pretrain()``, and ends ranks
without their stacks. ``inprocess_restart`` wants the same package. torch's own timeouts see collectives alone; they
stay as they are.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from megatron_bdpo.training import stopping
from megatron_bdpo.training.phases import NOTHING_TO_KEEP, PhaseClock
from megatron_bdpo.training.reporting.status import State
from megatron_bdpo.training.standing import all_standings, cause, leave_stacks, standing_of
from megatron_bdpo.training.watch_board import Board

#: Exit code of ranks that were ended because one stood still: EX_TEMPFAIL, which asks to try again.
HUNG = 75

#: Seconds between two looks.
_POLL = 1.0

#: Seconds for all ranks to say where they are; for files to be written; for the thread in C to wait for us.
_GATHER, _WRITE, _GRACE = 5.0, 10.0, 15.0

#: Seconds between two writings of ``status.json`` in one phase.
_REFRESH = 10.0

#: Seconds after which a job that is asked to stop, and has nothing to keep, is left from here.
_HONOUR = 4.0


class Watch:
    """Of one rank."""

    def __init__(
        self,
        clock: PhaseClock,
        rank: int,
        ranks: int,
        directory: Path | None,
        conclude: Callable[[State, str], None],
        patience: float = 0.0,
    ) -> None:
        """
        Args:
            directory: where stacks are left; None: on stderr.
            conclude: told ``hung`` or ``stopped`` and why, on the one rank that speaks for all. In a thread that is not
                waited for longer than it takes to write a file, and ``patience``.
        """
        self._clock, self._rank, self._ranks = clock, rank, ranks
        self._directory, self._conclude, self._patience = directory, conclude, patience
        self._board = Board(rank, ranks)
        self._others_went_on = time.monotonic()
        self._stop_since = 0.0
        self._reason = ""
        self._has_tried = self._is_present = False
        self._ended = threading.Event()
        self._signals, self._pipe = os.pipe()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block this rank is watched. Called by the main thread."""
        self._board.open()
        os.set_blocking(self._pipe, False)
        hears = threading.current_thread() is threading.main_thread()  # only that one may
        before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False) if hears else -1
        went_well = False
        self._clock.told = self._arm
        self._thread.start()
        try:
            yield
            went_well = True
        except SystemExit as leaving:
            went_well = not leaving.code
            raise
        finally:
            self._ended.set()
            if went_well:
                self._say_present()
            self._clock.told = lambda: None
            if hears:
                signal.set_wakeup_fd(before)
            os.write(self._pipe, b"\0")  # no signal: it need not wait for the next look
            self._thread.join(_WRITE)
            faulthandler.cancel_dump_traceback_later()
            for descriptor in (self._signals, self._pipe):
                os.close(descriptor)
            self._board.close()

    def ask(self, reason: str) -> None:
        """To stop, from the thread that looks at files and the time."""
        self._reason = self._reason or reason

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                for number in filter(None, _signals_from(self._signals)):
                    stopping.hear(number)
                if not self._ended.is_set():
                    self._look()
        except Exception as error:  # a watch that is wrong must end no job
            faulthandler.cancel_dump_traceback_later()
            _print(f"WARNING: rank {self._rank} is no longer watched: {type(error).__name__}: {error}")

    def _look(self) -> None:
        limit, still = self._clock.limit(), self._still()
        self._arm(still)
        if (self._board.ask("hung") or still > limit) and not self._ended.is_set():
            self._end_hung()
        self._look_for_stop()

    def _arm(self, still: float = 0.0) -> None:
        """Should no Python run any more, not even this thread, C ends the process.

        Again at every look, and by the main thread when a phase begins: it may hold the interpreter from there on.
        """
        left = self._clock.limit() - still
        if left == float("inf"):
            faulthandler.cancel_dump_traceback_later()
        else:
            grace = min(_GRACE, 2 * self._clock.limit())
            faulthandler.dump_traceback_later(max(left, 0.0) + grace, exit=True, file=sys.__stderr__ or 2)

    def _still(self) -> float:
        """Seconds since this rank has gone on, or any of those that it waits for."""
        own = self._clock
        if self._board.others_went_on(own.beats, own_count=not own.is_waiting):
            self._others_went_on = time.monotonic()
        since = own.now[1]
        return time.monotonic() - (max(since, self._others_went_on) if own.is_waiting else since)

    # A stop ---------------------------------------------------------------------------------------------------------

    def _look_for_stop(self) -> None:
        """Ask the other ranks to stop when this one is; leave, where the main thread cannot and nothing is lost."""
        own = f"{name} received" if (name := stopping.signal_heard()) else self._reason
        if not (own or self._board.ask("stop")):
            self._stop_since = 0.0
            return
        if not self._stop_since:
            self._stop_since = time.monotonic()
            if own:
                self._board.tell("stop", own)
                self._board.add("stop", 1)  # which ``stopping`` asks
            self._say_present()
        if self._is_left_behind():
            _print(f"rank {self._rank}: left after another rank, which is gone")
            os._exit(1)
        if self._rank == 0:
            self._leave_if_due(own or self._board.ask("stop"))
        elif self._board.ask("leaving"):
            self._board.has_seen("leaving")
            if self._board.await_word("left", 2 * _WRITE + self._patience, self._ended.is_set):
                self._board.has_seen("left")
                os._exit(0)

    def _say_present(self) -> None:
        """This rank hears of stops, or has ended well."""
        if not self._is_present:
            self._is_present = True
            self._board.add("watch/present", 1)

    def _is_left_behind(self) -> bool:
        """Whether a launcher ends this rank because another one has failed: what it waits for will never come."""
        if stopping.signal_heard() != "SIGTERM" or time.monotonic() - self._stop_since < 2 * _HONOUR:
            return False
        return 0 < self._board.add("watch/present", 0) < self._ranks

    def _leave_if_due(self, reason: str) -> None:
        is_due = time.monotonic() - self._stop_since > _HONOUR and not self._ended.is_set()
        if not (is_due and self._clock.now[0] in NOTHING_TO_KEEP) or self._has_tried:
            return
        self._has_tried = True
        self._board.tell("leaving", reason)
        if not self._board.all_have_seen("leaving", 3 * _POLL):
            return  # one has failed, and a launcher stops the others: that is no stop that went well
        _in_time(lambda: self._conclude("stopped", reason), _WRITE + self._patience)
        _print(f"stopped ({reason}) in the phase '{self._clock.now[0]}'; the same command goes on.", descriptor=1)
        self._board.tell("left", reason)
        self._board.all_have_seen("left", 3 * _POLL)
        os._exit(0)

    # A hang ---------------------------------------------------------------------------------------------------------

    def _end_hung(self) -> None:
        """Write the stacks, have one rank tell the cause, and end."""
        faulthandler.cancel_dump_traceback_later()
        name = f"hang-{time.strftime('%Y%m%d-%H%M%S')}"
        name = self._board.first_to_tell("hung", name)
        own = standing_of(self._rank, self._clock)
        self._board.tell(f"standing/{self._rank}", json.dumps(asdict(own)))
        directory = self._directory / name if self._directory else None
        _in_time(lambda: leave_stacks(directory, self._rank), _WRITE)
        found = all_standings(self._board, own, _GATHER)
        if self._rank == min(found):
            reason = cause(found, self._ranks)
            kept = f"The stacks of the ranks are in {directory}" if directory else "The stacks are on stderr"
            _print(
                f"error: {reason}\nadvice: {kept}. The same command goes on; a phase that may take longer: "
                f"--phase-limit {own.phase}=SECONDS."
            )
            _in_time(lambda: self._conclude("hung", reason), _WRITE + self._patience)
            self._board.tell("told", name)
            self._board.all_have_seen("told", 3 * _POLL)
        else:
            self._board.await_word("told", _GATHER + 2 * _WRITE + self._patience)
            self._board.has_seen("told")
        os._exit(HUNG)


def _signals_from(pipe: int) -> bytes:
    """Their numbers, as soon as there are any."""
    return os.read(pipe, 1024) if select.select([pipe], [], [], _POLL)[0] else b""


def _print(text: str, descriptor: int = 2) -> None:
    """Past Python's buffers: the main thread may hold their locks."""
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{text}\n".encode())


def _in_time(work: Callable[[], None], seconds: float) -> None:
    """Do what may never come back, on a disk above all."""

    def attempt() -> None:
        try:
            work()
        except Exception as error:
            _print(f"watch: {type(error).__name__}: {error}")

    helper = threading.Thread(target=attempt, daemon=True)
    helper.start()
    helper.join(seconds)


@contextlib.contextmanager
def keeping(clock: PhaseClock, refresh: Callable[[], None], look: Callable[[], None]) -> Iterator[None]:
    """Inside the block a thread of rank 0 does what touches the disk.

    Args:
        refresh: called when the phase has changed, and when the job has gone on for ten seconds.
        look: called every second.
    """
    ended = threading.Event()

    def run() -> None:
        phase, beats, refreshed = "", -1, 0.0
        while not ended.wait(_POLL):
            with contextlib.suppress(OSError):
                look()
            now, seconds = time.monotonic(), _REFRESH if phase == clock.now[0] else 0.0
            if now - refreshed >= seconds and clock.beats != beats:
                phase, beats, refreshed = clock.now[0], clock.beats, now
                refresh()

    thread = threading.Thread(target=run, name="status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_WRITE)
