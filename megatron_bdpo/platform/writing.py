"""No process beside a rank for what the rank does itself: how Megatron's checkpoint writer hands over its results."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator


@contextlib.contextmanager
def written_by_this_process() -> Iterator[None]:
    """Checkpoints saved inside the block, without ``--async-save``, are written without a second process.

    The writer's threads report through a queue that a process of its own serves, which Megatron starts at the first
    save whoever writes. Where the rank writes by itself, one within the process does. The other costs 0.3 GB of memory
    for each rank, imports torch once more, and outlives a rank that is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before
