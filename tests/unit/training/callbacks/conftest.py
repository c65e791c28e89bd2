"""Callbacks are tested one by one, most of them without Megatron; whole runs are in distributed/ and reliability/."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_bdpo.training.distributed import process_groups
from tests.harness.jobs import own_process


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is the first and the last rank."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with process_groups(own_process()):
        yield
