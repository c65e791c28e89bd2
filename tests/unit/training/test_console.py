"""Lines for people stay on the terminal while Megatron's go to its file."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bdpo.training.reporting import console

ROOT = Path(__file__).parents[3]


def test_two_kinds_of_output(tmp_path, capsys):
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(handler)
    try:
        with console.megatron_in_file(tmp_path / "run" / "megatron.log"):
            assert not (tmp_path / "run").exists(), "made with the first line"
            print("arguments")
            logging.getLogger("megatron").error("noise")
            console.show("step 1")
        print("after")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().out == "step 1\nafter\n"
    assert (tmp_path / "run" / "megatron.log").read_text() == "arguments\nnoise\n"


def test_everything_is_put_back_after_an_error(tmp_path):
    before = sys.stdout
    with pytest.raises(ZeroDivisionError), console.megatron_in_file(None):
        print("dropped")
        raise ZeroDivisionError
    assert sys.stdout is before


def test_a_place_that_cannot_be_written_loses_lines_only(tmp_path):
    (tmp_path / "file").touch()
    with console.megatron_in_file(tmp_path / "file" / "megatron.log"):
        print("dropped")


def test_a_run_says_what_matters(tmp_path):
    """One short run of the example as a user starts it."""
    command = [sys.executable, str(ROOT / "examples" / "pretrain_bdpo.py"), "--train-iters", "2", "--eval-iters", "0"]
    flags = ["--num-layers", "1", "--max-pairs", "40", "--save", "run", "--save-interval", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 60, done.stdout
    assert any(line.startswith("step 2/2 | loss") and "ETA" in line for line in lines)
    assert "Warning" not in done.stderr
    megatron = (tmp_path / "run" / "megatron.log").read_text()
    assert "end of arguments" in megatron and "step 2/2" not in megatron
