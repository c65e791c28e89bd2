"""Files that somebody else may have made: only regular ones are opened, and no more is read than is meant to be.

A FIFO in the place of a file holds a program for ever, a link leads to what was never meant to be read, a file that has
no end fills the memory.
"""

from __future__ import annotations

import difflib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

#: A JSON file: configurations have some KB, the index of a model with 400 experts in each layer about 20 MB.
MOST_JSON_BYTES = 100_000_000

#: A file beside a model's weights, which the tokenizer or an export reads; tokenizer.json has up to about 35 MB.
MOST_SIDE_FILE_BYTES = 256 * 2**20

#: A safetensors header: the format's own limit.
MOST_HEADER_BYTES = 100_000_000


_PIECE = 1 << 20


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; the kind is looked at once it is open, and opening does not wait for a writer.

    Raises:
        OSError: it is not there, or no regular file: a FIFO, a device, a socket, a directory.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: as :func:`open_regular`, or it has more than ``most`` bytes.
    """
    pieces, left = [], most
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            left -= len(piece)
            if left < 0:
                raise OSError(errno.EFBIG, f"it has more than {most:,} bytes, which no such file needs", str(path))
            pieces.append(piece)
    return b"".join(pieces)


def why_not_read(path: Path, directory: Path, most: int) -> str:
    """Why a file of a model's directory is none of its own, as words after its name; empty where it is.

    Its own are regular files in it, and those of the hub's cache, whose snapshots link into ``blobs`` beside them.
    """
    try:
        status, target = path.stat(), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file"
    if not any(target.is_relative_to(root) for root in _own_places(directory)):
        return f"is a link to {target}, outside of the directory"
    if status.st_size > most:
        return f"has {status.st_size:,} bytes, more than the {most:,} that such a file may have"
    return ""


def near(path: Path) -> str:
    """A sentence on what there is in the place of a path that is not there; empty where nothing is like it."""
    missing = path
    while missing.parent != missing and not missing.parent.exists():
        missing = missing.parent
    try:
        names = sorted(each.name for each in missing.parent.iterdir())
    except OSError:
        return ""
    found = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.7)
    return f"Did you mean {missing.parent / found[0]}?" if found else ""


def _own_places(directory: Path) -> Iterable[Path]:
    own = directory.resolve()
    yield own
    if own.parent.name == "snapshots":  # not resolved: a link in the place of blobs leads elsewhere too
        yield own.parent.parent / "blobs"
