"""Which checkpoints of a run stay: ``--keep-checkpoints`` newest ones, and multiples of ``--save-retain-interval``.

Megatron's own way to delete (``--save-retain-interval``) keeps the newest one alone, forgets what it has not deleted
when it is killed, and leaves half of a checkpoint that looks like one. So here rank 0 deletes, after a step:

- only what is older than the checkpoint that Megatron's tracker names, once all ranks have read that one again, each
  what it has written, and found it to be as its digests say; and nothing while a checkpoint is being written;
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
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from megatron_bdpo.training.callbacks.callback import Callback, Start, StepResult
from megatron_bdpo.training.checkpoints import is_complete, iteration_of, named_iteration, own_problems
from megatron_bdpo.training.distributed import is_rank_zero, leave_note, other_notes, say

#: At the end of a directory's name: it is being deleted.
_DELETED = ".deleted"

#: Before the next save and at the end of a run, for other ranks to have compared what they have written.
_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Retention:
    """How many checkpoints a run keeps."""

    newest: int
    """At least 1: that which the tracker names."""
    every: int | None = None
    """Steps whose multiples are kept, too."""

    def outdated(
        self,
        root: Path,
        abandoned: AbstractSet[int] = frozenset(),
        foreign: AbstractSet[int] = frozenset(),
        *,
        whole: int | None = None,
    ) -> list[Path]:
        """Directories of checkpoints to delete. None where the tracker names no whole one.

        Args:
            abandoned: iterations whose directories count as no checkpoints.
            foreign: those that are another run's, and neither count nor go.
            whole: that which is known to be, where it is not the one that the tracker names; newer ones stay.
        """
        named = named_iteration(root)
        found = {iteration: path for iteration, path in _checkpoints(root) if iteration not in foreign}
        if named is None or named not in found or not is_complete(found[named]):
            return []
        limit = named if whole is None else min(named, whole)
        older = sorted((iteration for iteration in found if iteration < limit), reverse=True)
        counted = [iteration for iteration in older if iteration not in abandoned and is_complete(found[iteration])]
        kept = {*counted[: self.newest - 1], *(each for each in counted if self.every and each % self.every == 0)}
        return [found[iteration] for iteration in older if iteration not in kept]


class Deletion(Callback):
    """Deletes what is outdated. Threads do the work, which takes minutes: all ranks compare, the first one deletes."""

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
        self._written: deque[Path] = deque()
        """Checkpoints that are to be compared; the first one is, if there is a thread that does so."""
        self._comparison: threading.Thread | None = None
        self._problems: list[str] = []
        self._deletion: threading.Thread | None = None

    def after_load(self, start: Start) -> None:
        """Find out what in the directory is not this run's; the weights of the reference stay."""
        found = {iteration for iteration, _ in _checkpoints(self._root)}
        if start.resumed and self._goes_on_in_place:
            self._abandoned = {iteration for iteration in found if iteration > start.iteration}
        else:
            self._foreign = found
        reference = start.identity.reference_weights
        self._protected = Path(reference).resolve() if reference else None

    def saving(self, directory: Path) -> None:
        """What can go has to be gone: there is room for one more than those that stay."""
        self._settle()

    def after_files(self, directory: Path) -> None:
        """The tracker will name this checkpoint: others may go once it is known to be whole."""
        for others in (self._abandoned, self._foreign):
            others.discard(iteration_of(directory) or 0)
        self._written.append(directory)

    def after_step(self, step: StepResult) -> None:
        """Begin to compare a checkpoint that has been written, or to delete what is older than one that is whole."""
        self._go_on(timedelta(0))

    def _go_on(self, patience: timedelta) -> bool:
        """Whether there is nothing left to do, or to wait for."""
        if self._comparison is None:
            if not self._written or self._is_writing():
                return True
            # All ranks compare the same ones, in the same order, whenever each of them comes to it.
            self._comparison = threading.Thread(target=self._compare, args=(self._written[0],), daemon=True)
            self._comparison.start()
        if self._comparison.is_alive() and not patience:
            return False
        self._comparison.join()
        directory = self._written[0]
        others = other_notes(_note(directory), patience=patience) if is_rank_zero() else []
        if others is None:
            return bool(patience)
        self._comparison = None
        self._written.popleft()
        if problems := [*self._problems, *filter(None, others)]:
            lines = "\n".join(f"  {problem}" for problem in problems)
            say(f"WARNING: {directory} is damaged already, so that no older checkpoint is deleted for it:\n{lines}")
        elif is_rank_zero():
            self._delete(iteration_of(directory))
        return False

    def _compare(self, directory: Path) -> None:
        self._problems = own_problems(directory)
        leave_note(_note(directory), "\n".join(self._problems))

    def _delete(self, whole: int | None) -> None:
        self._join()
        for directory in self._retention.outdated(self._root, self._abandoned, self._foreign, whole=whole):
            if directory.resolve() != self._protected:
                with contextlib.suppress(OSError):  # it is tried again after the next checkpoint
                    directory.rename(directory.with_name(f"{directory.name}{_DELETED}"))
        self._deletion = threading.Thread(target=delete_renamed, args=(self._root,), daemon=True)
        self._deletion.start()

    def finished(self) -> None:
        """Delete what the last checkpoint has made outdated, and wait for it."""
        self._settle()

    def stopped(self, iteration: int, reason: str) -> None:
        """The same."""
        self.finished()

    def _settle(self) -> None:
        while not self._go_on(_PATIENCE):
            pass
        self._join()

    def _join(self) -> None:
        if self._deletion:
            self._deletion.join()


def _note(directory: Path) -> str:
    return f"compared/{directory.name}"


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
