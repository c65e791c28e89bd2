"""What is shown in a terminal and in a pipe: the same words, no line wider than the terminal, no colour in a file."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from megatron_bdpo.display import Facts, Table, plain
from tests.unit.training.test_dry_run import LLAMA_70B

ROOT = Path(__file__).parents[3]

FACTS = Facts.of(["loss: bdpo, beta 0.1", "memory: 3 GB", "  weights 1, other 2", "kept"])
TABLE = Table(["name", "meaning", "N"], [["--beta", "strength of " + "the preference term " * 4, "12"]], left=(0, 1))


def test_plain_facts():
    expected = "  loss: bdpo, beta 0.1\n  memory: 3 GB\n    weights 1, other 2\n  kept"
    assert plain([FACTS]) == expected


def test_plain_table():
    head, first, *more = TABLE.plain().splitlines()
    assert head.split() == ["name", "meaning", "N"]
    assert first.startswith("--beta  strength of the preference term") and first.endswith("  12")
    assert len(first) == len(head) and all(line.startswith(" " * 8) for line in more)
    assert " ".join([first[8:-2].strip(), *map(str.strip, more)]) == TABLE.rows[0][1].strip()


def test_a_whole_column_is_not_wrapped():
    commit = "0123456789" * 4 + " and changes"
    assert Table(["", ""], [["commit", commit]], left=(0, 1), whole=(1,)).plain() == f"commit  {commit}"


def test_a_path_stays_whole():
    path = "/a" * 60
    assert path in Table(["where"], [[path]]).plain()


def in_terminal(columns: int, *words: str) -> str:
    """What a command prints in a terminal of so many columns, codes and all."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "megatron_bdpo.cli.main", *words]
    program = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    output = b""
    try:
        while part := os.read(ours, 65536):
            output += part
    except OSError:  # how the end of a terminal is told
        pass
    os.close(ours)
    assert program.wait(60) == 0
    return output.decode().replace("\r\n", "\n")


CODES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("words", ["losses", "losses bdpo", "plan --hf-model MODEL --gpus 64", "--version"])
def test_lines_fit_the_terminal(tmp_path, words, columns):
    import json

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    output = in_terminal(columns, *words.replace("MODEL", str(tmp_path)).split())
    lines = CODES.sub("", output).splitlines()
    assert lines and max(map(len, lines)) <= columns
    assert CODES.search(output)
    if words == "losses bdpo":
        assert "--bdpo-comprehension per-token (or sum)" in output, "flags are not broken"


def test_no_codes_in_a_pipe():
    command = [sys.executable, "-m", "megatron_bdpo.cli.main", "losses"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "\x1b" not in ended.stdout and "─" not in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 100
