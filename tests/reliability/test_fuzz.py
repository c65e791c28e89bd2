"""Every target of the fuzzer with a few hundred inputs; `python -m tests.reliability.fuzz` tries a million."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.fuzz.engines import with_hypothesis
from tests.reliability.fuzz.registry import Target
from tests.reliability.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_our_own_errors(name):
    outcome = with_hypothesis(name, 200, seed=7)
    assert outcome.crash is None, outcome.trace
    assert outcome.inputs >= 200 and outcome.accepted, "no input was good: the target tests refusals only"


def test_a_failure_is_found_kept_and_made_small(monkeypatch, tmp_path):
    def check(data: bytes) -> bool:
        assert 200 not in data
        return True

    monkeypatch.setitem(TARGETS, "planted", Target("planted", "", lambda: check, 1.0))
    outcome = with_hypothesis("planted", 1000, seed=1)
    assert outcome.crash == bytes(23) + b"\xc8", "the smallest input that has this byte"
    assert "AssertionError" in outcome.trace


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "tests.reliability.fuzz", "--inputs", "100", "--engine", "hypothesis"]
    done = subprocess.run([*command, "--target", "rows", "packings"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("100 inputs, 0 targets failed")
