"""Checkpoints that can be trusted: every file's digest is written with the checkpoint and compared before its use.

The manifest is Megatron's own (``integrity.json``, SHA-256; ``--verify-integrity`` reads it too), but files are hashed
while they are written (``platform.writing``) and compared by all ranks, where Megatron has one of them read the whole
checkpoint. It is written after all other files and before Megatron's tracker names the checkpoint. So:

- a save that was killed is named by no tracker, and what it leaves does not fit a manifest;
- a checkpoint whose files differ from its manifest is not used: ``--load`` goes back to the newest one that is whole,
  and says so; weights to start from (``--pretrained-checkpoint``, ``--finetune``) are refused instead;
- a file that cannot be read is not one that differs: it is read a second time, and then the run ends with the system's
  reason, and the tracker stays as it was;
- a checkpoint without a manifest, of another program or of ``--no-checkpoint-checksums``, is taken as it is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME
from megatron.training.checkpointing import get_checkpoint_tracker_filename
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.errors import PassingError, UserError
from megatron_bdpo.json_shape import Each, parse_json, schema_error
from megatron_bdpo.platform.writing import ALGORITHM, once_more, raise_failure, take_digest
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, gather, is_rank_zero, say
from megatron_bdpo.training.megatron_settings import DirectorySettings

#: Files that a rank reads at once to compare them: hashing, a core does 1.5 to 2 GB a second.
_READERS = 4
_WRITER = re.compile(r"__(\d+)_\d+\.distcp")
_ERRNO = re.compile(r"\[Errno (\d+)\]")
_ITERATION = re.compile(r"iter_(\d{7,})")

#: What every checkpoint of torch_dist has, written last.
_COMPLETE = "metadata.json"


def refuse_half_written(directory: Path) -> None:
    """Raise UserError, on every rank, if the first one could not write an index of a checkpoint. Collective."""
    with all_ranks_agree(), _failures(directory):
        raise_failure()


def write_manifest(directory: Path) -> None:
    """Write the digests of a checkpoint whose files are all there. Collective.

    Raises:
        UserError: on every rank, when a file cannot be read or the manifest not be written.
    """
    own: dict[str, str] = {}
    with all_ranks_agree(), _failures(directory):
        own = {path.name: take_digest(str(path)) or _digest(path) for path in _own_share(_files(directory))}
    digests = {name: digest for each in gather(own) for name, digest in each.items()}
    with all_ranks_agree(), _failures(directory):
        if is_rank_zero():
            content = {"algorithm": ALGORITHM, "files": dict(sorted(digests.items()))}
            once_more(write_whole)(directory / INTEGRITY_FNAME, json.dumps(content, indent=2))


def integrity_problems(directory: Path) -> list[str]:
    """What is wrong with a checkpoint, a line for each file; none where it is whole or has no manifest. Collective.

    Raises:
        UserError: on every rank; a file is there and cannot be read, which says nothing of what is in it.
    """
    files: dict[str, str] = {}
    problems: list[str] = []
    with all_ranks_agree():
        if is_rank_zero():
            files, problems = _manifest(directory)
    files, problems = broadcast((files, problems))
    own: list[str] = []
    with all_ranks_agree():
        shared = _own_share([directory / name for name in sorted(files)])
        with ThreadPoolExecutor(_READERS) as readers:
            own = list(readers.map(_compared, shared, [files[path.name] for path in shared]))
    return problems + [problem for each in gather(own) for problem in each if problem]


def own_problems(directory: Path) -> list[str]:
    """What this rank's share of a checkpoint shows to be wrong; what it cannot read is. Not collective."""
    try:
        files, problems = _manifest(directory)
        shared = _own_share([directory / name for name in sorted(files)])
        return problems + [problem for path in shared if (problem := _compared(path, files[path.name]))]
    except UserError as error:
        return [str(error)]


def choose_intact_checkpoints(directories: DirectorySettings) -> None:
    """Find out before anything is built that the checkpoints to start from are whole. Collective.

    Where the newest one of ``--load`` is damaged, Megatron's tracker is made to name the newest one that is not.

    Raises:
        UserError: on every rank; none is whole, or weights to start from are damaged.
    """
    if directories.load and not directories.finetune and directories.ckpt_step is None:
        _go_back(Path(directories.load))
    elif directories.load:
        _refuse_damaged("--load", Path(directories.load), directories.ckpt_step)
    if directories.pretrained_checkpoint:
        _refuse_damaged("--pretrained-checkpoint", Path(directories.pretrained_checkpoint), None)


