"""Starting the ranks, and failing together: an error on one rank ends all of them, with one message."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed

from megatron_bdpo.display import Block
from megatron_bdpo.errors import PassingError, UserError
from megatron_bdpo.training.failing import FAILURE, is_first_of_launcher, left_alone
from megatron_bdpo.training.megatron_settings import ProcessSettings
from megatron_bdpo.training.phases import IN_STEP, clock, start_clock, waiting
from megatron_bdpo.training.reporting.console import show

#: One rank may tokenise, read or write for hours while the others wait for it.
_PATIENCE = timedelta(days=2)

_LEAVE_TOGETHER = timedelta(seconds=10)

_host_group: Any = None
_step_patience = _host_patience = _PATIENCE


@contextlib.contextmanager
def process_groups(process: ProcessSettings) -> Iterator[None]:
    """Start ``torch.distributed`` before Megatron does (it then keeps ours), so that data preparation can use it.

    A process that is made up plays rank 0 of the others: collectives answer with its own values.
    """
    global _host_group, _step_patience, _host_patience
    FAILURE.is_alone, FAILURE.cause = False, ""
    start_clock()
    backend, host_backend = process.backend, "gloo"
    kwargs: dict[str, Any] = {}
    if process.is_made_up:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        backend = host_backend = "fake"
        kwargs["store"] = FakeStore()
    elif backend == "nccl":
        # No device_id, as in Megatron: with it torch splits every later group off this one's communicator, and what is
        # meant to overlap (tensor, pipeline and data parallelism) waits for one another.
        torch.cuda.set_device(process.local_rank)
    if process.ranks == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")  # any that is free
    distributed.init_process_group(
        backend=backend,
        world_size=process.ranks,
        rank=process.rank,
        timeout=timedelta(minutes=process.timeout_minutes),
        **kwargs,
    )
    _host_group = distributed.new_group(backend=host_backend, timeout=_PATIENCE)
    _step_patience, _host_patience = timedelta(minutes=process.timeout_minutes), _PATIENCE
    try:
        yield
    except UserError as error:
        _is_first_to_fail(error)
        FAILURE.is_alone = not _show_once(error)
        raise
    except Exception as error:
        FAILURE.is_after_others = not _is_first_to_fail(error)
        raise
    finally:
        _host_group = None
        if not left_alone():
            distributed.destroy_process_group()


def _is_first_to_fail(error: Exception) -> bool:
    """Whether no rank has failed before. Asks the store of the launcher, which a failing rank does not take with it."""
    own = f"rank {distributed.get_rank()}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    FAILURE.cause = own
    try:
        store = distributed.distributed_c10d._get_default_store()
        is_first = bool(store.add("megatron_bdpo/failed", 1) == 1)
        if is_first:
            store.set("megatron_bdpo/cause", own)
        elif store.check(["megatron_bdpo/cause"]):
            FAILURE.cause = store.get("megatron_bdpo/cause").decode()
        return is_first
    except RuntimeError:  # it is gone with its rank
        return False


def is_raised(flag: str, *, here: bool) -> bool:
    """Whether any rank has raised a flag, kept by the launcher's store; ``here`` raises it. Not collective."""
    if distributed.get_world_size() == 1 or distributed.get_backend() == "fake":
        return here
    try:
        store = distributed.distributed_c10d._get_default_store()
        return bool(store.add(f"megatron_bdpo/{flag}", int(here)) > 0)
    except RuntimeError:  # it is gone with its rank
        return here


def leave_note(name: str, text: str) -> None:
    """Leave a word for rank 0, in the launcher's store. Not collective: any thread may."""
    if not distributed.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # it is gone with its rank
        store = distributed.distributed_c10d._get_default_store()
        store.set(f"megatron_bdpo/{name}/{distributed.get_rank()}", text)


