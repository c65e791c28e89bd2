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
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import distributed

from megatron_bdpo.training import stopping
from megatron_bdpo.training.phases import NOTHING_TO_KEEP, PhaseClock
from megatron_bdpo.training.reporting.status import State

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


@dataclass(frozen=True)
class Standing:
    """Where a rank is."""

    rank: int
    host: str
    phase: str
    seconds: float
    """Since it has last gone on."""
    limit: float
    waits: bool
    """In a collective, as far as Python sees."""
    place: str
    """The innermost line of code outside of torch."""


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
        self._host = socket.gethostname()
        self._main = threading.main_thread().ident
        self._store: Any = None
        self._told_beats = self._all_beats = 0
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
        if self._ranks > 1:
            store: Any = distributed.distributed_c10d._get_default_store()
            self._store = store.clone()
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
            self._store = None

    def ask(self, reason: str) -> None:
        """To stop, from the thread that looks at files and the time."""
        self._reason = self._reason or reason

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                for number in filter(None, self._heard()):
                    stopping.hear(number)
                if not self._ended.is_set():
                    self._look()
        except Exception as error:  # a watch that is wrong must end no job
            faulthandler.cancel_dump_traceback_later()
            _print(f"WARNING: rank {self._rank} is no longer watched: {type(error).__name__}: {error}")

    def _look(self) -> None:
        limit, still = self._clock.limit(), self._still()
        self._arm(still)
        if (self._ask("hung") or still > limit) and not self._ended.is_set():
            self._end_hung()
        self._look_for_stop()

    def _heard(self) -> bytes:
        """Signals, as soon as there are any."""
        if select.select([self._signals], [], [], _POLL)[0]:
            return os.read(self._signals, 1024)
        return b""

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
        own, beats = self._clock, self._clock.beats
        try:
            if self._store is not None:
                # A rank that waits has nothing to say for the others.
                fresh = 0 if own.is_waiting else beats - self._told_beats
                found = self._store.add("megatron_bdpo/beats", fresh)
                self._told_beats = beats
                if found != self._all_beats:
                    self._all_beats, self._others_went_on = found, time.monotonic()
        except RuntimeError:  # the store is gone with its rank, and this one will be ended
            self._store = None
        since = own.now[1]
        return time.monotonic() - (max(since, self._others_went_on) if own.is_waiting else since)

    # A stop ---------------------------------------------------------------------------------------------------------

    def _look_for_stop(self) -> None:
        """Ask the other ranks to stop when this one is; leave, where the main thread cannot and nothing is lost."""
        own = f"{name} received" if (name := stopping.signal_heard()) else self._reason
        if not (own or self._ask("stop")):
            self._stop_since = 0.0
            return
        if not self._stop_since:
            self._stop_since = time.monotonic()
            if own:
                self._tell("stop", own)
                self._add("megatron_bdpo/stop", 1)  # which ``stopping`` asks
            self._say_present()
        if self._is_left_behind():
            _print(f"rank {self._rank}: left after another rank, which is gone")
            os._exit(1)
        if self._rank == 0:
            self._leave_if_due(own or self._ask("stop"))
        elif self._ask("leaving"):
            self._add("megatron_bdpo/watch/seen/leaving", 1)
            deadline = time.monotonic() + 2 * _WRITE + self._patience
            while not self._ask("left") and time.monotonic() < deadline and not self._ended.is_set():
                time.sleep(0.05)
            if self._ask("left"):
                self._add("megatron_bdpo/watch/seen/left", 1)
                os._exit(0)

    def _say_present(self) -> None:
        """This rank hears of stops, or has ended well."""
        if not self._is_present:
            self._is_present = True
            self._add("megatron_bdpo/watch/present", 1)

    def _is_left_behind(self) -> bool:
        """Whether a launcher ends this rank because another one has failed: what it waits for will never come."""
        if stopping.signal_heard() != "SIGTERM" or time.monotonic() - self._stop_since < 2 * _HONOUR:
            return False
        return 0 < self._add("megatron_bdpo/watch/present", 0) < self._ranks

    def _leave_if_due(self, reason: str) -> None:
        is_due = time.monotonic() - self._stop_since > _HONOUR and not self._ended.is_set()
        if not (is_due and self._clock.now[0] in NOTHING_TO_KEEP) or self._has_tried:
            return
        self._has_tried = True
        self._tell("leaving", reason)
        if not self._all_have_seen("leaving"):
            return  # one has failed, and a launcher stops the others: that is no stop that went well
        _in_time(lambda: self._conclude("stopped", reason), _WRITE + self._patience)
        _print(f"stopped ({reason}) in the phase '{self._clock.now[0]}'; the same command goes on.", descriptor=1)
        self._tell("left", reason)
        self._all_have_seen("left")
        os._exit(0)

    # A hang ---------------------------------------------------------------------------------------------------------

    def _end_hung(self) -> None:
        """Write the stacks, have one rank tell the cause, and end."""
        faulthandler.cancel_dump_traceback_later()
        name = f"hang-{time.strftime('%Y%m%d-%H%M%S')}"
        name = self._first_to_tell("hung", name)
        own = self._standing()
        self._tell(f"standing/{self._rank}", json.dumps(asdict(own)))
        _in_time(lambda: self._leave_stacks(name), _WRITE)
        found = self._all_standings(own)
        if self._rank == min(found):
            reason = cause(found, self._ranks)
            where = self._directory / name if self._directory else "stderr"
            kept = f"The stacks of the ranks are in {where}" if self._directory else f"The stacks are on {where}"
            _print(
                f"error: {reason}\nadvice: {kept}. The same command goes on; a phase that may take longer: "
                f"--phase-limit {own.phase}=SECONDS."
            )
            _in_time(lambda: self._conclude("hung", reason), _WRITE + self._patience)
            self._tell("told", name)
            self._all_have_seen("told")
        else:
            deadline = time.monotonic() + _GATHER + 2 * _WRITE + self._patience
            while not self._ask("told") and self._store is not None and time.monotonic() < deadline:
                time.sleep(0.1)
            self._add("megatron_bdpo/watch/seen/told", 1)
        os._exit(HUNG)

    def _standing(self) -> Standing:
        phase, since = self._clock.now
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame) if frame else []
        outside = [each for each in stack if "/torch/" not in each.filename and "<" not in each.filename]
        place = f"{Path(outside[-1].filename).name}:{outside[-1].lineno} {outside[-1].name}" if outside else "?"
        waits = self._clock.is_waiting or any("/torch/distributed/" in each.filename for each in stack[-8:])
        seconds, limit = time.monotonic() - since, self._clock.limit()
        return Standing(self._rank, self._host, phase, seconds, limit, waits, place)

    def _all_standings(self, own: Standing) -> dict[int, Standing]:
        """Of the ranks that answer in time."""
        found, deadline = {self._rank: own}, time.monotonic() + _GATHER
        while len(found) < self._ranks and self._store is not None and time.monotonic() < deadline:
            for rank in range(self._ranks):
                if rank not in found and (told := self._ask(f"standing/{rank}")):
                    found[rank] = Standing(**json.loads(told))
            time.sleep(0.05)
        return found

    def _leave_stacks(self, name: str) -> None:
        file = sys.__stderr__
        with contextlib.ExitStack() as until_written:
            if self._directory:
                directory = self._directory / name
                directory.mkdir(parents=True, exist_ok=True)
                file = until_written.enter_context((directory / f"rank-{self._rank:05}.txt").open("w"))
            faulthandler.dump_traceback(file=file or 2, all_threads=True)
            if self._directory and "nccl" in distributed.get_backend():
                # What torch's flight recorder has, for its own tool (torchfrtrace) to compare.
                recorded: bytes = distributed.distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
                (directory / f"nccl_trace_rank_{self._rank}").write_bytes(recorded)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()

    # The store ------------------------------------------------------------------------------------------------------

    def _ask(self, key: str) -> str:
        """What a rank has told under a key; empty where none has, or nobody can be asked."""
        with contextlib.suppress(RuntimeError):
            if self._store is not None and self._store.check([f"megatron_bdpo/watch/{key}"]):
                return str(self._store.get(f"megatron_bdpo/watch/{key}").decode())
        return ""

    def _tell(self, key: str, value: str) -> None:
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                self._store.set(f"megatron_bdpo/watch/{key}", value or "?")

    def _first_to_tell(self, key: str, value: str) -> str:
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                return str(self._store.compare_set(f"megatron_bdpo/watch/{key}", "", value).decode())
        return value

    def _add(self, key: str, count: int) -> int:
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                return int(self._store.add(key, count))
        return 0

    def _all_have_seen(self, key: str) -> bool:
        """Whether all other ranks say so, soon. This one may hold the store: it goes last."""
        deadline = time.monotonic() + 3 * _POLL
        while self._ranks > 1 and time.monotonic() < deadline:
            if self._add(f"megatron_bdpo/watch/seen/{key}", 0) >= self._ranks - 1:
                return True
            time.sleep(0.05)
        return self._ranks == 1


def cause(found: dict[int, Standing], ranks: int) -> str:
    """One line: who stands still. A rank that does not answer; else those that wait for nobody; else the longest."""
    if silent := [str(rank) for rank in range(ranks) if rank not in found]:
        other = max(found.values(), key=lambda each: each.seconds)
        listed = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(silent[:8])}"
        return (
            f"{listed} did not answer; in the phase '{other.phase}' the others have waited for {other.seconds:.0f} s "
            f"(limit {other.limit:.0f} s)"
        )
    busy = [each for each in found.values() if not each.waits] or list(found.values())
    first = max(busy, key=lambda each: each.seconds)
    return (
        f"rank {first.rank} ({first.host}) stood still in the phase '{first.phase}' for {first.seconds:.0f} s (limit "
        f"{first.limit:.0f} s), in {first.place}"
    )


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
