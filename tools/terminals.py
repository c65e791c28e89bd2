"""What a user sees in a terminal, as pictures for the documentation: docs/terminals/*.svg.

    python tools/terminals.py                 all of them; the demo takes a minute
    python tools/terminals.py wrong-flags     one

A test draws the quick ones anew, and compares the demo's lines with the code that writes them.
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "terminals"
COLUMNS = 100

#: One thread, as in the Makefile.
_ENVIRONMENT = {
    "COLUMNS": str(COLUMNS),
    "TERM": "xterm-256color",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}

#: rich's, without the fonts that it would have fetched.
_FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S)
_CONTROL = re.compile(r"\r|\n|\x1b\[[0-9;?]*[A-Za-z]|[^\r\n\x1b]+")


@dataclass(frozen=True)
class Session:
    """Commands one after the other, as they are typed and as they are run here."""

    title: str
    commands: tuple[tuple[str, list[str]], ...]
    left_out: str = ""
    """What the lines match that are left out."""


def _program(command: str) -> tuple[str, list[str]]:
    return command, [sys.executable, "-m", "megatron_bdpo.cli.main", *shlex.split(command)[1:]]


SESSIONS = {
    "demo": Session(
        "make demo",
        (("make demo", [sys.executable, str(ROOT / "examples" / "pretrain_bdpo.py")]),),
        left_out=r"step ( [4-9]|[12]\d|3[0-7])/40",
    ),
    "wrong-flags": Session(
        "flags that are wrong",
        (
            _program("megatron-bdpo train --recipe recipes/tiny.yaml --pairs-per-stp 8"),
            _program("megatron-bdpo train --recipe recipes/tiny.yaml --loss_type sigmoid"),
            _program("megatron-bdpo train --recipe recipes/tiny.yaml --preference-loss dpo --simpo-gamma 1"),
        ),
    ),
}  # fmt: skip


def seen(words: list[str]) -> list[str]:
    """The lines that a program leaves in a terminal, with their colours, in a directory that is new to it."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "recipes").symlink_to(ROOT / "recipes")
        terminal, inside = pty.openpty()
        environment = os.environ | _ENVIRONMENT
        program = subprocess.Popen(words, cwd=directory, env=environment, stdin=inside, stdout=inside, stderr=inside)
        os.close(inside)
        output = io.BytesIO()
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
            while part := os.read(terminal, 65_536):
                output.write(part)
        os.close(terminal)
        program.wait()
    return _lines(output.getvalue().decode())


def _lines(output: str) -> list[str]:
    """What stays of it: a status line is drawn over again and again, and taken away at last."""
    lines, row = [""], 0
    for control in _CONTROL.findall(output):
        if control == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif re.fullmatch(r"\x1b\[2?K", control):
            lines[row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d*)A", control):
            row -= int(up[1] or 1)
        elif control != "\r":
            lines[row] += control
    return lines


def picture(name: str) -> str:
    """The file of a session."""
    session, lines = SESSIONS[name], []
    for typed, words in session.commands:
        lines += [f"\x1b[1m$ {typed}\x1b[0m", *seen(words)]
    drawn = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in _shortened([Text.from_ansi(line) for line in lines], session.left_out):
        drawn.print(line, no_wrap=True, overflow="ignore", crop=False)
    return drawn.export_svg(title=session.title, code_format=_FORMAT)


def _shortened(lines: list[Text], left_out: str) -> list[Text]:
    """Dots where lines are left out, and never two empty lines in a row."""
    kept: list[Text] = []
    for line in lines:
        short = Text("⋮", "dim") if left_out and re.match(left_out, line.plain) else line
        if short.plain not in ("", "⋮") or not kept or short.plain != kept[-1].plain:
            kept.append(short)
    return kept


def main() -> None:
    for name in sys.argv[1:] or SESSIONS:
        (PICTURES / f"{name}.svg").write_text(picture(name), "utf-8")


if __name__ == "__main__":
    main()
