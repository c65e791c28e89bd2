"""Jobs in process trees of their own, to be killed: forked from a process that has imported everything already."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

from tests.harness.rendezvous import free_port

GRACE = 10.0
"""Seconds that the launcher leaves ranks to end by themselves after one has failed; torchrun's default is 30."""

ENDED_BY_LAUNCHER = 3
"""The exit code of a job whose last ranks had to be ended."""


class JobTree:
    """A launcher process with its ranks, in a process group of their own.

    Args:
        job: what every rank runs; its result is dropped.
    """

    def __init__(self, world_size: int, job: Callable[[], Any]) -> None:
        port = free_port()
        self._exit: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os._exit(_launch([_fork_rank(rank, world_size, port, job) for rank in range(world_size)]))

    def ended(self) -> bool:
        """Whether the job is over, killed or not."""
        if self._exit is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._exit = os.waitstatus_to_exitcode(status)
                self._clean_up()
        return self._exit is not None

    def wait(self, timeout: float = 120) -> int:
        """The exit code; the job is killed if it takes too long."""
        deadline = time.monotonic() + timeout
        while not self.ended():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"the job has not ended within {timeout} s")
            time.sleep(0.005)
        assert self._exit is not None
        return self._exit

    def kill(self) -> None:
        """SIGKILL to all of the tree at once."""
        if not self.ended():
            self._clean_up()
            _, status = os.waitpid(self.pid, 0)
            self._exit = os.waitstatus_to_exitcode(status)

    def _clean_up(self) -> None:
        """As a batch system does with a job's processes: Megatron's helpers of a killed rank would stay for ever."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _launch(ranks: list[int]) -> int:
    """Wait for the ranks as torchrun does: those that do not follow one that has failed are ended. The exit code."""
    left, code, deadline = {*ranks}, 0, float("inf")
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        left.discard(pid)
        if status and not code:
            code, deadline = 1, time.monotonic() + GRACE
        if not pid and time.monotonic() > deadline:
            code, deadline = ENDED_BY_LAUNCHER, float("inf")
            for rank in left:
                os.kill(rank, signal.SIGKILL)
        time.sleep(0 if pid else 0.005)
    return code


def _fork_rank(rank: int, world_size: int, port: int, job: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored for what it starts with &
    try:
        job()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
