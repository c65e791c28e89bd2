"""Errors of the system while a checkpoint is written or read: tried twice, told as they are; and who hashes when."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.distributed.test_bad_input import refusal
from tests.distributed.test_resume import assert_bit_identical
from tests.harness.jobs import last_stage, train
from tests.reliability.test_async_save import ASYNC

JOB = ["--train-iters", "4", "--save-interval", "2", "--num-layers", "2", "--tensor-model-parallel-size", "2"]
TRACKER = "latest_checkpointed_iteration.txt"


def failing(function, number, times, applies):
    """A function that fails so often with an error of the system, where it applies."""
    left = [times]

    def fail(*arguments, **keywords):
        if left[0] and applies(*arguments):
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return function(*arguments, **keywords)

    return fail


def is_data(descriptor):
    return os.readlink(f"/proc/self/fd/{descriptor}").endswith(".distcp")


def with_failing_sync(job, number, times, flags):
    """On the second rank alone."""
    if os.environ["RANK"] != "1":
        return job(flags)
    with mock.patch.object(os, "fsync", failing(os.fsync, number, times, is_data)):
        return job(flags)


def in_place(directory):
    return [*JOB, "--save", str(directory), "--load", str(directory)]


def digests_are_right(checkpoint: Path) -> None:
    files = json.loads((checkpoint / "integrity.json").read_bytes())["files"]
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"} <= files.keys()
    for name, digest in files.items():
        assert hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == digest, name


def test_one_error_while_writing_is_nothing(ranks, tmp_path):
    """After a failed fsync what was written may be lost: all of the file is written again."""
    expected = ranks(2)(train, [*JOB, "--save", str(tmp_path / "expected")])
    outcomes = ranks(2)(with_failing_sync, train, errno.EIO, 1, in_place(tmp_path / "run"))
    assert [step["iteration"] for step in last_stage(outcomes).steps] == [1, 2, 3, 4]
    digests_are_right(tmp_path / "run" / "iter_0000002")
    (tmp_path / "run" / TRACKER).write_text("2")
    assert_bit_identical(expected, ranks(2)(train, in_place(tmp_path / "run")))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EIO, r"Input/output error.*It was tried twice"),
        (errno.EDQUOT, r"Disk quota exceeded.*A quota is used up"),
        (errno.ENOSPC, r"No space left on device.*The disk has [\d,.]+ MiB left"),
        (errno.EROFS, r"Read-only file system.*can be read only"),
    ],
)
def test_an_error_that_stays_is_told_as_it_is(ranks, tmp_path, number, expected):
    ranks(2)(train, [*in_place(tmp_path), "--exit-interval", "2"])
    messages = ranks(2)(with_failing_sync, refusal, number, 1000, in_place(tmp_path))
    assert re.search(rf"iter_0000004 cannot be written: rank 1: .*{expected}", messages[0], re.DOTALL), messages[0]
    assert ("MiB left" in messages[0]) == (number == errno.ENOSPC)
    assert (tmp_path / TRACKER).read_text() == "2"


def limit(process: int) -> None:
    resource.prlimit(process, resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def with_limited_files(flags):
    """The process that writes may do so from the third step on, in the loop only while it writes: it has logs too."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training.async_utils import maybe_finalize_async_save

    from megatron_bdpo.training.callbacks.callback import Callback

    is_limited = [False]
    write = FileSystemWriterAsync.write_preloaded_data

    def write_limited(*arguments, **keywords):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if is_limited[0]:
            limit(0)
        try:
            return write(*arguments, **keywords)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    class Limited(Callback):
        def after_step(self, step):
            if step.iteration == 3:
                maybe_finalize_async_save(blocking=True)  # the second step's, which may still be written
                is_limited[0] = True
                if PersistentAsyncCaller._persistent_process is not None:
                    limit(PersistentAsyncCaller._persistent_process.pid)

    with mock.patch.object(FileSystemWriterAsync, "write_preloaded_data", staticmethod(write_limited)):
        return refusal(flags, callbacks=[Limited()])


