"""Contenders in turn, each run in a process of its own: a machine that slows down slows all of them.

What is compared is the ratio of two contenders within a round. A script that uses this is its own child:
``script.py --child JSON`` measures once and prints its figures as the last line.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]

CHILD = "--child"


def add_flags(parser: argparse.ArgumentParser, *, rounds: int = 1) -> None:
    """How often, with what, and where to: the same of every benchmark that has rounds."""
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on a CPU, for every contender")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--csv", type=Path, help="write one line per run here")


def answer_as_child(measure: Callable[..., Record]) -> bool:
    """In a child: measure with the settings of the command line, print the figures. Returns whether this is one."""
    if sys.argv[1:2] != [CHILD]:
        return False
    settings = json.loads(sys.argv[2])
    torch.set_num_threads(settings.pop("threads"))
    print(f"\n{json.dumps(measure(**settings))}", flush=True)
    return True


def run_child(settings: Record, *, threads: int, python: str = sys.executable) -> Record:
    """Measure in a fresh process of this script."""
    command = [python, sys.argv[0], CHILD, json.dumps({**settings, "threads": threads}, default=str)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        if result.returncode:
            errors.seek(0)
            raise SystemExit(f"{settings}\n{result.stdout[-2000:]}\n{errors.read()[-6000:]}")
    record: Record = json.loads(result.stdout.splitlines()[-1])
    return record


def ratios(records: Sequence[Record], key: str, over: str, under: str) -> list[float]:
    """``key`` of one contender over that of another, round by round."""
    by_round = {(record["contender"], record["round"]): record[key] for record in records}
    rounds = dict.fromkeys(record["round"] for record in records)
    return [
        by_round[over, each] / by_round[under, each]
        for each in rounds
        if (over, each) in by_round and (under, each) in by_round
    ]


def median(records: Sequence[Record], key: str, contender: str) -> float:
    """Of a contender's rounds."""
    return statistics.median(record[key] for record in records if record["contender"] == contender)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median, and the range where there is one."""
    middle = f"{statistics.median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def markdown(title: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [title, ["---", *["--:"] * (len(title) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_csv(path: Path | None, records: Sequence[Record]) -> None:
    """One line per run; a column that a run has not is empty. Called after each run: what was measured is kept."""
    if path is None:
        return
    columns = dict.fromkeys(key for record in records for key in record)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(records)


def machine(threads: int, *packages: str) -> str:
    """Device, versions and date, for the head of a table."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor_name()}, {threads} thread(s)"
    installed = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", *packages))
    return f"{name}; Python {platform.python_version()}, {installed}; {datetime.date.today()}"


def processor_name() -> str:
    """Of the first processor, as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
