"""Which checkpoints of a run stay: ``--keep-checkpoints`` newest ones, and multiples of ``--save-retain-interval``.

Megatron's own way to delete (``--save-retain-interval``) keeps the newest one alone, forgets what it has not deleted
when it is killed, and leaves half of a checkpoint that looks like one. So here rank 0 deletes, after a step:

- only what is older than the checkpoint that Megatron's tracker names, which is whole, and nothing while a checkpoint
  is being written;
- a directory is renamed first, so that half of it is never taken for a checkpoint; what a kill leaves of it goes after
  the next checkpoint;
- what is no whole checkpoint, or was in the directory beyond the one that the run goes on from (a killed save, one that
  was found damaged, another continuation), is not counted among those that are kept;
- links, and the checkpoint that the reference's weights come from, stay; so does all that was in the directory of a run
  that does not go on from there.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from megatron_bdpo.training.callbacks.callback import Callback, Start, StepResult
from megatron_bdpo.training.checkpoints import is_complete, iteration_of, named_iteration

#: At the end of a directory's name: it is being deleted.
_DELETED = ".deleted"


@dataclass(frozen=True)
class Retention:
    """How many checkpoints a run keeps."""

    newest: int
    """At least 1: that which the tracker names."""
    every: int | None = None
    """Steps whose multiples are kept, too."""

    def outdated(
        self, root: Path, abandoned: AbstractSet[int] = frozenset(), foreign: AbstractSet[int] = frozenset()
    ) -> list[Path]:
        """Directories of checkpoints to delete. None where the tracker names no whole one.

        Args:
            abandoned: iterations whose directories count as no checkpoints.
            foreign: those that are another run's, and neither count nor go.
        """
        named = named_iteration(root)
        found = {iteration: path for iteration, path in _checkpoints(root) if iteration not in foreign}
        if named is None or named not in found or not is_complete(found[named]):
            return []
        older = sorted((iteration for iteration in found if iteration < named), reverse=True)
        whole = [iteration for iteration in older if iteration not in abandoned and is_complete(found[iteration])]
        kept = {*whole[: self.newest - 1], *(each for each in whole if self.every and each % self.every == 0)}
        return [found[iteration] for iteration in older if iteration not in kept]


class Deletion(Callback):
    """Deletes what is outdated, for rank 0 alone. The deleting itself is done by a thread: it takes minutes."""

    def __init__(
        self, retention: Retention, root: Path, is_writing: Callable[[], bool], *, goes_on_in_place: bool
    ) -> None:
        """
        Args:
            is_writing: whether a checkpoint is still being written.
            goes_on_in_place: a run that goes on does so from a checkpoint in ``root``.
        """
        self._retention, self._root, self._is_writing = retention, root, is_writing
        self._goes_on_in_place = goes_on_in_place
        self._abandoned: set[int] = set()
        self._foreign: set[int] = set()
        self._protected: Path | None = None
        self._thread: threading.Thread | None = None
        self._is_pending = False

    def after_load(self, start: Start) -> None:
        """Find out what in the directory is not this run's; the weights of the reference stay."""
        found = {iteration for iteration, _ in _checkpoints(self._root)}
        if start.resumed and self._goes_on_in_place:
            self._abandoned = {iteration for iteration in found if iteration > start.iteration}
        else:
            self._foreign = found
        reference = start.identity.reference_weights
        self._protected = Path(reference).resolve() if reference else None

    def after_files(self, directory: Path) -> None:
        """The tracker will name this checkpoint: others may go."""
        for others in (self._abandoned, self._foreign):
            others.discard(iteration_of(directory) or 0)
        self._is_pending = True

    def after_step(self, step: StepResult) -> None:
        """Begin to delete what is outdated, if a checkpoint has been written since the last time."""
        self._delete()

    def _delete(self) -> None:
        if not self._is_pending or self._is_writing() or (self._thread and self._thread.is_alive()):
            return
        self._is_pending = False
        for directory in self._retention.outdated(self._root, self._abandoned, self._foreign):
            if directory.resolve() != self._protected:
                with contextlib.suppress(OSError):  # it is tried again after the next checkpoint
                    directory.rename(directory.with_name(f"{directory.name}{_DELETED}"))
        self._thread = threading.Thread(target=delete_renamed, args=(self._root,), daemon=True)
        self._thread.start()

    def finished(self) -> None:
        """Delete what the last checkpoint has made outdated, and wait for it."""
        self._join()
        self._delete()
        self._join()

    def stopped(self, iteration: int, reason: str) -> None:
        """The same."""
        self.finished()

    def _join(self) -> None:
        if self._thread:
            self._thread.join()


def delete_renamed(root: Path) -> None:
    """Delete the directories that were renamed for it, now or before a kill."""
    for directory in root.glob(f"iter_*{_DELETED}"):
        shutil.rmtree(directory, ignore_errors=True)


def _checkpoints(root: Path) -> Iterator[tuple[int, Path]]:
    """Iteration and directory of all that look like checkpoints, but for links."""
    for path in root.iterdir() if root.is_dir() else ():
        iteration = iteration_of(path)
        if iteration is not None and path.is_dir() and not path.is_symlink():
            yield iteration, path