@pytest.mark.parametrize("writer", [[], ASYNC], ids=["in the loop", "in the background"])
def test_a_limit_of_a_files_size(ranks, tmp_path, writer):
    flags = [*in_place(tmp_path), *writer]
    messages = ranks(2)(with_limited_files, flags)
    if writer:
        ranks(2)(close_the_writer)
    assert re.search(r"rank \d: .*\[Errno 27\] File too large.*ulimit -f", messages[0], re.DOTALL), messages[0]
    assert "MiB left" not in messages[0]
    assert (tmp_path / TRACKER).read_text() == "2"
    assert [step["iteration"] for step in last_stage(ranks(2)(train, flags)).steps] == [3, 4]


def close_the_writer():
    """Another save starts another process, without the limit."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    if AsyncCallsQueue._persistent_caller is not None:
        AsyncCallsQueue._persistent_caller.close(abort=True)
        AsyncCallsQueue._persistent_caller = None


# Reading -------------------------------------------------------------------------------------------------------------


def with_failing_reads(job, where, times, flags):
    """On the second rank, or of the first one's manifest."""
    from megatron_bdpo.training import checkpoints

    if os.environ["RANK"] != ("0" if where == "manifest" else "1"):
        return job(flags)
    if where == "digest":
        target, name = checkpoints.hashlib, "file_digest"
    elif where == "manifest":
        target, name = Path, "read_bytes"
    else:
        import torch.distributed.checkpoint.filesystem as reader

        target, name = reader.FileSystem, "create_stream"
    original = getattr(target, name)

    def applies(*arguments):
        text = [str(each) for each in arguments if isinstance(each, str | Path)]
        return where == "digest" or any("iter_" in each for each in text)

    @contextlib.contextmanager
    def stream(*arguments):
        if left[0] and str(arguments[1]).endswith(".distcp"):
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        with original(*arguments) as opened:
            yield opened

    left = [times]
    fails = stream if where == "load" else failing(original, errno.EIO, times, applies)
    with mock.patch.object(target, name, fails):
        return job(flags)


@pytest.mark.parametrize("where", ["digest", "manifest", "load"])
def test_one_error_while_reading_is_nothing(ranks, tmp_path, where):
    ranks(2)(train, [*in_place(tmp_path), "--exit-interval", "2"])
    outcomes = ranks(2)(with_failing_reads, train, where, 1, in_place(tmp_path))
    assert [step["iteration"] for step in last_stage(outcomes).steps] == [3, 4]


@pytest.mark.parametrize("where", ["digest", "manifest"])
def test_what_cannot_be_read_is_not_taken_for_damaged(ranks, tmp_path, where):
    """The tracker stays, and the run ends: older weights would be lost steps."""
    ranks(2)(train, in_place(tmp_path))
    messages = ranks(2)(with_failing_reads, refusal, where, 1000, in_place(tmp_path))
    assert len(set(messages)) == 1
    assert re.search(r"cannot be read: Input/output error.*nothing was changed", messages[0]), messages[0]
    assert (tmp_path / TRACKER).read_text() == "4"


# Who hashes ----------------------------------------------------------------------------------------------------------


def opened_again(flags):
    """Names of the files with tensors that this process opens to read them while it saves."""
    found, watching = [], [True]

    def hook(event, arguments):
        if watching[0] and event == "open" and str(arguments[0]).endswith(".distcp") and "r" in str(arguments[1]):
            found.append(Path(arguments[0]).name)

    sys.addaudithook(hook)
    try:
        train(flags)
        return found
    finally:
        watching[0] = False


@pytest.mark.parametrize("writer", [[], ASYNC], ids=["in the loop", "in the background"])
def test_what_is_written_is_not_read_again(ranks, tmp_path, writer):
    assert ranks(2)(opened_again, [*JOB, *writer, "--save", str(tmp_path)]) == [[], []]
    for iteration in (2, 4):
        digests_are_right(tmp_path / f"iter_{iteration:07d}")


def digest_of_stream(path: str, sizes: list[int]) -> bool:
    from megatron_bdpo.platform.writing import _Stream

    with _Stream(open(path, "wb"), True) as stream:
        for number, size in enumerate(sizes):
            stream.write(memoryview(bytes([number % 251]) * size))
    return stream.digest() == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_large_pieces_are_hashed_beside_their_writing(ranks, tmp_path):
    assert ranks(1)(digest_of_stream, str(tmp_path / "file"), [5, 3 << 20, 0, 1 << 20, (1 << 20) - 1, 7]) == [True]
