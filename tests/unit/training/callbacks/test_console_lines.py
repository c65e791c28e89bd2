"""The lines that a run prints on the way, and the table at its end."""

from __future__ import annotations

import io
import re
import sys

import pytest

from megatron_bdpo.training.callbacks.console_lines import COLUMNS, ConsoleLines
from megatron_bdpo.training.callbacks.progress import LogInterval
from megatron_bdpo.training.reporting import console
from megatron_bdpo.training.reporting.advice import WINDOW, Advisor
from tests.harness.moments import evaluation, step, steps_record

pytestmark = pytest.mark.usefixtures("alone")


def lines(
    interval: int = 1, last_step: int = 100, clock: list[float] | None = None, *, wide: bool = False
) -> ConsoleLines:
    def now() -> float:
        return clock[0] if clock else 0.0

    return ConsoleLines(LogInterval(interval, last_step), Advisor(True), wide=wide, now=now)


FIRST = "loss 0.5000 | accuracy 0.750 | margin +1.0000 | 4.0 pairs/s"


@pytest.mark.parametrize(
    ("wide", "rest"),
    [(False, ""), (True, " | 50 tokens/s | rewards +0.5000 -0.5000 | logps -20.0 -30.0 | scale 0.900")],
    ids=["short", "wide"],
)
def test_a_line_with_the_time_that_is_left(capsys, wide, rest):
    clock = [0.0]
    found = lines(10, clock=clock, wide=wide)
    found.after_record(steps_record(10, scale=0.9))
    clock[0] = 20.0
    found.after_record(steps_record(20, scale=0.9))
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"step  10/100 | {FIRST}{rest}"
    assert second == f"step  20/100 | {FIRST} | ETA 0:02:40{rest}"


def test_a_long_job_has_short_lines(capsys):
    clock = [0.0]
    found = lines(1, 1_000_000, clock)
    for iteration in (1, 2):
        found.after_record(steps_record(iteration, loss=12345.6, **{"rewards/margins": -12345.6}))
        clock[0] = 3.0
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith("step       2/1000000 | loss 12345.6000 | accuracy 0.750 | margin -12345.6000 | 4.0 pairs/s")
    assert len(line) <= COLUMNS


def test_an_interval_of_skipped_steps(capsys):
    found = lines(2)
    for iteration, skipped in enumerate([True, False, True, True, False, True], 1):
        found.after_step(step(iteration, skipped=skipped))
    assert capsys.readouterr().out == ("step   4/100 | skipped: the gradients overflowed, the loss scale is lowered\n")


def test_advice_comes_after_its_line(capsys):
    found = lines()
    for iteration in range(1, WINDOW + 1):
        found.after_record(steps_record(iteration, **{"rewards/margins": 25.0}))
    last, advice = capsys.readouterr().out.splitlines()[-2:]
    assert last.startswith(f"step  {WINDOW}/100") and advice.startswith("WARNING: margins have grown to 25.0")


def test_the_table_is_of_the_first_and_the_last_evaluation(capsys):
    found = lines()
    assert found.table() is None
    found.after_record(evaluation(0, loss=0.7))
    assert found.table() is None
    found.after_record(evaluation(5, loss=0.6))
    found.after_record(evaluation(9, loss=0.5, **{"rewards/margins": -1e-9}))
    table = found.table()
    assert table is not None and table.titles == ["held-out pairs", "step 0", "step 9"]
    assert table.rows[0] == ["loss", "0.7000", "0.5000"]
    assert table.rows[2] == ["margin", "+1.0000", "+0.0000"], "zero has no sign"
    assert capsys.readouterr().out.splitlines()[1].startswith("held out, after step 5 | loss 0.6000")


def test_the_last_evaluation_is_told_once(capsys):
    found = lines()
    for iteration in (0, 9, 9):
        found.after_record(evaluation(iteration))
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "held out, after step 0",
        "held out, after step 9",
    ]


def test_other_ranks_are_silent(monkeypatch, capsys):
    monkeypatch.setattr("megatron_bdpo.training.callbacks.console_lines.is_last_rank", lambda: False)
    found = lines()
    found.after_step(step(1, skipped=True))
    found.after_record(evaluation(0))
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def put_in_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """One of 80 columns in the place of stdout. Not a fixture: pytest's own stdout would come after it."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@pytest.mark.parametrize("wide", [False, True])
def test_lines_fit_the_terminal(monkeypatch, wide):
    terminal = put_in_terminal(monkeypatch)
    lines(wide=wide).after_record(steps_record(1, **{"rewards/margins": -1.0}))
    (line,) = CODES.sub("", terminal.getvalue()).splitlines()
    assert len(line) <= 80 and line.startswith("step   1/100 | loss 0.5000") and "logps" not in line


@pytest.mark.parametrize(
    ("metrics", "code"),
    [({}, None), ({"rewards/margins": -1.0}, "33"), ({"loss": float("nan")}, "1;31")],
    ids=["healthy", "prefers-the-rejected", "not-finite"],
)
def test_what_is_wrong_is_in_colour(monkeypatch, metrics, code):
    terminal = put_in_terminal(monkeypatch)
    lines().after_record(steps_record(1, **metrics))
    assert re.findall(r"\x1b\[([0-9;]+)m[a-z]", terminal.getvalue()) == ([code] if code else [])


def test_a_bar_under_the_lines(monkeypatch):
    """It is drawn again below each line, and gone at the end; the cursor stays."""
    terminal = put_in_terminal(monkeypatch)
    found = lines(2, 4)
    with console.megatron_in_file(None), console.status_line():
        for iteration in (1, 2, 3, 4):
            found.after_step(step(iteration))
            if iteration % 2 == 0:
                found.after_record(steps_record(iteration))
    output = terminal.getvalue()
    assert "\x1b[?25l" not in output, "the cursor is not hidden: the job may be killed"
    assert output.count("━") > 10 and "2/4" in output and "4.0 pairs/s" in output
    kept = [line for line in CODES.sub("", output).replace("\r", "\n").splitlines() if line.startswith("step")]
    assert kept == [f"step {number}/4 | {FIRST}" for number in (2, 4)], "no room for the ETA: the bar has it"
    assert CODES.sub("", output.rpartition("\x1b[2K")[2]) == "", "the bar has been taken away"


def test_no_bar_in_a_file(capsys):
    with console.megatron_in_file(None), console.status_line():
        lines(2).after_step(step(1))
    assert capsys.readouterr().out == ""
