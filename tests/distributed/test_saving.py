"""What writing a checkpoint leaves behind in the processes that write it."""

from __future__ import annotations

import multiprocessing

from tests.harness.jobs import train


def _children_of_saving(directory: str) -> list[str]:
    before = multiprocessing.active_children()
    train(["--train-iters", "2", "--save", directory, "--save-interval", "1"])
    return [child.name for child in multiprocessing.active_children() if child not in before]


def test_no_process_is_started_to_write_a_checkpoint(ranks, tmp_path):
    """One that outlives a killed rank holds 0.3 GB for good."""
    assert ranks(2)(_children_of_saving, str(tmp_path / "run")) == [[], []]
