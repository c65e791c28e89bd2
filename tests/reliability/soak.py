r"""Train for thousands of steps: memory, open files and threads stay as they are, and resuming changes nothing.

    python -m tests.reliability.soak --steps 2000

A tiny model on two CPU ranks, with evaluations, checkpoints, metrics and TensorBoard, twice: in one piece, and stopped
and started again every 200 steps. Every rank looks at itself after every step. Prints a table, and exits with 1 if the
resident memory has grown by more than 2 % after the warm-up, if open files or threads have become more, or if a metric
of any step or the last weights differ between the two runs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.jobs import DATA, flags_of
from tests.harness.killing import JobTree

RANKS = 2
ALLOWED_GROWTH = 0.02
"""Of the resident memory, from after the warm-up to the end."""

WINDOW = 0.1
"""Share of the steps that are looked at after the warm-up, and again at the end."""

MODEL = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --normalization RMSNorm --swiglu "
    "--position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights"
)

SETTINGS = (
    "--tokenizer-type SentencePieceTokenizer --seq-length 512 --max-pairs 120 --pairs-per-step 4 --eval-share 0.1 "
    "--seed 5 --lr 1e-4 --lr-decay-style constant --use-distributed-optimizer"
)


@dataclass(frozen=True)
class Soak:
    """One run, in one piece or in several."""

    directory: Path
    steps: int
    interval: int
    """Steps between checkpoints, and where the run is stopped if it is in pieces."""
    in_pieces: bool

    @property
    def save(self) -> Path:
        return self.directory / "run"

    def flags(self) -> list[str]:
        places = {"save": self.save, "load": self.save, "tensorboard-dir": self.directory / "tensorboard"}
        data = {"pair-data": DATA / "train.jsonl", "tokenizer-model": DATA / "tokenizer.model"}
        return [
            *flags_of(places | data),
            *f"{MODEL} {SETTINGS} --train-iters {self.steps}".split(),
            *f"--save-interval {self.interval} --eval-interval {max(1, self.interval // 4)}".split(),
            *(["--exit-interval", str(self.interval)] if self.in_pieces else []),
        ]

    def run(self) -> None:
        """Until the last step is done.

        Raises:
            SystemExit: it fails; with the end of its log.
        """
        self.directory.mkdir()
        for _ in range(self.steps // self.interval if self.in_pieces else 1):
            if JobTree(RANKS, self._job).wait(timeout=6 * 3600):
                raise SystemExit((self.directory / "log").read_text()[-3000:])

    def _job(self) -> None:
        log = os.open(self.directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "MASTER_ADDR": "127.0.0.1"}
        from megatron_bdpo.training.entry import main

        look_at_every_step(self.directory, int(os.environ["RANK"]), last=self.steps)
        with contextlib.suppress(SystemExit) if self.in_pieces else contextlib.nullcontext():
            main(self.flags())

    def metrics(self) -> list[str]:
        """Every record of every step and evaluation, exactly, but for what a clock has made."""
        records = [json.loads(line) for line in (self.save / "metrics.jsonl").read_text().splitlines()]
        plain = [{k: v for k, v in each.items() if not k.startswith("throughput")} for each in records]
        return [json.dumps(each, sort_keys=True) for each in plain]

    def samples(self, rank: int) -> list[list[int]]:
        """[iteration, resident bytes, open files, threads] after each step."""
        return [list(map(int, line.split())) for line in (self.directory / f"rank{rank}").read_text().splitlines()]

    def weights(self) -> list[str]:
        return [(self.directory / f"weights{rank}").read_text() for rank in range(RANKS)]


def look_at_every_step(directory: Path, rank: int, last: int) -> None:
    """Have this process's run write down after each step what it holds, and after the last one its weights' digest."""
    from megatron_bdpo.training.run import PreferenceRun
    from tests.harness.jobs import copy_shards

    original = PreferenceRun.after_step

    def after_step(self: PreferenceRun, losses: Any, iteration: int, skipped: bool) -> None:
        original(self, losses, iteration, skipped)
        with (directory / f"rank{rank}").open("a") as file:
            print(iteration, *what_this_process_holds(), file=file)
        if iteration == last:
            digest = hashlib.sha256()
            for name, _, _, values in copy_shards(self.model):
                digest.update(name.encode() + values.tobytes())
            (directory / f"weights{rank}").write_text(digest.hexdigest())

    PreferenceRun.after_step = after_step  # type: ignore[method-assign]


def what_this_process_holds() -> tuple[int, int, int]:
    """Resident bytes, open files, threads."""
    own = Path("/proc/self")
    resident = int((own / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir(own / "fd")), len(os.listdir(own / "task"))


@dataclass(frozen=True)
class Growth:
    """What one rank held after the warm-up, and at the end; of several steps each."""

    rank: int
    memory: tuple[float, float]
    files: tuple[int, int]
    threads: tuple[int, int]

    def problems(self) -> list[str]:
        found = []
        if self.memory[1] > self.memory[0] * (1 + ALLOWED_GROWTH):
            found.append(f"rank {self.rank}: memory has grown by {self.memory[1] / self.memory[0] - 1:.1%}")
        for name, (before, after) in (("open files", self.files), ("threads", self.threads)):
            if after > before:
                found.append(f"rank {self.rank}: {name} have grown from {before} to {after}")
        return found


def growth(rank: int, samples: Sequence[Sequence[int]], warm_up: int) -> Growth:
    """From the samples of one process: a tenth of them after the warm-up, against the last tenth.

    The warm-up lasts until the first checkpoint has been written: by then everything that is kept has been made,
    caches, buffers, connections, the allocator's arenas.
    """
    window = max(1, int(len(samples) * WINDOW))
    early, late = ([*zip(*part, strict=True)] for part in (samples[warm_up : warm_up + window], samples[-window:]))
    _, memory, files, threads = zip(early, late, strict=True)
    # Medians: TensorBoard's thread, for one, opens its file for a moment now and then.
    return Growth(
        rank,
        (statistics.median(memory[0]), statistics.median(memory[1])),
        (statistics.median_low(files[0]), statistics.median_low(files[1])),
        (statistics.median_low(threads[0]), statistics.median_low(threads[1])),
    )


def soak(steps: int, interval: int, directory: Path) -> list[str]:
    """Both runs. Prints the table; returns what is wrong."""
    import tests.harness.warm  # noqa: F401  # before the forks: this is what takes seconds

    whole = Soak(directory / "whole", steps, interval, in_pieces=False)
    pieces = Soak(directory / "pieces", steps, interval, in_pieces=True)
    for run in (whole, pieces):
        start = time.monotonic()
        run.run()
        print(f"{run.directory.name}: {steps} steps in {time.monotonic() - start:.0f} s", flush=True)
    grown = [growth(rank, whole.samples(rank), interval) for rank in range(RANKS)]
    print(f"{'rank':<6}{'resident MiB':>20}{'growth':>9}{'open files':>14}{'threads':>12}")
    for each in grown:
        before, after = each.memory
        print(
            f"{each.rank:<6}{f'{before / 2**20:.1f} -> {after / 2**20:.1f}':>20}{after / before - 1:>+9.2%}"
            f"{f'{each.files[0]} -> {each.files[1]}':>14}{f'{each.threads[0]} -> {each.threads[1]}':>12}"
        )
    problems = [problem for each in grown for problem in each.problems()]
    expected, found = whole.metrics(), pieces.metrics()
    print(f"resumed {steps // interval - 1} times: {len(found)} records of metrics, {len(expected)} expected")
    if found != expected:
        different = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
        problems.append(f"the metrics differ from record {different} on")
    if pieces.weights() != whole.weights():
        problems.append("the last weights differ")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--resume-every", type=int, default=200)
    parser.add_argument("--directory", type=Path, help="where the runs are kept (default: a temporary one)")
    arguments = parser.parse_args()
    if arguments.steps % arguments.resume_every:
        parser.error("--steps has to be a multiple of --resume-every")
    with contextlib.ExitStack() as stack:
        directory = arguments.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        problems = soak(arguments.steps, arguments.resume_every, directory)
    for problem in problems:
        print(f"  {problem}")
    print("failed" if problems else "passed")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
