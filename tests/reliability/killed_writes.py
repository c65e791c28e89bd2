"""Kill a rank before each file operation of a checkpoint's writing: what is left is the one before, or this one.

    python -m tests.reliability.killed_writes

The kill matrix draws its moments; this goes through them: every file that is opened for writing, renamed or removed
while a checkpoint is written, by either of two ranks. After each kill the checkpoint that the tracker names must be
whole by its manifest, and the same command must go on from it and end with the weights of a run that nobody disturbed.
Prints a line for each operation, and exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.harness.killing import JobTree
from tests.reliability.killed_job import RANKS, TRACKER, is_whole

FLAGS = "--train-iters 4 --save-interval 2 --num-layers 2 --tensor-model-parallel-size 2"

#: Events of Python's audit that change a disk, but for ``open``, which may.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}


@dataclass(frozen=True)
class Kill:
    """A rank, and before which of its operations it dies; never, if that is None."""

    rank: int = 0
    operation: int | None = None


@dataclass(frozen=True)
class Job:
    """Four steps with checkpoints of the second and the fourth; the fourth's writing is watched."""

    directory: Path

    def run(self, kill: Kill = Kill(), *, until: int = 4) -> int:
        """The exit code."""
        return JobTree(RANKS, lambda: self._rank(kill, until)).wait(timeout=240)

    def _rank(self, kill: Kill, until: int) -> None:
        log = os.open(self.directory.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "MASTER_ADDR": "127.0.0.1"}
        from tests.harness.jobs import train

        rank = int(os.environ["RANK"])
        with _watched_writing(self.directory / f"operations{rank}", kill.operation if rank == kill.rank else None):
            place = ["--save", str(self.directory), "--load", str(self.directory)]
            outcome = train([*FLAGS.split(), *place, *(["--exit-interval", str(until)] if until < 4 else [])])
        digest = hashlib.sha256(b"".join(name.encode() + values.tobytes() for name, _, _, values in outcome.shards))
        (self.directory / f"weights{rank}").write_text(digest.hexdigest())

    def weights(self) -> list[str]:
        return [(self.directory / f"weights{rank}").read_text() for rank in range(RANKS)]

    def operations(self, rank: int) -> list[str]:
        return (self.directory / f"operations{rank}").read_text().splitlines()

    def problem(self) -> str:
        """What is wrong with what a kill has left."""
        named = int((self.directory / TRACKER).read_text() or 0)
        if named and not is_whole(self.directory / f"iter_{named:07d}"):
            return f"the tracker names step {named}, whose checkpoint is not whole"
        return "" if named in (0, 2, 4) else f"the tracker names step {named}"


@contextlib.contextmanager
def _watched_writing(record: Path, last: int | None) -> Any:
    """Write down the operations of the fourth step's checkpoint; before number ``last`` of them, die."""
    import megatron.training.training as trainer

    original, seen, inside = trainer.save_checkpoint, [], [False]

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not inside[0] or not (event in _CHANGES or writes):
            return
        if len(seen) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(f"{event} {os.path.basename(os.fspath(arguments[0]))}" if arguments else event)

    def save(iteration: int, *args: Any, **kwargs: Any) -> Any:
        inside[0] = iteration == 4
        try:
            return original(iteration, *args, **kwargs)
        finally:
            inside[0] = False

    sys.addaudithook(audit)
    trainer.save_checkpoint = save
    yield
    if seen:
        record.write_text("\n".join(seen))


def kill_at_all(directory: Path, every: int = 1) -> tuple[collections.Counter[str], list[str]]:
    """Returns the kills by rank, and what was lost."""
    import tests.harness.warm  # noqa: F401  # before the forks: this is what takes seconds

    half = Job(directory / "half")
    half.directory.mkdir()
    assert half.run(until=2) == 0, half.directory.with_suffix(".log").read_text()[-3000:]
    undisturbed = replace(half, directory=directory / "undisturbed")
    shutil.copytree(half.directory, undisturbed.directory)
    assert undisturbed.run() == 0, undisturbed.directory.with_suffix(".log").read_text()[-3000:]
    kills, lost = collections.Counter[str](), []
    for rank in range(RANKS):
        for number, operation in list(enumerate(undisturbed.operations(rank)))[::every]:
            job = Job(directory / f"rank{rank}-{number}")
            shutil.copytree(half.directory, job.directory)
            code = job.run(Kill(rank, number))
            kills[f"rank {rank}"] += 1
            problem = job.problem() or ("" if code else "was not killed") or _goes_on(job, undisturbed)
            print(f"rank {rank}, before {number}: {operation}: {problem or 'survived'}", flush=True)
            if problem:
                lost.append(f"rank {rank}, before {operation}: {problem}")
            else:
                shutil.rmtree(job.directory)
    return kills, lost


def _goes_on(job: Job, undisturbed: Job) -> str:
    if job.run():
        return "does not go on"
    return "" if job.weights() == undisturbed.weights() else "ends with other weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="only every so many operations")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        kills, lost = kill_at_all(Path(directory), arguments.every)
    print(", ".join(f"{count} of {name}" for name, count in kills.items()))
    print(f"{kills.total()} kills, {kills.total() - len(lost)} survived, {len(lost)} lost")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