def other_notes(name: str, *, patience: timedelta = timedelta(0)) -> list[str] | None:
    """What the other ranks have left; None where one of them has not yet. Not collective.

    Args:
        patience: how long to wait for them.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return []
    own = distributed.get_rank()
    keys = [f"megatron_bdpo/{name}/{rank}" for rank in range(distributed.get_world_size()) if rank != own]
    try:
        store = distributed.distributed_c10d._get_default_store()
        if patience:
            store.wait(keys, patience)
        return [store.get(key).decode() for key in keys] if store.check(keys) else None
    except RuntimeError:  # they are late, or it is gone with its rank
        return None


def _show_once(error: UserError) -> bool:
    """Print an error that all ranks raise from rank 0, and one that this rank raises alone from here.

    The ranks leave together: a launcher stops all of them when the first one ends, perhaps before rank 0 has printed.

    Returns:
        Whether all of them have raised it.
    """
    error.shown = True
    if distributed.get_rank() == 0:
        show_error(error)
    together = _all_come()
    if not together and distributed.get_rank() != 0:
        show_error(error, f" (rank {distributed.get_rank()})")
    return together


def _all_come() -> bool:
    """Whether all ranks come here within _LEAVE_TOGETHER.

    Asked of the launcher's store: in a barrier of gloo's, other ranks than the first wait as long as the group does.
    """
    size, is_first = distributed.get_world_size(), distributed.get_rank() == 0
    if distributed.get_backend() == "fake":
        return True
    try:
        store = distributed.distributed_c10d._get_default_store()
        if not _reaches(store, "megatron_bdpo/leaving", size):
            return False
        # The first rank may hold the store: it goes last.
        if is_first:
            _reaches(store, "megatron_bdpo/left", size)
        else:
            store.add("megatron_bdpo/left", 1)
    except RuntimeError:  # the store is gone, with the first rank
        return False
    return True


def _reaches(store: Any, key: str, count: int) -> bool:
    """Add one to a counter, and wait for the others to do the same."""
    deadline = time.monotonic() + _LEAVE_TOGETHER.total_seconds()
    found = store.add(key, 1)
    while found < count and time.monotonic() < deadline:
        time.sleep(0.02)
        found = store.add(key, 0)
    return bool(found >= count)


def show_error(error: UserError, where: str = "") -> None:
    """Print an error for the user."""
    print(error.as_text(where), file=sys.stderr, flush=True)


def host_group() -> Any:
    """A group of all ranks for host-side values.

    It waits for hours of preparation, reading and writing, and where ranks go step by step as long as Megatron's own
    groups (``--distributed-timeout-minutes``). All ranks are in the same phase when they ask.
    """
    global _host_patience
    assert _host_group is not None, "process_groups() is not entered"
    patience = _step_patience if clock().now[0] in IN_STEP else _PATIENCE
    if patience != _host_patience and distributed.get_backend(_host_group) == "gloo":
        _host_group._get_backend(torch.device("cpu"))._set_default_timeout(patience)
        _host_patience = patience
    return _host_group


@contextlib.contextmanager
def all_ranks_agree() -> Iterator[None]:
    """Run the block on every rank; if it raises UserError on any of them, raise the first one on all.

    Collective. Without it a rank that finds bad input would leave the others waiting in their next collective.
    """
    problem: tuple[str, bool] | None = None
    try:
        yield
    except UserError as error:
        problem = str(error), error.is_final
    for found in gather(problem):
        if found is not None:
            message, is_final = found
            raise UserError(message) if is_final else PassingError(message)


def broadcast[T](value: T | None) -> T:
    """Rank 0's value, on every rank. Collective."""
    box = [value]
    with waiting():
        distributed.broadcast_object_list(box, src=0, group=host_group())
    result: T = box[0]  # type: ignore[assignment]
    return result


def broadcast_arrays(arrays: Mapping[str, npt.NDArray[Any]] | None) -> dict[str, npt.NDArray[Any]]:
    """Rank 0's arrays by name, on every rank; unlike :func:`broadcast` without a pickled copy. Collective."""
    shapes = broadcast(None if arrays is None else {name: (each.shape, each.dtype) for name, each in arrays.items()})
    result = {name: np.empty(*shape) for name, shape in shapes.items()} if arrays is None else dict(arrays)
    for name in shapes:
        with waiting():
            distributed.broadcast(torch.from_numpy(result[name]), src=0, group=host_group())
    return result


def gather[T](value: T) -> list[T]:
    """Every rank's value, on every rank. Collective."""
    values: list[Any] = [None] * distributed.get_world_size()
    with waiting():
        distributed.all_gather_object(values, value, group=host_group())
    return values


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over all ranks, on the host. Collective."""
    with waiting():
        distributed.all_reduce(values, group=host_group())
    return values


def is_rank_zero() -> bool:
    """Whether this is global rank 0; before the process groups exist, by the launcher's environment."""
    if distributed.is_initialized():
        return distributed.get_rank() == 0
    return is_first_of_launcher()


def is_last_rank() -> bool:
    """Whether this is the last global rank: it is of the last pipeline stage, which has the metrics."""
    return bool(distributed.get_rank() == distributed.get_world_size() - 1)


def say(*blocks: Block) -> None:
    """Print once, from rank 0."""
    if is_rank_zero():
        show(*blocks)
