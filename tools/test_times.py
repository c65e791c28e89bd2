"""What each test file costs, as a plugin of pytest: ``python -m pytest -p tools.test_times [paths]``.

Wall time, and processor time of pytest's whole process tree: ranks, programs, their children. A fixture that several
tests share counts for the first. Linux only. Not counted: what has left the tree (daemons, the nodes of a SLURM lab).
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import pytest

FILES, TESTS = 100, 40  # rows of the tables at the end

_started: dict[str, tuple[float, float]] = {}
_costs: dict[str, tuple[float, float]] = {}


def processor_seconds(root: int) -> float:
    """User and system time of a process, its living descendants, and all of their children that they waited for."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended just now
        process = int(entry.parent.name)
        parents[process], ticks[process] = int(fields[1]), sum(map(int, fields[11:15]))
    family = {root}
    while more := {process for process, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks.get(process, 0) for process in family) / os.sysconf("SC_CLK_TCK")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logstart(nodeid: str) -> None:
    _started[nodeid] = time.monotonic(), processor_seconds(os.getpid())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if call.when == "teardown":  # the last one of a test; with pytest-xdist it travels from the worker
        wall, processor = _started[item.nodeid]
        cost = time.monotonic() - wall, processor_seconds(os.getpid()) - processor
        report.user_properties.append(("cost", cost))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, cost in report.user_properties:
        if name == "cost":
            _costs[report.nodeid] = cast(tuple[float, float], cost)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    files, directories = _totals(lambda test: test.split("::")[0]), _totals(lambda test: "/".join(test.split("/")[:2]))
    for title, costs, rows in (
        ("directories", directories, FILES),
        ("test files", files, FILES),
        ("tests", _costs, TESTS),
    ):
        terminalreporter.section(f"{title}: wall s, processor s")
        for name, (wall, processor) in sorted(costs.items(), key=lambda entry: -entry[1][1])[:rows]:
            terminalreporter.write_line(f"{wall:8.1f} {processor:8.1f}  {name}")
    wall, processor = (sum(column) for column in zip(*_costs.values(), strict=True)) if _costs else (0, 0)
    terminalreporter.write_line(f"{wall:8.1f} {processor:8.1f}  all")


def _totals(group: Any) -> dict[str, tuple[float, float]]:
    totals: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for test, (wall, processor) in _costs.items():
        before = totals[group(test)]
        totals[group(test)] = before[0] + wall, before[1] + processor
    return totals
