"""Directories are complete or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bdpo.artifact import new_directory, partial_directory


def written(target: Path, text: str, **how) -> str:
    with new_directory(target, **how) as at:
        (at / "file").write_text(text)
    return (target / "file").read_text()


@pytest.mark.parametrize("first_wins", [True, False])
def test_a_directory_that_is_not_finished_has_no_name(tmp_path, first_wins):
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "x", first_wins=first_wins) as at:
        (at / "file").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_has_left_is_not_kept(tmp_path):
    left = partial_directory(tmp_path / "x")
    left.mkdir()
    (left / "other").touch()
    assert written(tmp_path / "x", "whole") == "whole"
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "file"]


def test_of_two_that_write_the_same_the_first_wins(tmp_path):
    with new_directory(tmp_path / "x", first_wins=True) as at:
        (at / "file").write_text("second")
        assert written(tmp_path / "x", "first", first_wins=True) == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x" / "file").read_text() == "first"


def test_a_directory_that_is_there_is_not_replaced(tmp_path):
    written(tmp_path / "x", "old")
    with pytest.raises(OSError, match="not empty"):
        written(tmp_path / "x", "new")
    assert (tmp_path / "x" / "file").read_text() == "old" and not partial_directory(tmp_path / "x").exists()
