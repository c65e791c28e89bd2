"""The process beside a rank that writes checkpoints: none where the rank writes by itself, another where it died."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, PersistentAsyncCaller


@contextlib.contextmanager
def written_by_this_process() -> Iterator[None]:
    """Checkpoints saved inside the block, without ``--async-save``, are written without a second process.

    The writer's threads report through a queue that a process of its own serves, which Megatron starts at the first
    save whoever writes. Where the rank writes by itself, one within the process does. The other costs 0.3 GB of memory
    for each rank, imports torch once more, and outlives a rank that is killed.
    """
    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


def replace_dead_writer() -> None:
    """With ``--async-save``: forget a process for writing that died between two checkpoints; Megatron starts another.

    Megatron would hand it the next checkpoint and wait for ever. It dies by a signal of the system (out of memory), or
    by its own collection of garbage after a write that failed, which ends CPython 3.12 with a fault.
    """
    process = PersistentAsyncCaller._persistent_process
    if process is None or process.is_alive():
        return
    print(f"the process that wrote checkpoints has died (exit code {process.exitcode}); another is started", flush=True)
    PersistentAsyncCaller._persistent_process = None
    PersistentAsyncCaller._persistent_queue = None
    PersistentAsyncCaller._persistent_preload_q = None
    PersistentAsyncCaller._persistent_comp_q = None
    if AsyncCallsQueue._persistent_caller is not None:
        AsyncCallsQueue._persistent_caller.process = None
