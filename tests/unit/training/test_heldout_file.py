"""heldout_rewards.jsonl: the first and the latest evaluation, and what a resumed run keeps of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reporting.heldout_file import HeldOutFile, HeldOutRewards, read_heldout


def evaluation(step: int) -> HeldOutRewards:
    """Of two pairs; the rejected answer of one has no finite reward."""
    return HeldOutRewards(step, np.array([3, 9]), np.array([[0.1, np.inf], [-1e-3, step]]), np.array([[4, 5], [6, 7]]))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "heldout_rewards.jsonl"


def steps(path) -> list[int]:
    return [found.step for found in read_heldout(path)]


def test_what_is_written_is_read(path):
    HeldOutFile(path, 0).add(evaluation(5))
    (found,) = read_heldout(path)
    assert found.pairs.tolist() == [3, 9] and found.tokens.tolist() == [[4, 5], [6, 7]]
    assert np.array_equal(found.rewards, [[0.1, np.nan], [-1e-3, 5]], equal_nan=True)
    assert json.loads(path.read_text())["rejected"] == [None, 5.0]


def test_the_first_and_the_latest_stay(path):
    file = HeldOutFile(path, 0)
    assert not path.exists()
    for step in (0, 4, 8, 8):  # Megatron evaluates twice after a last step
        file.add(evaluation(step))
    assert steps(path) == [0, 8]


def test_a_resumed_run_drops_what_it_does_again(path):
    file = HeldOutFile(path, 0)
    file.add(evaluation(2))
    file.add(evaluation(8))
    file = HeldOutFile(path, 5)
    assert steps(path) == [2]
    file.add(evaluation(6))
    assert steps(path) == [2, 6]
    HeldOutFile(path, 0)
    assert steps(path) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"chosen": [1.0]},
        {"chosen": [1.0, 2.0, 3.0], "rejected": [1.0, 2.0, 3.0]},
        {"pair": ["a", "b"]},
        {"pair": None},
        {"rejected_tokens": [2**70, 1]},
    ],
)
def test_a_damaged_line_is_named(path, changed):
    HeldOutFile(path, 0).add(evaluation(1))
    path.write_text(json.dumps(json.loads(path.read_text()) | changed) + "\n")
    with pytest.raises(UserError, match="line 1 holds no rewards of pairs"):
        read_heldout(path)


def test_a_missing_column_is_named(path):
    path.write_text('{"step": 1, "pair": [1]}\n')
    with pytest.raises(UserError, match="'chosen' is missing"):
        read_heldout(path)


def test_a_file_that_cannot_be_written_is_said_once(path, capsys, monkeypatch):
    file = HeldOutFile(path, 0)
    path.mkdir()  # in its place
    for step in (1, 2):
        file.add(evaluation(step))
    assert capsys.readouterr().out.count("the rewards of held-out pairs are lost") == 1
    with pytest.raises(UserError, match="cannot be"):
        HeldOutFile(path, 1)
