r"""Kill a whole job again and again, in every phase, and compare what it ends with to a run that nobody disturbed.

    python -m tests.reliability.kill_matrix --kills 100

A kill is SIGTERM, SIGINT or SIGKILL, to one rank or to all, at a random moment of a phase; the phases and the ways take
turns, so that each gets its share. Then the same command is started again. After every kill it is looked at whether the
checkpoint that the tracker names is whole, and at every start whether it goes on from that one. When a run has ended,
its export is compared byte for byte, and its metrics value by value, and the next run begins. Prints a table of phases
and ways, and exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.killing import ENDED_BY_LAUNCHER, JobTree
from tests.harness.phases import PHASES, PhaseBoard
from tests.reliability.killed_job import RANKS, Run

PATIENCE = 60.0
"""Seconds for a job to end after a kill, its launcher included; what is left then has hung, and counts as lost."""

WAYS = tuple(itertools.product((signal.SIGTERM, signal.SIGINT, signal.SIGKILL), ("one", "all")))
MOST_KILLS = 8
"""Of one run; then it is left alone, so that its end is compared."""

Way = tuple[signal.Signals, str]


def name_of(way: Way) -> str:
    return f"{way[0].name} {way[1]}"


@dataclass
class Tally:
    """Kills by phase and way; runs that ended; what the kills have left behind; what went wrong."""

    kills: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    runs: int = 0
    unfinished: int = 0
    cut_trackers: int = 0
    ended_by_launcher: int = 0
    lost: list[str] = field(default_factory=list)
    work_lost: list[tuple[float, str]] = field(default_factory=list)
    """Of each kill: seconds between what was last kept, or the start, and the kill; its phase and way."""

    def next(self, phases: set[str], rng: random.Random) -> tuple[str, Way]:
        """One of the phases and a way, of those that were tried least."""
        cells = [(self.kills[phase, name_of(way)], rng.random(), phase, way) for phase in phases for way in WAYS]
        _, _, phase, way = min(cells)
        return phase, way

    def table(self) -> str:
        names = [*map(name_of, WAYS)]
        lines = ["phase".ljust(12) + "".join(name.rjust(13) for name in [*names, "all ways"])]
        for phase in PHASES:
            counts = [self.kills[phase, name] for name in names]
            lines.append(phase.ljust(12) + "".join(str(count).rjust(13) for count in [*counts, sum(counts)]))
        worst = max(self.work_lost, default=(0.0, "none"))
        stops = max((each for each in self.work_lost if "SIGKILL" not in each[1]), default=(0.0, "none"))
        return "\n".join(
            [
                *lines,
                f"{self.ended_by_launcher} times the launcher had to end a rank that waited for a killed one",
                f"{self.unfinished} kills left an unfinished checkpoint, {self.cut_trackers} a tracker without a name",
                f"most work lost: {worst[0]:.0f} s ({worst[1]}); to a stop: {stops[0]:.0f} s ({stops[1]})",
                f"{self.kills.total()} kills, {self.runs} runs ended as if undisturbed, {len(self.lost)} lost",
            ]
        )


def ranks_of(launcher: int) -> list[int]:
    """The children of a process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(status.read_text().rsplit(")", 1)[1].split()[1]) == launcher:
                found.append(int(status.parent.name))
    return sorted(found)


def time_in_phases(job: JobTree, board: PhaseBoard) -> dict[str, float]:
    """Seconds that the first rank of a job spends in each phase. Returns when the job has ended."""
    seconds = dict.fromkeys(PHASES, 0.0)
    before = time.monotonic()
    while not job.ended():
        time.sleep(0.001)
        now = time.monotonic()
        seconds[board.phase(0)] += now - before
        before = now
    return seconds


def wait_inside(phase: str, seconds: float, job: JobTree, board: PhaseBoard) -> bool:
    """Wait until the first rank has spent so long in a phase. False: the job has ended before."""
    spent, before = 0.0, time.monotonic()
    while not job.ended():
        now = time.monotonic()
        if board.phase(0) == phase:
            spent += now - before
            if spent >= seconds:
                return True
        before = now
        time.sleep(0.0005)
    return False


