"""The process that writes a rank's checkpoints for --async-save, forked from the server that the rank is from."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

_server: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]


def fork_writers() -> None:
    """Have Megatron fork this rank's writers from the server that has imported all, if there is one.

    It would start another one, which has imported nothing: each writer would take five seconds.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    if _server._forkserver_address:
        _server.ensure_running = lambda: None
        PersistentAsyncCaller.async_loop = staticmethod(write)


def write(*args: Any) -> None:
    """The writer's life. It ends with its rank: it is the server's child, and in no process group of the rank's."""
    from megatron_bdpo.platform.cpu import _write_checkpoints

    threading.Thread(target=_end_with_rank, daemon=True).start()
    _write_checkpoints(*args)


def _end_with_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank
    rank.join()
    os._exit(1)


@contextlib.contextmanager
def writers_as_in_life() -> Iterator[None]:
    """Writers that start inside the block do so as outside of tests."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    from megatron_bdpo.platform.cpu import _write_checkpoints

    own = {"_forkserver_address": None, "ensure_running": functools.partial(type(_server).ensure_running, _server)}
    with (
        mock.patch.multiple(_server, **own),
        mock.patch.object(PersistentAsyncCaller, "async_loop", _write_checkpoints),
    ):
        yield
