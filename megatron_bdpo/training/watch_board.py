"""What the watches of ranks tell each other, through the launcher's store.

The connection is their own: the job's may be held by the main thread. A store that is gone with its rank answers
nothing; whoever asks is ended soon.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from torch import distributed


class Board:
    """Keys with a value that one rank has told, and counts that all add to. Without ``open`` nobody else is there."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.store: Any = None
        self._told_beats = self._all_beats = 0

    def open(self) -> None:
        """Connect, where there are other ranks."""
        if self.ranks > 1:
            store: Any = distributed.distributed_c10d._get_default_store()
            self.store = store.clone()

    def close(self) -> None:
        """Leave the others."""
        self.store = None

    def ask(self, key: str) -> str:
        """What a rank has told under a key; empty where none has, or nobody can be asked."""
        with contextlib.suppress(RuntimeError):
            if self.store is not None and self.store.check([f"megatron_bdpo/watch/{key}"]):
                return str(self.store.get(f"megatron_bdpo/watch/{key}").decode())
        return ""

    def tell(self, key: str, value: str) -> None:
        """For all ranks to read."""
        with contextlib.suppress(RuntimeError):
            if self.store is not None:
                self.store.set(f"megatron_bdpo/watch/{key}", value or "?")

    def first_to_tell(self, key: str, value: str) -> str:
        """The value, or that of the rank that was faster."""
        with contextlib.suppress(RuntimeError):
            if self.store is not None:
                return str(self.store.compare_set(f"megatron_bdpo/watch/{key}", "", value).decode())
        return value

    def add(self, key: str, count: int) -> int:
        """To a count of all ranks, and that; 0 where nobody can be asked."""
        with contextlib.suppress(RuntimeError):
            if self.store is not None:
                return int(self.store.add(f"megatron_bdpo/{key}", count))
        return 0

    def others_went_on(self, beats: int, *, own_count: bool) -> bool:
        """Whether any rank has told new beats since this was asked last.

        Args:
            beats: of this rank so far.
            own_count: a rank that waits has nothing to say for the others.
        """
        try:
            if self.store is None:
                return False
            found = self.store.add("megatron_bdpo/beats", beats - self._told_beats if own_count else 0)
        except RuntimeError:  # the store is gone with its rank, and this one will be ended
            self.store = None
            return False
        self._told_beats = beats
        is_new, self._all_beats = found != self._all_beats, found
        return is_new

    def has_seen(self, key: str) -> None:
        """This rank has read what another one told."""
        self.add(f"watch/seen/{key}", 1)

    def all_have_seen(self, key: str, seconds: float) -> bool:
        """Whether all other ranks say so, in time. This one may hold the store: it goes last."""
        deadline = time.monotonic() + seconds
        while self.ranks > 1 and time.monotonic() < deadline:
            if self.add(f"watch/seen/{key}", 0) >= self.ranks - 1:
                return True
            time.sleep(0.05)
        return self.ranks == 1

    def await_word(self, key: str, seconds: float, ended: Callable[[], bool] = bool) -> bool:
        """Whether a rank tells something under the key, in time and before ``ended``."""
        deadline = time.monotonic() + seconds
        while not self.ask(key) and self.store is not None and time.monotonic() < deadline and not ended():
            time.sleep(0.05)
        return bool(self.ask(key))
