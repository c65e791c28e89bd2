"""What phase each rank of a forked job is in, on a board in memory that the process that watches shares."""

from __future__ import annotations

import contextlib
import functools
import mmap
import struct
from collections.abc import Callable, Iterator
from typing import Any

#: In the order in which a job goes through them. ``start`` is what is between the others before the first step
#: (groups, flags, the model, a checkpoint being loaded), ``training`` what is between them afterwards, ``end`` the way
#: out once everything is written.
PHASES = ("start", "data", "scoring", "training", "evaluation", "checkpoint", "export", "end")

_SLOT = struct.Struct("=ii")  # a rank's phase; the iteration that it has resumed from, or -1


class PhaseBoard:
    """Written by the ranks, read by who has forked them."""

    def __init__(self, ranks: int) -> None:
        self._memory = mmap.mmap(-1, ranks * _SLOT.size)
        self._ranks = ranks
        self.clear()

    def clear(self) -> None:
        """Before a job is started."""
        for rank in range(self._ranks):
            self._write(rank, 0, -1)

    def phase(self, rank: int) -> str:
        return PHASES[self._read(rank)[0]]

    def resumed_from(self, rank: int = 0) -> int | None:
        """The iteration of the checkpoint that a rank has loaded, 0 without one; None: it never got there."""
        found = self._read(rank)[1]
        return None if found < 0 else found

    def enter(self, rank: int, phase: str) -> None:
        self._write(rank, PHASES.index(phase), self._read(rank)[1])

    def tell_resumed(self, rank: int, iteration: int) -> None:
        self._write(rank, self._read(rank)[0], iteration)

    @contextlib.contextmanager
    def inside(self, rank: int, phase: str, afterwards: str | None = None) -> Iterator[None]:
        """In ``phase`` inside the block, then where it was before, or in ``afterwards``."""
        before = self.phase(rank)
        self.enter(rank, phase)
        yield
        self.enter(rank, afterwards or before)

    def _read(self, rank: int) -> tuple[int, int]:
        phase, resumed = _SLOT.unpack_from(self._memory, rank * _SLOT.size)
        return phase, resumed

    def _write(self, rank: int, phase: int, resumed: int) -> None:
        _SLOT.pack_into(self._memory, rank * _SLOT.size, phase, resumed)


def show_phases(board: PhaseBoard, rank: int) -> None:
    """Have this process's job write its phases to the board. Megatron is imported here."""
    import megatron.training.training as trainer

    from megatron_bdpo.training import run, setup
    from megatron_bdpo.training.callbacks import standard
    from megatron_bdpo.training.reference.provider import ReferenceProvider

    places: list[tuple[Any, str, str, str | None]] = [
        (setup, "build_job", "data", None),
        (ReferenceProvider, "provide", "scoring", None),
        (trainer, "train", "training", None),
        (trainer, "evaluate", "evaluation", None),
        (trainer, "save_checkpoint", "checkpoint", None),
        (standard, "save_live", "export", "end"),
    ]
    for owner, name, phase, afterwards in places:
        setattr(owner, name, _marked(getattr(owner, name), board, rank, phase, afterwards))
    loaded = run.PreferenceRun.after_load

    @functools.wraps(loaded)
    def after_load(self: run.PreferenceRun, model: list[Any]) -> None:
        board.tell_resumed(rank, self.arguments.iteration)
        loaded(self, model)

    run.PreferenceRun.after_load = after_load  # type: ignore[method-assign]


def _marked(
    original: Callable[..., Any], board: PhaseBoard, rank: int, phase: str, afterwards: str | None
) -> Callable[..., Any]:
    @functools.wraps(original)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with board.inside(rank, phase, afterwards):
            return original(*args, **kwargs)

    return marked
