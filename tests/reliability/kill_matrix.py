r"""Kill a whole job again and again, at random moments, and compare what it ends with to a run that nobody disturbed.

    python -m tests.reliability.kill_matrix --kills 100

The job goes through every phase: pairs are tokenised, the reference scored, a tiny model trained with evaluations and
checkpoints, and exported as a Hugging Face model. Each kill is one of SIGTERM, SIGINT, SIGKILL, to one rank or to all;
then the same command is started again. When a run has ended, its export is compared byte for byte, and the next run
begins. Prints a table of phases and ways, and exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.jobs import DATA
from tests.harness.killing import JobTree

RANKS = 2
PATIENCE = 60.0
"""Seconds for a job to end after a kill; what is left then has hung, and counts as lost."""

WAYS = list(itertools.product((signal.SIGTERM, signal.SIGINT, signal.SIGKILL), ("one", "all")))


@dataclass(frozen=True)
class Run:
    """One job from its beginning to its end, in a directory of its own."""

    directory: Path
    model: Path
    steps: int = 6

    @property
    def save(self) -> Path:
        return self.directory / "run"

    @property
    def export(self) -> Path:
        return self.directory / "export"

    def flags(self) -> list[str]:
        return [
            *f"--hf-model {self.model} --save-hf {self.export} --save {self.save} --load {self.save}".split(),
            *f"--pair-data {DATA / 'train.jsonl'} --max-pairs 40 --eval-share 0.2 --eval-interval 2".split(),
            *f"--train-iters {self.steps} --save-interval 2 --pairs-per-step 8 --seq-length 2048 --lr 1e-3".split(),
            *f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {DATA / 'tokenizer.model'}".split(),
            *["--score-shard-pairs", "8", "--use-distributed-optimizer", "--lr-decay-style", "constant"],
        ]

    def start(self) -> JobTree:
        return JobTree(RANKS, self._job)

    def _job(self) -> None:
        log = os.open(self.directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "MASTER_ADDR": "127.0.0.1"}
        from megatron_bdpo.training.entry import main

        main(self.flags())

    def is_finished(self) -> bool:
        """The export is there, which appears whole or not at all and is the last thing that a job does."""
        return self.export.exists()

    def phase(self) -> str:
        """What the job is about to do, by what it has left on the disk."""
        cache, tracker = self.save / "cache", self.save / "latest_checkpointed_iteration.txt"
        if self.export.with_name("export.partial").exists():
            return "export"
        done = tracker.read_text() if tracker.exists() else "0"
        newest = max((int(path.name[5:]) for path in self.save.glob("iter_*")), default=0)
        if newest and str(newest) != done:
            return "checkpoint"
        with contextlib.suppress(OSError, ValueError, IndexError):
            last = (self.save / "metrics.jsonl").read_text().splitlines()[-1]
            return "evaluation" if "step" in last and int(json.loads(last).get("step", 1)) % 2 == 0 else "training"
        if list(cache.glob("reference-*")):
            return "scoring"
        return "data" if not list(cache.glob("*/meta.json")) else "start"

    def result(self) -> dict[str, bytes]:
        """What must not depend on kills: the exported weights, byte for byte."""
        return {path.name: path.read_bytes() for path in sorted(self.export.glob("*.safetensors"))}


@dataclass
class Tally:
    """Kills by phase and way; runs that ended, and what went wrong."""

    kills: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    runs: int = 0
    lost: list[str] = field(default_factory=list)

    def table(self) -> str:
        names = [f"{number.name} {whom}" for number, whom in WAYS]
        phases = sorted({phase for phase, _ in self.kills})
        lines = ["phase".ljust(12) + "".join(name.rjust(13) for name in names)]
        lines += [phase.ljust(12) + "".join(str(self.kills[phase, n]).rjust(13) for n in names) for phase in phases]
        total = self.kills.total()
        return "\n".join([*lines, f"{total} kills, {self.runs} runs ended as if undisturbed, {len(self.lost)} lost"])


def ranks_of(launcher: int) -> list[int]:
    """The children of a process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(status.read_text().rsplit(")", 1)[1].split()[1]) == launcher:
                found.append(int(status.parent.name))
    return sorted(found)


