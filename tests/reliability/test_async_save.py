"""Checkpoints that are written while training goes on: of one step, digests and all, before the tracker names them."""

from __future__ import annotations

import hashlib
import json
import re

from megatron_bdpo.training.callbacks.callback import Callback
from tests.distributed.test_resume import assert_bit_identical
from tests.harness.jobs import train
from tests.harness.writers import writers_as_in_life
from tests.reliability.test_disk import disk, refusal_on_a_filling_disk  # noqa: F401  # a fixture

JOB = ["--train-iters", "4", "--save-interval", "2", "--num-layers", "2", "--tensor-model-parallel-size", "2"]
ASYNC = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]


def train_with_writers_as_in_life(flags):
    with writers_as_in_life():
        return train(flags)


def test_its_checkpoint_is_of_its_step_and_has_its_digests(ranks, tmp_path):
    """Resumed from the second step, whose files were written during the third, the fourth is that of a run without."""
    run = tmp_path / "run"
    expected = ranks(2)(train, [*JOB, "--save", str(tmp_path / "expected")])
    ranks(2)(train_with_writers_as_in_life, [*JOB, *ASYNC, "--save", str(run)])
    for checkpoint in (run / "iter_0000002", run / "iter_0000004"):
        files = json.loads((checkpoint / "integrity.json").read_bytes())["files"]
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"} <= files.keys()
        for name, digest in files.items():
            assert hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == digest, name
    (run / "latest_checkpointed_iteration.txt").write_text("2")
    assert_bit_identical(expected, ranks(2)(train, [*JOB, *ASYNC, "--save", str(run), "--load", str(run)]))


def test_a_full_disk_is_told_of(ranks, disk):  # noqa: F811
    run = disk / "run"
    messages = ranks(2)(refusal_on_a_filling_disk, disk, [*JOB, *ASYNC, "--save", str(run)])
    assert all("iter_0000004 cannot be written" in message for message in messages), messages
    assert re.search(r"rank \d: .*The disk has 0\.\d MiB left", messages[0], re.DOTALL), messages[0]
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "2"


def train_and_kill_the_writer(flags):
    """With a SIGKILL for the process that writes, after the first step and again after the third."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.training.async_utils import maybe_finalize_async_save

    class Killing(Callback):
        def after_step(self, step):
            if step.iteration in (1, 3):
                maybe_finalize_async_save(blocking=True)
                PersistentAsyncCaller._persistent_process.kill()
                PersistentAsyncCaller._persistent_process.join()

    return train(flags, callbacks=[Killing()])


def test_a_writer_that_died_is_replaced(ranks, tmp_path):
    """Megatron itself hands the next checkpoint to the dead one, and waits for ever."""
    expected = ranks(2)(train, [*JOB, "--save", str(tmp_path / "expected")])
    run = tmp_path / "run"
    ranks(2)(train_and_kill_the_writer, [*JOB, *ASYNC, "--save", str(run)], timeout=120)
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "4"
    (run / "latest_checkpointed_iteration.txt").write_text("2")
    assert_bit_identical(expected, ranks(2)(train, [*JOB, *ASYNC, "--save", str(run), "--load", str(run)]))
