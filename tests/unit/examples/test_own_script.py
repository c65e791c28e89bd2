"""The example of a Megatron script of a user's own, and the names that it is made of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import megatron_bdpo

ROOT = Path(__file__).parents[3]
JOB = "--recipe recipes/tiny.yaml --max-pairs 32 --pairs-per-step 8 --eval-interval 2 --lr-warmup-fraction 0"


def test_it_trains_and_is_short(tmp_path):
    steps = ["--recipe", "{pair-epochs: null, train-iters: 2, save-interval: null}", "--pair-cache-dir", str(tmp_path)]
    command = [sys.executable, "examples/own_script.py", *JOB.split(), *steps]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    before, *_, after = map(float, re.search(r"held-out loss: \[(.*)\]", ended.stdout)[1].split(", "))
    assert abs(before - 0.6931) < 1e-3 and after != before
    assert len((ROOT / "examples" / "own_script.py").read_text().splitlines()) <= 30


def test_public_names_are_those_that_are_promised():
    assert set(megatron_bdpo.__all__) == set(megatron_bdpo._HOMES)
    table = (ROOT / "docs" / "api.md").read_text().split("## In a Megatron script")[1].split("## Losses")[0]
    assert all(f"`{name}`" in table for name in megatron_bdpo.__all__)
