"""The matrix: layouts x models x losses x optimizers, each against one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.parity import Deviations, beyond, deviations
from tests.parity.matrix import CASES, COVER, FULL_JOB, MODELS, Case, render, rows

TABLE = Path(__file__).parents[2] / "docs" / "parity.md"


@pytest.fixture(scope="module")
def found(pytestconfig) -> Iterator[dict[Case, Deviations]]:
    """The deviations seen; written to docs/parity.md when asked for and every case has passed."""
    seen: dict[Case, Deviations] = {}
    yield seen
    if pytestconfig.getoption("--write-parity-table") and len(seen) == len(CASES):
        TABLE.write_text(render(seen), "utf-8")


def marked(case: Case) -> object:
    return pytest.param(case, id=str(case), marks=[] if case in COVER else pytest.mark.full_matrix)


@pytest.mark.parametrize("case", map(marked, CASES))
def test_trains_like_one_process(run, one_process, found, pytestconfig, case):
    overrides = MODELS[case.model].overrides | (FULL_JOB if pytestconfig.getoption("--full-matrix") else {})
    expected = one_process(["--preference-loss", case.loss], overrides)
    deviation = deviations(run(case.ranks, case.flags, overrides), expected)
    assert beyond(deviation, case.allowed) == {}
    found[case] = deviation


def test_the_table_is_of_this_matrix():
    """docs/parity.md is written by `make parity`."""
    assert rows(TABLE.read_text("utf-8")) == [
        (name, layout) for name, model in MODELS.items() for layout in model.layouts
    ]