def wait_until(moment: float, job: JobTree) -> None:
    while time.monotonic() < moment and not job.ended():
        time.sleep(0.002)


def kill(job: JobTree, number: signal.Signals, whom: str, rng: random.Random) -> bool:
    """Send a signal, and wait for the end as a launcher would. False: the job had to be ended by force."""
    ranks = ranks_of(job.pid)
    for pid in ranks if whom == "all" else rng.sample(ranks, min(1, len(ranks))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    deadline = time.monotonic() + PATIENCE
    wait_until(deadline, job)
    if job.ended():
        return True
    job.kill()
    return False


def moments(rng: random.Random, life: float) -> Iterator[float]:
    """When to kill, in seconds after the start."""
    while True:
        yield rng.uniform(0.1, 1.05) * life


def disturb(run: Run, kills: int, life: float, rng: random.Random, tally: Tally) -> None:
    """Kill a run until it ends, or until there were enough kills; then let it end."""
    when = moments(rng, life)
    while tally.kills.total() < kills and not run.is_finished():
        job, start = run.start(), time.monotonic()
        wait_until(start + next(when), job)
        if job.ended():
            continue
        number, whom = rng.choice(WAYS)
        phase = run.phase()
        tally.kills[phase, f"{number.name} {whom}"] += 1
        if not kill(job, number, whom, rng):
            tally.lost.append(f"{run.directory}: hung after {number.name} to {whom} during {phase}")
    for _ in range(3):  # a signal may have left a job that stopped in good order
        if run.is_finished():
            return
        run.start().wait(PATIENCE * 4)


def _made_model(directory: Path) -> Path:
    """A tiny Llama, made in another process: what has computed once has threads, and cannot be forked any more."""
    pid = os.fork()
    if pid == 0:
        from tests.harness.tiny_models import make_model

        make_model("llama", directory)
        os._exit(0)
    os.waitpid(pid, 0)
    return directory / "llama"


def matrix(kills: int, seed: int, directory: Path) -> Tally:
    """Run the whole matrix below a directory."""
    from megatron_bdpo.platform.prepare import prepare_platform

    prepare_platform()
    import megatron_bdpo.training.run  # noqa: F401  # before the forks: this is what takes seconds

    rng = random.Random(seed)
    model = _made_model(directory)
    undisturbed = Run(directory / "undisturbed", model)
    undisturbed.directory.mkdir()
    start = time.monotonic()
    if undisturbed.start().wait(PATIENCE * 4) or not undisturbed.is_finished():
        raise SystemExit((undisturbed.directory / "log").read_text()[-3000:])
    life, expected = time.monotonic() - start, undisturbed.result()
    print(f"undisturbed: {life:.1f} s, {sum(map(len, expected.values()))} bytes of weights", flush=True)
    tally = Tally()
    while tally.kills.total() < kills:
        run = Run(directory / f"run{tally.runs + len(tally.lost)}", model)
        run.directory.mkdir()
        disturb(run, kills, life, rng, tally)
        if not run.is_finished():
            tally.lost.append(f"{run.directory}: never ended")
        elif run.result() != expected:
            tally.lost.append(f"{run.directory}: other weights")
        else:
            tally.runs += 1
        print(f"{tally.kills.total()} kills, {tally.runs} runs ended, {len(tally.lost)} lost", flush=True)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where the runs are kept (default: a temporary one)")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        directory = arguments.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        tally = matrix(arguments.kills, arguments.seed, directory)
    print(tally.table())
    for problem in tally.lost:
        print(f"  {problem}")
    sys.exit(bool(tally.lost))


if __name__ == "__main__":
    main()
