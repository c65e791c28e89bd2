"""Where a rank stands: its phase, since when, and in which line; its stacks; and who of all ranks is the cause."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from torch import distributed

from megatron_bdpo.training.phases import PhaseClock
from megatron_bdpo.training.watch_board import Board


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


def standing_of(rank: int, clock: PhaseClock) -> Standing:
    """Of this process, whose main thread does the work."""
    phase, since = clock.now
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame) if frame else []
    outside = [each for each in stack if "/torch/" not in each.filename and "<" not in each.filename]
    place = f"{Path(outside[-1].filename).name}:{outside[-1].lineno} {outside[-1].name}" if outside else "?"
    waits = clock.is_waiting or any("/torch/distributed/" in each.filename for each in stack[-8:])
    return Standing(rank, socket.gethostname(), phase, time.monotonic() - since, clock.limit(), waits, place)


def leave_stacks(directory: Path | None, rank: int) -> None:
    """The stacks of all threads into a file of this rank, and what NCCL's flight recorder has; None: on stderr."""
    file = sys.__stderr__
    with contextlib.ExitStack() as until_written:
        if directory:
            directory.mkdir(parents=True, exist_ok=True)
            file = until_written.enter_context((directory / f"rank-{rank:05}.txt").open("w"))
        faulthandler.dump_traceback(file=file or 2, all_threads=True)
        if directory and "nccl" in distributed.get_backend():
            # What torch's flight recorder has, for its own tool (torchfrtrace) to compare.
            recorded: bytes = distributed.distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
            (directory / f"nccl_trace_rank_{rank}").write_bytes(recorded)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def all_standings(board: Board, own: Standing, seconds: float) -> dict[int, Standing]:
    """Of the ranks that answer in time, by rank."""
    found, deadline = {own.rank: own}, time.monotonic() + seconds
    while len(found) < board.ranks and board.store is not None and time.monotonic() < deadline:
        for rank in range(board.ranks):
            if rank not in found and (told := board.ask(f"standing/{rank}")):
                found[rank] = Standing(**json.loads(told))
        time.sleep(0.05)
    return found


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