def _go_back(root: Path) -> None:
    named = broadcast(named_checkpoint(root) if is_rank_zero() else None)
    if named is None or named == "release":
        return _refuse_damaged("--load", root, None)
    seen = [] if named else [f"{get_checkpoint_tracker_filename(str(root))} names none"]
    for iteration in broadcast(_candidates(root, named) if is_rank_zero() else None):
        problems = integrity_problems(_directory(root, iteration))
        if not problems:
            if seen:
                _name(root, iteration)
                lines = "\n".join(f"  {line}" for line in seen)
                say(
                    f"WARNING: the newest checkpoint in {root} is damaged:\n{lines}\n  The run goes on from iteration "
                    f"{iteration}, the newest that is whole; what came after it is done again."
                )
            return None
        seen += problems
    raise UserError(
        f"--load {root}: there is no checkpoint in it that is whole.\n"
        + "\n".join(f"  {line}" for line in seen)
        + "\nRestore one of them, or start the run anew in another directory."
    )


def named_checkpoint(root: Path) -> str | None:
    """What the tracker says; "" where it is damaged, None where there is none."""
    tracker = Path(get_checkpoint_tracker_filename(str(root)))
    if not tracker.is_file():
        return None
    text = tracker.read_bytes().decode(errors="replace").strip()
    return text if text == "release" or text.isdigit() else ""


def named_iteration(root: Path) -> int | None:
    """The iteration that Megatron's tracker names, if it does."""
    text = named_checkpoint(root)
    return int(text) if text and text.isdigit() else None


def iteration_of(directory: Path) -> int | None:
    """Of which iteration a directory's name says that its checkpoint is."""
    match = _ITERATION.fullmatch(directory.name)
    return int(match[1]) if match else None


def is_complete(directory: Path) -> bool:
    """Whether a checkpoint was written to its end: what is written last is there. No digest is compared."""
    return (directory / INTEGRITY_FNAME).is_file() or (directory / _COMPLETE).is_file()


def _candidates(root: Path, named: str) -> list[int]:
    """Iterations to try, newest first: the one that is named, and older ones that can be told to be whole."""
    found = [iteration for path in root.iterdir() if (iteration := iteration_of(path)) is not None]
    limit = int(named) if named else max(found, default=-1) + 1
    older = [each for each in found if each < limit and (_directory(root, each) / INTEGRITY_FNAME).is_file()]
    return [*([limit] if named else []), *sorted(older, reverse=True)]


def _name(root: Path, iteration: int) -> None:
    with all_ranks_agree():
        if is_rank_zero():
            tracker = Path(get_checkpoint_tracker_filename(str(root)))
            try:
                write_whole(tracker, str(iteration))
            except OSError as error:
                raise UserError(
                    f"the newest checkpoint in {root} is damaged, and {tracker} cannot be changed ({error}). Put "
                    f"{iteration} there, the newest iteration that is whole."
                ) from error


def _refuse_damaged(flag: str, root: Path, step: int | None) -> None:
    named = broadcast(named_checkpoint(root) if is_rank_zero() else None)
    if not named:  # none at all; others say so
        return
    place = root / "release" if step is None and named == "release" else _directory(root, step or int(named))
    if problems := integrity_problems(place):
        listed = "\n".join(f"  {line}" for line in problems)
        raise UserError(f"{flag} {root}: its checkpoint is damaged:\n{listed}\nRestore it, or name another one.")