def kill(job: JobTree, way: Way, rng: random.Random) -> int | None:
    """Send a signal, and wait for the end. The launcher's exit code; None: it had to be ended by force itself."""
    number, whom = way
    ranks = ranks_of(job.pid)
    for pid in ranks if whom == "all" else rng.sample(ranks, min(1, len(ranks))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    with contextlib.suppress(TimeoutError):
        return job.wait(PATIENCE)
    return None


def check_start(run: Run, expected: int, tally: Tally) -> None:
    found = run.board.resumed_from()
    if found is not None and found != expected:
        tally.lost.append(f"{run.directory}: went on from step {found}, not from {expected}")


def check_left_behind(run: Run, tally: Tally) -> None:
    """No killed checkpoint is taken for a good one: what the tracker names is whole."""
    checkpoints, named = run.checkpoints(), run.named()
    tally.unfinished += not all(checkpoints.values())
    tally.cut_trackers += named is None and (run.save / "latest_checkpointed_iteration.txt").exists()
    if named and not checkpoints.get(named):
        tally.lost.append(f"{run.directory}: the tracker names step {named}, whose checkpoint is not whole")


def disturb(run: Run, kills: int, seconds: dict[str, float], rng: random.Random, tally: Tally) -> None:
    """Kill a run until it ends, or often enough; then let it end."""
    left = min(kills - tally.kills.total(), rng.randint(1, MOST_KILLS))
    while left and not run.is_finished():
        target, way = tally.next(run.reachable(), rng)
        expected = run.expected_start()
        began = time.time()
        job = run.start()
        # A phase may be entered several times; a run that was killed before has less of it ahead.
        if wait_inside(target, rng.uniform(0, 0.5) * seconds[target], job, run.board):
            left -= 1
            phase = run.board.phase(0)
            tally.kills[phase, name_of(way)] += 1
            killed = time.time()
            code = kill(job, way, rng)
            last = max(began, run.last_kept())
            tally.work_lost.append((max(0.0, killed - last), f"{phase}, {name_of(way)}"))
            tally.ended_by_launcher += code == ENDED_BY_LAUNCHER
            if code is None:
                tally.lost.append(f"{run.directory}: hung after {name_of(way)} during {phase}")
            check_left_behind(run, tally)
        check_start(run, expected, tally)
    was_finished = run.is_finished()
    for _ in range(3):  # a signal may have left a job that stopped in good order
        expected = run.expected_start()
        job = run.start()
        code = -1
        with contextlib.suppress(TimeoutError):
            code = job.wait(PATIENCE * 2)
        check_start(run, expected, tally)
        if run.is_finished():
            break
    if was_finished and code:
        tally.lost.append(f"{run.directory}: was finished, and its command has failed when it was started once more")


def _made_model(directory: Path) -> Path:
    """A tiny Llama, made in another process: what has computed once has threads, and cannot be forked any more."""
    pid = os.fork()
    if pid == 0:
        from tests.harness.tiny_models import make_model

        make_model("llama", directory)
        os._exit(0)
    os.waitpid(pid, 0)
    return directory / "llama"


def matrix(kills: int, seed: int, directory: Path, more: tuple[str, ...] = (), slow: float = 0.0) -> Tally:
    """Run the whole matrix below a directory, of a job with ``more`` flags."""
    import tests.harness.warm  # noqa: F401  # before the forks: this is what takes seconds

    rng, board, model = random.Random(seed), PhaseBoard(RANKS), _made_model(directory)
    first, undisturbed = (
        Run(directory / name, model, board, more, pack_seconds=slow) for name in ("first", "undisturbed")
    )
    seconds = {}
    for run in (first, undisturbed):
        run.directory.mkdir()
        seconds = time_in_phases(run.start(), board)
        if not run.is_finished():
            raise SystemExit((run.directory / "log").read_text()[-3000:])
        run.import_all()
    expected = undisturbed.result()
    if first.result() != expected:
        raise SystemExit("two undisturbed runs have ended differently: there is nothing to compare with")
    print("undisturbed: " + ", ".join(f"{phase} {value:.2f} s" for phase, value in seconds.items()), flush=True)
    tally = Tally()
    while tally.kills.total() < kills:
        run = Run(directory / f"run{tally.runs + len(tally.lost)}", model, board, more, pack_seconds=slow)
        run.directory.mkdir()
        disturb(run, kills, seconds, rng, tally)
        if not run.is_finished():
            tally.lost.append(f"{run.directory}: never ended")
        elif differing := [name for name, value in expected.items() if run.result().get(name) != value]:
            tally.lost.append(f"{run.directory}: another {', '.join(differing)}")
        else:
            tally.runs += 1
        print(
            f"{tally.kills.total()} kills, {tally.runs} runs ended, {len(tally.lost)} lost",
            *tally.lost[-1:],
            flush=True,
        )
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where the runs are kept (default: a temporary one)")
    parser.add_argument("--slow", type=float, default=0.0, metavar="SECONDS", help="that scoring a pack takes")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG ...", help="more flags of the job: -- --lora-rank 4")
    arguments = parser.parse_args()
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        directory = arguments.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        tally = matrix(arguments.kills, arguments.seed, directory, tuple(arguments.flags), arguments.slow)
    print(tally.table())
    print(f"{time.monotonic() - start:.0f} s")
    for problem in tally.lost:
        print(f"  {problem}")
    sys.exit(bool(tally.lost))


if __name__ == "__main__":
    main()
