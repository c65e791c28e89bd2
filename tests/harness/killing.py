"""Jobs in process trees of their own, to be killed: forked from a process that has imported everything already."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any


class JobTree:
    """A launcher process with its ranks, in a process group of their own.

    Args:
        job: what every rank runs; its result is dropped.
    """

    def __init__(self, world_size: int, job: Callable[[], Any]) -> None:
        port = _free_port()
        self._exit: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            ranks = [_fork_rank(rank, world_size, port, job) for rank in range(world_size)]
            failed = [status for _, status in (os.waitpid(pid, 0) for pid in ranks) if status]
            os._exit(1 if failed else 0)

    def ended(self) -> bool:
        """Whether the job is over, killed or not."""
        if self._exit is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._exit = os.waitstatus_to_exitcode(status) if pid else None
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
            os.killpg(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self._exit = os.waitstatus_to_exitcode(status)


def _fork_rank(rank: int, world_size: int, port: int, job: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        job()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