def _directory(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


class ChecksummedSave:
    """``platform.hooks.SaveHooks`` for a checkpoint of no run: failures as UserErrors, and a manifest."""

    wants_digests = True

    def more_state(self) -> dict[str, Any]:
        return {}

    def saving(self, directory: Path) -> contextlib.AbstractContextManager[None]:
        return failures_to_save(directory)

    def finishing(self, directory: Path) -> contextlib.AbstractContextManager[None]:
        return failures_to_save(directory)

    def after_files(self, directory: Path) -> None:
        refuse_half_written(directory)
        write_manifest(directory)


def refuse_damaged(directory: Path) -> None:
    """Raise UserError, on every rank, if a checkpoint's files are not those of its manifest. Collective."""
    if problems := integrity_problems(directory):
        listed = "\n".join(f"  {line}" for line in problems)
        raise UserError(f"the checkpoint {directory} cannot be used:\n{listed}\nRestore it, or name another one.")


# Files ---------------------------------------------------------------------------------------------------------------


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file() and path.name != INTEGRITY_FNAME)


def _own_share(files: list[Path]) -> list[Path]:
    """Each rank reads what it has written, which its machine may still hold in memory, and its share of the rest."""
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    writers = [int(match[1]) if (match := _WRITER.fullmatch(path.name)) else index for index, path in enumerate(files)]
    return [path for path, writer in zip(files, writers, strict=True) if writer % ranks == rank]


@once_more
def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, ALGORITHM).hexdigest()


def _compared(path: Path, expected: str) -> str:
    try:
        return "" if _digest(path) == expected else f"{path} is not what was written"
    except FileNotFoundError as error:
        return f"{path} cannot be read ({error.strerror})"
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> PassingError:
    return PassingError(
        f"{path} cannot be read: {error.strerror or error}. The file system says so, not the file: nothing was "
        "changed; try again when it is well, or restore the file."
    )


def _manifest(directory: Path) -> tuple[dict[str, str], list[str]]:
    """Digests by file name, and what is wrong already."""
    path = directory / INTEGRITY_FNAME
    try:
        if not once_more(path.is_file)():
            whole = directory.is_dir() and ((directory / _COMPLETE).is_file() or not list(directory.glob("*.distcp")))
            return {}, [] if whole else [f"{directory} is not there, or was never finished"]
        content = parse_json(once_more(path.read_bytes)())
        if wrong := schema_error(content, {"algorithm": str, "files": Each(str)}):
            raise ValueError(wrong)
        files: dict[str, str] = content["files"]
        if content["algorithm"] != ALGORITHM or not all(Path(name).name == name for name in files):
            raise ValueError("not of this kind")
        return files, []
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        return {}, [f"{path} cannot be read ({error})"]


@contextlib.contextmanager
def _failures(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PassingError(_not_saved(directory, str(error))) from error


@contextlib.contextmanager
def failures_to_save(directory: Path) -> Iterator[None]:
    """What stops Megatron from writing a checkpoint, as a UserError: on all ranks, or only where it happened."""
    try:
        yield
    except CheckpointException as error:  # which is no Exception; on all ranks, with the reasons of those that failed
        reasons = {f"rank {rank}: {_reason(failure)}" for rank, failure in error.failures.items()}
        raise PassingError(_not_saved(directory, "; ".join(sorted(reasons)) or str(error))) from error
    except OSError as error:  # not RuntimeError: that is a rank that has lost another one
        raise PassingError(_not_saved(directory, str(error))) from error


def _reason(failure: Any) -> str:
    exception = failure[0] if isinstance(failure, tuple) else failure
    return f"{type(exception).__name__}: {exception}"


def _not_saved(directory: Path, reason: str) -> str:
    found = _ERRNO.search(reason)
    way_out = _way_out(int(found[1]) if found else 0, directory)
    return (
        f"the checkpoint {directory} cannot be written: {reason}. {way_out}\nThe ones before it are as "
        "they were: the same command with --load goes on from the newest."
    )


def _way_out(number: int, directory: Path) -> str:
    """For an error of the system; 0: its number is not known."""
    room = ""
    with contextlib.suppress(OSError):
        room = f"The disk has {shutil.disk_usage(directory.parent).free / 2**20:,.1f} MiB left."
    return {
        errno.ENOSPC: f"{room} Make room.",
        errno.EDQUOT: "A quota is used up, of this user, group or directory, whatever room the disk has: ask for more.",
        errno.EFBIG: "A file may not be so large here: see `ulimit -f` and what the file system allows.",
        errno.EROFS: "The file system can be read only, as many become after an error of their disk.",
        errno.EIO: "It was tried twice: see the system's log for the disk or the network behind it.",
        0: room,
    }.get(number, "")
