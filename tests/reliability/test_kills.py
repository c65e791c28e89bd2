"""The kill matrix with a handful of kills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 6


@pytest.mark.slow
def test_a_job_killed_a_few_times_ends_as_if_undisturbed(tmp_path):
    pytest.importorskip("transformers", reason="makes the tiny model")
    command = [sys.executable, "-m", "tests.reliability.kill_matrix", "--kills", str(KILLS), "--seed", "2"]
    ended = subprocess.run(
        [*command, "--directory", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert re.search(rf"^{KILLS} kills, \d+ runs ended as if undisturbed, 0 lost$", ended.stdout, re.MULTILINE)
