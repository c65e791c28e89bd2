"""The matrix: layouts x models x losses x optimizers, each against one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.parity import beyond, deviations
from tests.parity.matrix import ALLOWED, CASES, MODELS, Case, render, rows

TABLE = Path(__file__).parents[2] / "docs" / "parity.md"


@pytest.fixture(scope="module")
def found() -> Iterator[dict[Case, dict[str, float]]]:
    """The deviations seen; written to docs/parity.md when asked for and nothing was left out."""
    seen: dict[Case, dict[str, float]] = {}
    yield seen
    if os.environ.get("WRITE_PARITY_TABLE") and len(seen) == len(CASES):
        TABLE.write_text(render(seen))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trains_like_one_process(run, one_process, found, case):
    overrides = MODELS[case.model].overrides
    expected = one_process(["--preference-loss", case.loss], overrides)
    deviation = deviations(run(case.ranks, case.flags, overrides), expected)
    assert beyond(deviation, ALLOWED) == {}
    found[case] = deviation


def test_the_table_has_this_matrix():
    """docs/parity.md is written by `make parity`."""
    assert rows(TABLE.read_text()) == [(name, layout) for name, model in MODELS.items() for layout in model.layouts]
