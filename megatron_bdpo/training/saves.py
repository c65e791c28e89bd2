"""What the callbacks of a run do around the writing of a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_bdpo.training.callbacks.callback import Callback
from megatron_bdpo.training.checkpoints import failures_to_save


class RunSaves:
    """``platform.hooks.SaveHooks`` of a run."""

    def __init__(self, callbacks: Sequence[Callback], *, wants_digests: bool) -> None:
        self.callbacks = callbacks
        self.wants_digests = wants_digests

    def more_state(self) -> dict[str, Any]:
        """See ``Callback.checkpoint_state``."""
        return {name: value for each in self.callbacks for name, value in each.checkpoint_state().items()}

    @contextlib.contextmanager
    def saving(self, directory: Path) -> Iterator[None]:
        """See ``Callback``."""
        with contextlib.ExitStack() as around:
            for each in self.callbacks:
                context = each.saving(directory)
                if context is not None:
                    around.enter_context(context)
            yield

    def finishing(self, directory: Path) -> contextlib.AbstractContextManager[None]:
        """What went wrong in the background is told as if it had been in the foreground."""
        return failures_to_save(directory)

    def after_files(self, directory: Path) -> None:
        """See ``Callback``."""
        for each in self.callbacks:
            each.after_files(directory)
