"""The soak in small, and that it finds what it looks for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.soak import growth

MIB = 1 << 20


@pytest.mark.slow
def test_memory_files_and_threads_stay_and_resuming_changes_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.reliability.soak", "--steps", "60", "--resume-every", "20"]
    ended = subprocess.run(
        [*command, "--directory", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert ended.stdout.endswith("passed\n")


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ((100 * MIB, 20, 8), []),
        ((101 * MIB, 19, 7), []),
        ((103 * MIB, 20, 8), ["rank 0: memory has grown by 3.0%"]),
        ((100 * MIB, 21, 8), ["rank 0: open files have grown from 20 to 21"]),
        ((100 * MIB, 20, 9), ["rank 0: threads have grown from 8 to 9"]),
    ],
)
def test_what_grows_is_named(last, expected):
    """What is before the end of the warm-up does not count; nor does a single peak."""
    samples = [[step, 100 * MIB, 20, 8] for step in range(1, 91)] + [[step, *last] for step in range(91, 101)]
    samples[0][1:] = [1000 * MIB, 99, 99]
    samples[15][1:] = [500 * MIB, 30, 12]
    assert growth(0, samples, warm_up=10).problems() == expected
