"""How a rank writes and reads the files of a checkpoint, where Megatron's way is not ours.

Files are hashed while they are written, by the thread that writes them, in the rank or in the process of its own that
``--async-save`` has: Megatron's ``--verify-integrity`` has one rank read all of them again, in the training run's loop.
An error of input or output that is gone at the second try ends nothing, and one that is not keeps its number on the way
through Megatron's queues.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, PersistentAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint import FileSystemReader

Replacement = tuple[Any, str, Callable[..., Any]]

ALGORITHM = "sha256"

#: A smaller piece is hashed where it is written: another thread would take longer to wake up.
_WORTH_A_THREAD = 2**20

_digests: dict[str, str] = {}
_failures: list[OSError] = []


def take_digest(path: str) -> str | None:
    """The digest of a file that this rank has just written, once."""
    return _digests.pop(path, None)


def raise_failure() -> None:
    """Raise what kept this rank from writing one of the files that the first rank writes alone.

    Raised where it happens it would leave the others waiting in Megatron's next collective.
    """
    if _failures:
        raise _failures.pop()


def _kept_for_later(work: Callable[..., None]) -> Callable[..., None]:
    def kept(*args: Any, **kwargs: Any) -> None:
        try:
            work(*args, **kwargs)
        except OSError as error:
            _failures[:] = [error]

    return kept


def once_more[Result](work: Callable[..., Result]) -> Callable[..., Result]:
    """The function, tried a second time where the first ends with EIO."""

    def tried(*args: Any, **kwargs: Any) -> Result:
        try:
            return work(*args, **kwargs)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            print(f"an error of input or output is tried again: {error}", flush=True)
            return work(*args, **kwargs)

    return tried


def writer_seams(*, hashes: bool) -> list[Replacement]:
    """What to put in the place of functions of Megatron's writer and reader.

    Args:
        hashes: whether anybody wants digests.
    """
    writer, reader = FileSystemWriterAsync, FileSystemReader
    return [
        (writer, "get_save_function_and_args", _to_write(writer.get_save_function_and_args, hashes)),
        (writer, "retrieve_write_results", _taking_digests(writer.retrieve_write_results)),
        (writer, "finish", _kept_for_later(once_more(writer.finish))),
        (serialization, "save_config", _kept_for_later(once_more(serialization.save_config))),
        (reader, "read_data", once_more(reader.read_data)),
        (reader, "read_metadata", once_more(reader.read_metadata)),
    ]


def _to_write(original: Callable[..., Any], hashes: bool) -> Callable[..., Any]:
    def get_save_function_and_args(self: Any) -> Any:
        write, preload, arguments = original(self)
        return (partial(write_and_hash, write, hashes) if write else None), preload, arguments

    return get_save_function_and_args


def write_and_hash(write: Callable[..., None], hashes: bool, rank: int, buckets: Any, results: Any) -> None:
    """Megatron's ``write`` of a rank's files, in whatever process: puts what it has put, and digests, into ``results``.

    It is Megatron's function that opens, fills and closes a file; it is given another ``open``.
    """
    answer: queue.Queue[Any] = queue.Queue()
    files = _Files(hashes)
    outcome: Any
    try:
        with files.watched():
            write(rank, buckets, answer)
        outcome = answer.get_nowait()
    except Exception as error:  # an assertion of Megatron's that a thread has brought results
        outcome = RuntimeError(f"{type(error).__name__}: {error}")
    if files.failures:
        outcome = RuntimeError("; ".join(files.failures))
    results.put(outcome if isinstance(outcome, Exception) else (outcome, files.digests))


def _taking_digests(original: Callable[..., Any]) -> Callable[..., Any]:
    def retrieve_write_results(self: Any) -> Any:
        if self.results_queue is not None:
            with contextlib.suppress(queue.Empty):
                outcome = self.results_queue.get_nowait()
                if isinstance(outcome, tuple):
                    outcome, digests = outcome
                    _digests.update(digests)
                self.results_queue = queue.Queue()
                self.results_queue.put(outcome)
        return original(self)

    return retrieve_write_results


class _Files:
    """The files of one save of one rank."""

    def __init__(self, hashes: bool) -> None:
        self.digests: dict[str, str] = {}
        """By path, of those that are whole."""
        self.failures: list[str] = []
        self._hashes = hashes
        self._streams: dict[str, _Stream] = {}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the block Megatron's writer opens its files here, and each file is tried twice."""
        before = FileSystemWriterAsync.write_preloaded_data
        FileSystemWriterAsync.write_preloaded_data = staticmethod(partial(self._write, before))
        filesystem_async.open = self._open  # before the built-in one
        try:
            yield
        finally:
            FileSystemWriterAsync.write_preloaded_data = staticmethod(before)
            del filesystem_async.open

    def _open(self, path: str, mode: str) -> _Stream:
        stream = _Stream(open(path, mode), self._hashes)  # noqa: SIM115  # which closes it
        self._streams[str(path)] = stream
        return stream

    def _write(
        self,
        original: Callable[..., Any],
        transforms: Any,
        local_proc_idx: int,
        write_bucket: Any,
        results_queue: Any,
        count_queue: Any,
        use_fsync: bool,
        **kwargs: Any,
    ) -> Any:
        """Megatron's ``write_preloaded_data``: one file, an exception being a result."""
        path = str(write_bucket[0])
        for _ in range(2):
            output = original(transforms, local_proc_idx, write_bucket, None, None, use_fsync, **kwargs)
            _forget_frames(output[1])
            stream = self._streams.pop(path, None)
            # torch makes an error of its own of one that a stream raises.
            failure = stream.failure if stream and stream.failure else output[1]
            # All of the file is written again: after a failed fsync the system may have forgotten any part of it.
            if not (isinstance(failure, OSError) and failure.errno == errno.EIO):
                break
        if isinstance(failure, Exception):
            self.failures.append(f"{path}: {failure}")
            output = (local_proc_idx, failure)
        elif stream and self._hashes:
            self.digests[path] = stream.digest()
        if results_queue is not None:
            results_queue.put(output)
        if count_queue is not None:
            count_queue.get()
            count_queue.task_done()
        return output


