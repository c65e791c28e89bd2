"""The benchmarks run, at a size where nothing is learned from them."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(*command: object) -> str:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_planning():
    output = run(BENCHMARKS / "planning.py", "--pairs", 3000, "--ranks", 4, "--pairs-per-step", 64)
    for part in ("plan one epoch", "look the reference scores up", "settle the temperature", "highest"):
        assert f"\n{part}" in output


@pytest.mark.slow
def test_scoring():
    size = ["--pairs", 16, "--layers", 1, "--hidden", 64, "--seq-length", 512, "--pairs-per-step", 4]
    output = run(BENCHMARKS / "scoring.py", BENCHMARKS.parent / "examples" / "data" / "train.jsonl", *size)
    for name in ("scoring", "one training epoch", "the same, prompts not shared"):
        assert f"\n| {name} | 16 |" in output


@pytest.mark.slow
def test_log_probs(tmp_path):
    """Every run is on record, and the variants agree: the script itself stops when they do not."""
    shape = ["--positions", "48", "--hidden", "8", "--vocab", "96", "--device", "cpu", "--repeats", "1"]
    variants = ["plain", "fused", "fused, main_grad"]
    command = [
        sys.executable,
        BENCHMARKS / "logprobs.py",
        *shape,
        "--variants",
        *variants,
        "--csv",
        tmp_path / "runs.csv",
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in variants:
        assert f"| {name} |" in output
    with (tmp_path / "runs.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == variants
