"""The kill matrix with a handful of kills, and a checkpoint killed at some of its writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 6
ROOT = Path(__file__).parents[2]


def run(module: str, *flags: str) -> str:
    """What the command prints; it has to end well."""
    command = [sys.executable, "-m", f"tests.reliability.{module}", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    return ended.stdout


@pytest.mark.slow
def test_a_job_killed_a_few_times_ends_as_if_undisturbed(tmp_path):
    pytest.importorskip("transformers", reason="makes the tiny model")
    printed = run("kill_matrix", "--kills", str(KILLS), "--seed", "2", "--directory", str(tmp_path))
    assert re.search(rf"^{KILLS} kills, \d+ runs ended as if undisturbed, 0 lost$", printed, re.MULTILINE)


@pytest.mark.slow
def test_a_checkpoint_that_is_killed_while_it_is_written_is_not_taken_for_one():
    assert re.search(r"^[3-9] kills, [3-9] survived, 0 lost$", run("killed_writes", "--every", "6"), re.MULTILINE)
