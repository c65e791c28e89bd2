"""The lines that a run prints on the way, and the table at its end."""

from __future__ import annotations

import io
import os
import sys

import pytest

from megatron_bdpo.training.callbacks.console_lines import ConsoleLines, _fitting
from megatron_bdpo.training.callbacks.progress import LogInterval
from megatron_bdpo.training.reporting.advice import WINDOW, Advisor
from tests.harness.moments import evaluation, step, steps_record

pytestmark = pytest.mark.usefixtures("alone")


def lines(interval: int = 1, last_step: int = 100, clock: list[float] | None = None) -> ConsoleLines:
    return ConsoleLines(LogInterval(interval, last_step), Advisor(True), now=lambda: clock[0] if clock else 0.0)


def test_a_line_with_the_time_that_is_left(capsys):
    clock = [0.0]
    found = lines(10, clock=clock)
    found.after_record(steps_record(10, scale=0.9))
    clock[0] = 20.0
    found.after_record(steps_record(20))
    first, second = capsys.readouterr().out.splitlines()
    metrics = "loss 0.5000 | accuracy 0.750 | margin +1.0000 | 4.0 pairs/s 50 tokens/s"
    rest = "rewards +0.5000 -0.5000 | logps -20.0 -30.0"
    assert first == f"step  10/100 | {metrics} | {rest} | scale 0.900"
    assert second == f"step  20/100 | {metrics} | ETA 0:02:40 | {rest}"


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


def test_other_ranks_are_silent(monkeypatch, capsys):
    monkeypatch.setattr("megatron_bdpo.training.callbacks.console_lines.is_last_rank", lambda: False)
    found = lines()
    found.after_step(step(1, skipped=True))
    found.after_record(evaluation(0))
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


@pytest.mark.parametrize(("columns", "expected"), [(80, "a" * 30 + " | " + "b" * 30), (200, None)])
def test_lines_fit_the_terminal(monkeypatch, columns, expected):
    line = "a" * 30 + " | " + "b" * 30 + " | " + "c" * 30
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr("os.get_terminal_size", lambda descriptor: os.terminal_size((columns, 24)))
    assert _fitting(line) == (expected or line)
