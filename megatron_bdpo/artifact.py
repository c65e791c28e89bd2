"""Files and directories that are complete or not there, also when a process is killed or the disk full.

They are written under another name and renamed. A killed process may leave a ``.partial`` file or directory behind,
which nobody reads and anybody may delete.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Names a directory where the processes of a job leave the names of what they have completed. A launcher sees from it
#: that a job which was cut short has gained something, wherever its caches lie.
COMPLETED = "BDPO_COMPLETED_DIR"


def tell_completed(path: Path) -> None:
    """Leave the name of a file or directory that no later start has to make again, where a launcher asks for it."""
    if directory := os.environ.get(COMPLETED):
        own = Path(directory) / f"{socket.gethostname()}.{os.getpid()}"
        with contextlib.suppress(OSError), own.open("a") as file:  # an aid for launchers, no reason to fail
            file.write(json.dumps(str(path.absolute())) + "\n")


def write_whole(path: Path, content: bytes | str | Iterable[str], *, replace: bool = True) -> bool:
    """Write a file that appears whole or not at all, and is on the disk when this returns.

    Args:
        content: text is written as UTF-8; a file too large for memory comes in pieces.
        replace: False: a file that is there wins.

    Returns:
        Whether the file is now this one.

    Raises:
        OSError: and the file is as it was.
    """
    partial = _unique(path)
    try:
        with partial.open("wb") as file:
            for piece in [content] if isinstance(content, bytes | str) else content:
                file.write(piece.encode() if isinstance(piece, str) else piece)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            partial.replace(path)
        written = replace or _link(partial, path)
        _sync_directory(path.parent)
        return written
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(target: Path, *, first_wins: bool = False) -> Iterator[Path]:
    """A directory to write into, which becomes ``target`` when the block ends well and vanishes when it does not.

    Its name is :func:`partial_directory`'s, which other ranks know too, or with ``first_wins`` one of its own.

    Args:
        first_wins: several processes may make the same directory at once: the first one's stays.

    Raises:
        OSError: it cannot be made or renamed; ``target`` is as it was.
    """
    partial = _unique(target) if first_wins else partial_directory(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            partial.rename(target)
        except OSError:
            if not (first_wins and target.is_dir()):
                raise
            shutil.rmtree(partial)
        _sync_directory(target.parent)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_directory(target: Path) -> Path:
    """Where a :func:`new_directory` is while it is written."""
    return target.with_name(target.name + ".partial")


def _unique(path: Path) -> Path:
    """A hidden name beside it that no other process has, on this or another machine."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}.partial")


def _sync_directory(path: Path) -> None:
    """Put the names in a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
