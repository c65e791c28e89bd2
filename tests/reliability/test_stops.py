"""Asked to stop in any phase, in any way: the job ends well and soon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.killed_job import RANKS
from tests.reliability.stops import CASES, UNIT

ROOT = Path(__file__).parents[2]

#: What README and docs promise, and what a machine with other work may add.
PROMISED, SLACK = 5.0 + UNIT, 10.0


@pytest.mark.slow
def test_a_stop_is_heard_in_every_phase():
    pytest.importorskip("transformers", reason="makes the tiny model")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.reliability.stops"],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = {each["case"]: each for each in map(json.loads, ended.stdout.splitlines()[-len(CASES) :])}
    assert found.keys() == CASES.keys()
    for case, each in found.items():
        assert (each["code"], each["state"]) == (0, "stopped"), (each, ended.stderr[-3000:])
        assert each["seconds"] < PROMISED + SLACK, each
        assert each["begun"] <= RANKS, "a rank may be about to begin one"
        assert each["reason"].endswith(("received", "is there")), each
        assert each["step"] == {"evaluation": 2, "export": 4}.get(case, 0), "what was done is kept"
