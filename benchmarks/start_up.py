"""Seconds until the program says something: help, versions, a refusal, the first step; of this tree and of others.

    git worktree add runs/before COMMIT
    python benchmarks/start_up.py --tree before=runs/before --rounds 3

Each command runs in a fresh process, the trees one after the other in every round. Seconds are of the processor, of the
program and what it has started, which depends little on who else is busy; those on the clock stand beside them.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import rounds

ROOT = Path(__file__).resolve().parents[1]

#: What is typed, and the words with which the wait is over; without them, the end of the program.
COMMANDS = {
    "--version": "",
    "train --help": "",
    "train --recipe recipes/tiny.yaml --pairs-per-stp 8": "",
    "train --recipe recipes/tiny.yaml --lr fast": "",
    "data check examples/data/train.jsonl": "",
    "train --recipe recipes/tiny.yaml": "step  1/40",
}


def waited(tree: Path, command: str, words: str) -> rounds.Record:
    """Seconds until the words are there, or until the end."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    with tempfile.TemporaryDirectory() as directory:
        for name in ("recipes", "examples"):
            (Path(directory) / name).symlink_to(tree / name)
        before, began = _used(), time.perf_counter()
        program = subprocess.Popen(
            [sys.executable, "-m", "megatron_bdpo.cli.main", *shlex.split(command)],
            cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert program.stdout is not None
        said = next((line for line in program.stdout if words and words in line), "")
        seconds = time.perf_counter() - began
        if said:
            program.kill()
        program.wait()
    assert bool(said) == bool(words), f"{tree}: {command} never said {words!r}"
    return {"processor_seconds": _used() - before, "seconds": seconds}


def _used() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=DIR", help="another checkout")
    parser.add_argument("--commands", nargs="+", type=int, metavar="N", help="only these of the commands, from 0")
    rounds.add_flags(parser, rounds=3)
    args = parser.parse_args()
    trees = {name: Path(directory).resolve() for name, _, directory in (each.partition("=") for each in args.tree)}
    trees["now"] = ROOT
    commands = [command for place, command in enumerate(COMMANDS) if args.commands is None or place in args.commands]
    records: list[rounds.Record] = []
    for command in commands:
        for number in range(args.rounds):
            for name, tree in trees.items():
                found = waited(tree, command, COMMANDS[command])
                records.append({"command": command, "contender": name, "round": number, **found})
                rounds.write_csv(args.csv, records)
    print(rounds.machine(args.threads, "megatron-core"), "\n")
    rows = []
    for command in commands:
        row = [f"`{command}`" + (", to its first step" if COMMANDS[command] else "")]
        for name in trees:
            own = [each for each in records if (each["command"], each["contender"]) == (command, name)]
            used, clock = ([each[key] for each in own] for key in ("processor_seconds", "seconds"))
            row.append(f"{rounds.spread(used)}; {rounds.spread(clock)}")
        rows.append(row)
    print(rounds.markdown(["", *(f"{name}: processor; clock" for name in trees)], rows))


if __name__ == "__main__":
    main()
