"""Writing files whose names always stand for something whole, also when a process is killed or the disk full."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes | str, *, replace: bool = True) -> bool:
    """Write a file that appears whole or not at all, and is on the disk when this returns.

    It is written as a hidden ``.partial`` file beside it, flushed and renamed. A killed process may leave that one
    behind; nobody reads it.

    Args:
        content: text is written as UTF-8.
        replace: False: a file that is there wins.

    Returns:
        Whether the file is now this one.

    Raises:
        OSError: and the file is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            partial.replace(path)
        written = replace or _link(partial, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return written
    finally:
        partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> bool:
    """Whether the name was free."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: there the last one wins
        if path.exists():
            return False
        partial.replace(path)
    return True
