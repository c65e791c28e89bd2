"""A disk that fills up again and again, at any moment of a checkpoint: nothing is lost, and what is said is true."""

from __future__ import annotations

import errno
import os
import re

import pytest

from megatron_bdpo.training.callbacks.callback import Callback
from tests.distributed.test_bad_input import refusal
from tests.distributed.test_resume import assert_bit_identical
from tests.harness.jobs import train
from tests.reliability.test_disk import disk, fill  # noqa: F401  # a fixture
from tests.reliability.test_writing import digests_are_right

JOB = ["--train-iters", "4", "--save-interval", "1", "--keep-checkpoints", "2", "--num-layers", "1"]
LAYOUT = ["--tensor-model-parallel-size", "2"]
TRACKER = "latest_checkpointed_iteration.txt"

#: Bytes that are left as the checkpoint of step 3 begins: none; too few for the first rank's file, the second's, the
#: index of both, the manifest.
LEFT = (0, 50_000, 600_000, "index", "manifest")


class FillingAsASaveBegins(Callback):
    """Before the files of the third step's checkpoint are written, or between them."""

    def __init__(self, place, left):
        self._place, self._left = place, left

    def saving(self, directory):
        if directory.name.endswith("3") and os.environ["RANK"] == "0" and isinstance(self._left, int):
            fill(self._place, leave=self._left)


def refusal_as_it_fills(place, left, flags):
    from megatron_bdpo.platform import writing
    from megatron_bdpo.training import checkpoints

    module, name = {"index": (writing.FileSystemWriterAsync, "finish"), "manifest": (checkpoints, "write_whole")}.get(
        left, (None, "")
    )
    if module is None or os.environ["RANK"] != "0":
        return refusal(flags, callbacks=[FillingAsASaveBegins(place, left)])
    original, calls = getattr(module, name), []

    def fill_first(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 1:  # the steps before are done: this is the third's
            fill(place, leave=0)
        return original(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, fill_first)
        return refusal(flags)


def test_nothing_is_lost(ranks, disk, tmp_path):  # noqa: F811
    run = disk / "run"
    flags = [*JOB, *LAYOUT, "--save", str(run), "--load", str(run)]
    expected = ranks(2)(train, [*JOB, *LAYOUT, "--save", str(tmp_path / "expected")])
    ranks(2)(train, [*flags, "--exit-interval", "2"])
    for left in LEFT:
        messages = ranks(2)(refusal_as_it_fills, disk, left, flags)
        said = rf"iter_0000003 cannot be written: .*{os.strerror(errno.ENOSPC)}.*The disk has 0\.\d MiB left"
        assert re.search(said, messages[0], re.DOTALL), (left, messages)
        assert (run / TRACKER).read_text() == "2", left
        digests_are_right(run / "iter_0000002")
        (disk / "filler").unlink()
    assert_bit_identical(expected, ranks(2)(train, flags))
    digests_are_right(run / "iter_0000004")
