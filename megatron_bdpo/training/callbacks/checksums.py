"""Leaves the digests of a checkpoint's files beside them, and tells of a disk that is full as of one."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron_bdpo.training.callbacks.callback import Callback
from megatron_bdpo.training.checkpoints import failures_to_save, refuse_half_written, write_manifest


class Checksums(Callback):
    """See ``training.checkpoints``."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted

    def saving(self, directory: Path) -> contextlib.AbstractContextManager[None]:
        """What goes wrong is a UserError, also where the files are written in the background."""
        return failures_to_save(directory)

    def after_files(self, directory: Path) -> None:
        """Collective."""
        refuse_half_written(directory)
        if self._wanted:
            write_manifest(directory)
