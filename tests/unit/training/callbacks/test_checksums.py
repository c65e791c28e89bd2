"""Digests are left where they are wanted, and a full disk is told of; damaged files are in reliability/."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bdpo.errors import UserError
from tests.harness.jobs import own_process


def names_after(directory: Path, *, wanted: bool) -> list[str]:
    from megatron_bdpo.training.callbacks.checksums import Checksums
    from megatron_bdpo.training.distributed import process_groups

    with process_groups(own_process()):
        Checksums(wanted=wanted).after_files(directory)
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("wanted", "expected"), [(True, ["integrity.json", "metadata.json"]), (False, ["metadata.json"])]
)
def test_digests_where_they_are_wanted(ranks, tmp_path, wanted, expected):
    (tmp_path / "metadata.json").write_text("{}")
    assert ranks(1)(names_after, tmp_path, wanted=wanted) == [expected]


def what_a_full_disk_says(directory: Path) -> str:
    from megatron_bdpo.training.callbacks.checksums import Checksums

    try:
        with Checksums(wanted=True).saving(directory):
            raise OSError("No space left on device")
    except UserError as error:
        return str(error)
    return ""


def test_a_full_disk(ranks, tmp_path):
    (said,) = ranks(1)(what_a_full_disk_says, tmp_path / "iter_0000002")
    assert "iter_0000002 cannot be written: No space left on device. The disk has" in said
