"""What a target is: it takes bytes, makes an input of them, and checks what comes out.

Only a ``UserError`` or a row that is counted may come out of bad input; that is every target's first rule. Checks are
made by functions, so that a fuzzer can instrument what they import.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: True: the input was good, and what came of it right. False: it was refused as it should be.
type Check = Callable[[bytes], bool]

#: Files of a target lie in memory where the machine has such a place.
_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Target:
    """Something to fuzz."""

    name: str
    what: str
    """In a few words."""
    make: Callable[[], Check]
    share: float
    """Of all inputs: cheap targets get more of them."""


TARGETS: dict[str, Target] = {}


def target(what: str, share: float) -> Callable[[Callable[[], Check]], Callable[[], Check]]:
    """Registers a function that makes a check."""

    def register(make: Callable[[], Check]) -> Callable[[], Check]:
        TARGETS[make.__name__] = Target(make.__name__, what, make, share)
        return make

    return register


def own_directory() -> Path:
    """A directory of this process's own."""
    holder = tempfile.TemporaryDirectory(prefix="fuzz", dir=_MEMORY if _MEMORY.is_dir() else None)
    _HELD.append(holder)
    return Path(holder.name)


_HELD: list[tempfile.TemporaryDirectory[str]] = []
