"""A disk that is full, or read only: one message that names the place, and what was there before is still there."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_bdpo.training.callbacks.callback import Callback
from tests.distributed.test_bad_input import refusal
from tests.harness.jobs import last_stage, train

JOB = ["--num-layers", "1", "--train-iters", "4", "--save-interval", "2", "--tensor-model-parallel-size", "2"]


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or not mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)):
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int) -> None:
    """Leave so many bytes free."""
    free = shutil.disk_usage(place).free
    (place / "filler").write_bytes(bytes(max(0, free - leave)))


class Filling(Callback):
    """Fills a disk up after the third step, once the second's checkpoint is there: a start on a full one is refused."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def after_step(self, step):
        from megatron.training.async_utils import maybe_finalize_async_save

        if step.iteration == 3:
            maybe_finalize_async_save(blocking=True)  # with --async-save it may still be written
            if os.environ["RANK"] == "0":
                fill(self._place, leave=64 << 10)


def refusal_on_a_filling_disk(place, flags):
    return refusal(flags, callbacks=[Filling(place)])


@contextlib.contextmanager
def read_only(place: Path):
    """Also for root, who is not held to modes."""
    assert mount("-o", "remount,ro", str(place))
    try:
        yield
    finally:
        mount("-o", "remount,rw", str(place))


def assert_all_say(messages, expected):
    assert len(set(messages)) == 1, messages
    assert re.search(expected, messages[0], re.DOTALL), messages[0]


def test_a_disk_that_fills_up_during_a_checkpoint(ranks, disk):
    """The checkpoint before is still the newest one, and with room again the same command goes on from it."""
    run = disk / "run"
    flags = [*JOB, "--save", str(run), "--load", str(run)]
    messages = ranks(2)(refusal_on_a_filling_disk, disk, flags)
    assert all("iter_0000004 cannot be written" in message for message in messages)
    assert re.search(r"rank \d: .*The disk has 0\.\d MiB left", messages[0], re.DOTALL), messages[0]
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "2"
    (disk / "filler").unlink()
    assert [step["iteration"] for step in last_stage(ranks(2)(train, flags)).steps] == [3, 4]


def test_a_full_disk_for_the_tokens(ranks, disk):
    fill(disk, leave=16 << 10)
    messages = ranks(2)(refusal, ["--num-layers", "1"], pair_cache_dir=str(disk / "cache"))
    assert_all_say(messages, "cannot write to .*No space left on device")
    assert not list(disk.glob("cache/*/meta.json"))


@pytest.mark.parametrize(
    ("leave", "expected"),
    [
        (0, r"the disk has 0.0 kB left, and the run needs reference scores \d\.\d kB\. Make room, or name"),
        (4 << 10, "scores cannot be written to .*No space left on device"),
    ],
    ids=["at the start", "while they are written"],
)
def test_a_full_disk_for_the_scores(ranks, disk, tmp_path, leave, expected):
    (disk / "scores").mkdir()
    fill(disk, leave)
    flags = ["--num-layers", "1", "--reference-cache", str(disk / "scores")]
    messages = ranks(2)(refusal, flags, pair_cache_dir=str(tmp_path / "cache"))
    assert_all_say(messages, expected)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("pair_cache_dir", "--pair-cache-dir.*Read-only file system"),
        ("reference_cache", "scores cannot be written.*Read-only file system"),
        ("save", "--save .* cannot be written.*Read-only file system"),
    ],
)
def test_a_disk_that_cannot_be_written(ranks, disk, tmp_path, where, expected):
    overrides = {"pair_cache_dir": str(tmp_path / "cache"), "save_interval": 2} | {where: str(disk / "place")}
    if where != "save":
        del overrides["save_interval"]
    with read_only(disk):
        assert_all_say(ranks(2)(refusal, ["--num-layers", "1"], **overrides), expected)


def test_a_disk_that_becomes_read_only_while_training(ranks, disk):
    """Its metrics and its checkpoint cannot be written any more: one error, and what was saved stays good."""
    run = disk / "run"
    flags = [*JOB, "--save", str(run), "--load", str(run)]
    ranks(2)(train, [*flags, "--exit-interval", "2"])
    with read_only(disk):
        assert_all_say(ranks(2)(refusal, flags), "cannot be written")
    assert [step["iteration"] for step in last_stage(ranks(2)(train, flags)).steps] == [3, 4]


def test_a_flipped_bit_in_the_tokens(ranks, tmp_path):
    """Their arrays are compared at every start; tests/unit has damage to the other files."""
    cache = tmp_path / "cache"
    ranks(2)(train, ["--num-layers", "1", "--train-iters", "1"], pair_cache_dir=str(cache))
    (tokens,) = cache.glob("*/tokens.bin")
    data = bytearray(tokens.read_bytes())
    data[len(data) // 2] ^= 1
    tokens.write_bytes(data)
    messages = ranks(2)(refusal, ["--num-layers", "1"], pair_cache_dir=str(cache))
    assert_all_say(messages, rf"{tokens.parent}.*checksum of tokens\.bin is wrong.*[Dd]elete")