def _forget_frames(outcome: object) -> None:
    """Have an exception, and those before it, hold no frames.

    Megatron's frame holds the exception, and the frames of torch what they were writing: a cycle, whose collection ends
    CPython 3.12 with a fault where it comes to a BytesIO before what looks into it (``getbuffer``).
    """
    while isinstance(outcome, BaseException):
        outcome.__traceback__ = None
        outcome = outcome.__cause__ or outcome.__context__


class _Stream:
    """A file that is written from its beginning to its end, and hashed on the way."""

    def __init__(self, file: IO[bytes], hashes: bool) -> None:
        self.failure: OSError | None = None
        """What kept it from being written."""
        self._file = file
        self._hash = hashlib.new(ALGORITHM) if hashes else None
        self._beside: ThreadPoolExecutor | None = None

    def write(self, data: Any) -> int:
        with self._kept():
            if self._hash is None:
                return self._file.write(data)
            if memoryview(data).nbytes < _WORTH_A_THREAD:
                self._hash.update(data)
                return self._file.write(data)
            self._beside = self._beside or ThreadPoolExecutor(1)
            hashed = self._beside.submit(self._hash.update, data)  # neither holds the interpreter
            try:
                return self._file.write(data)
            finally:
                hashed.result()

    def flush(self) -> None:
        with self._kept():
            self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()

    def digest(self) -> str:
        assert self._hash is not None
        return self._hash.hexdigest()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or OSError(error.errno, error.strerror)
            raise

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._beside:
            self._beside.shutdown()
        with self._kept():
            self._file.close()


# The process beside a rank: none where the rank writes by itself, another where it died -------------------------------


@contextlib.contextmanager
def written_by_this_process() -> Iterator[None]:
    """Checkpoints saved inside the block, without ``--async-save``, are written without a second process.

    The writer's threads report through a queue that a process of its own serves, which Megatron starts at the first
    save whoever writes. Where the rank writes by itself, one within the process does. The other costs 0.3 GB of memory
    for each rank, imports torch once more, and outlives a rank that is killed.
    """
    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


def replace_dead_writer() -> None:
    """With ``--async-save``: forget a process for writing that died between two checkpoints; Megatron starts another.

    Megatron would hand it the next checkpoint and wait for ever. It dies by a signal of the system (out of memory).
    """
    process = PersistentAsyncCaller._persistent_process
    if process is None or process.is_alive():
        return
    print(f"the process that wrote checkpoints has died (exit code {process.exitcode}); another is started", flush=True)
    PersistentAsyncCaller._persistent_process = None
    PersistentAsyncCaller._persistent_queue = None
    PersistentAsyncCaller._persistent_preload_q = None
    PersistentAsyncCaller._persistent_comp_q = None
    if AsyncCallsQueue._persistent_caller is not None:
        AsyncCallsQueue._persistent_caller.process = None
