"""Real gloo ranks that stay warm between tests, and show the traceback of the rank that failed first.

Starting a rank means importing torch and Megatron (6 s). A server process does that once per session (``warm.py``), and
all ranks of all pools are forked from it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

from tests.harness.rendezvous import meet_in, serve_store

SHOW_STACKS = signal.SIGUSR2
"""A rank that gets it writes where its threads are to its log, and goes on."""


class RankFailure(AssertionError):
    """A rank raised; the message is its traceback."""


class RankPool:
    """``world_size`` processes that run functions together, each as one rank.

    Functions and arguments travel by pickle, so functions have to be at module level.
    """

    def __init__(self, world_size: int, log_dir: Path) -> None:
        self.world_size = world_size
        self.log_dir = log_dir
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._store: Any = None

    def __call__(self, function: Callable[..., Any], *args: Any, timeout: float = 240, **kwargs: Any) -> list[Any]:
        """Run ``function(*args, **kwargs)`` on every rank. Returns the results by rank.

        Raises:
            RankFailure: with the traceback of the first rank to fail; the pool restarts at its next use.
        """
        self._start()
        self._store = serve_store()
        for pipe in self._pipes:
            pipe.send((function, args, kwargs, self._store.port))
        results: list[Any] = [None] * self.world_size
        pending = dict(enumerate(self._pipes))
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending.values()), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"ranks {sorted(pending)} have not answered within {timeout} s", hanging=sorted(pending))
            for rank in [rank for rank, pipe in pending.items() if pipe in ready]:
                try:
                    succeeded, value = pending.pop(rank).recv()
                except EOFError:
                    self._fail(f"rank {rank} died")
                if not succeeded:
                    self._fail(f"rank {rank} of {self.world_size} raised:\n{value}")
                results[rank] = value
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # with what the rank has started: checkpoint writers outlive it
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        self.close()
        context = start_server()
        for rank in range(self.world_size):
            here, there = context.Pipe()
            log = self.log_dir / f"rank{rank}of{self.world_size}.log"
            process = context.Process(target=_serve, args=(there, rank, self.world_size, log))
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def _fail(self, message: str, hanging: list[int] | None = None) -> None:
        """Raise with the end of the log of rank 0, or of each rank that hangs, below the stacks of its threads."""
        for rank in hanging or []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, SHOW_STACKS)
        if hanging:
            time.sleep(1)
        self.close()
        lines = 100 if hanging else 15
        raise RankFailure("\n".join([message, *(self._end_of_log(rank, lines) for rank in hanging or [0])]))

    def _end_of_log(self, rank: int, lines: int) -> str:
        log = self.log_dir / f"rank{rank}of{self.world_size}.log"
        tail = log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
        return "\n".join([f"--- end of {log} ---", *tail])


def start_server() -> Any:
    """Start the process that ranks are forked from, unless it runs. Returns its ``multiprocessing`` context.

    Not this process: it has threads and pytest's state. The server's environment is that of its ranks. Where there is a
    GPU each rank starts by itself: a process that has asked for CUDA devices cannot be forked.
    """
    if Path("/dev/nvidiactl").exists():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.warm"])
    search = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, dict.fromkeys(search)))):
        multiprocessing.forkserver.ensure_running()
    return context


def _serve(pipe: Connection, rank: int, world_size: int, log: Path) -> None:
    """A rank's life: run what comes through the pipe."""
    os.setsid()
    output = log.open("w", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    faulthandler.register(SHOW_STACKS, file=output, all_threads=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    )
    from tests.harness import warm  # noqa: F401  # has been imported before the fork, if there was one
    from tests.harness.writers import fork_writers

    fork_writers()
    while True:
        try:
            function, args, kwargs, port = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        meet_in(port)
        try:
            answer = (True, function(*args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        # Models and optimizers are in reference cycles, and with them their process groups: gloo's threads would go on,
        # polling connections that nobody uses, until they take more time than the tests.
        gc.collect()
        _give_back_memory()
        with contextlib.suppress(BrokenPipeError):
            pipe.send(answer)


def _give_back_memory() -> None:
    """glibc keeps what tensors below 32 MB have left: over a GiB after a model of 135 million parameters."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
