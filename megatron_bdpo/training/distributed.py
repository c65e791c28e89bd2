"""Starting the ranks, and failing together: an error on one rank ends all of them, with one message."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from megatron_bdpo.data.context import ContextRank
from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reporting.console import show

#: One rank may tokenise or score for hours while the others wait for it.
_PATIENCE = timedelta(days=2)

_LEAVE_TOGETHER = timedelta(seconds=10)

_host_group: Any = None


@contextlib.contextmanager
def process_groups(args: argparse.Namespace) -> Iterator[None]:
    """Start ``torch.distributed`` before Megatron does (it then keeps ours), so that data preparation can use it.

    With ``--fake-process-group`` this process plays rank 0 of the others: collectives answer with its own values.
    """
    global _host_group
    backend, host_backend = args.distributed_backend, "gloo"
    kwargs: dict[str, Any] = {}
    if args.fake_process_group:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        backend = host_backend = "fake"
        kwargs["store"] = FakeStore()
    elif backend == "nccl":
        torch.cuda.set_device(args.local_rank)
        kwargs["device_id"] = torch.device("cuda", args.local_rank)
    if args.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    distributed.init_process_group(
        backend=backend,
        world_size=args.world_size,
        rank=args.rank,
        timeout=timedelta(minutes=args.distributed_timeout_minutes),
        **kwargs,
    )
    _host_group = distributed.new_group(backend=host_backend, timeout=_PATIENCE)
    try:
        yield
    except UserError as error:
        _show_once(error)
        raise
    finally:
        _host_group = None
        distributed.destroy_process_group()


def _show_once(error: UserError) -> None:
    """Print an error that all ranks raise from rank 0, and one that this rank raises alone from here.

    The ranks leave together: a launcher stops all of them when the first one ends, perhaps before rank 0 has printed.
    """
    error.shown = True
    if distributed.get_rank() == 0:
        show_error(error)
    try:
        distributed.monitored_barrier(host_group(), timeout=_LEAVE_TOGETHER)
    except (RuntimeError, ValueError):  # ValueError: these ranks are made up
        if distributed.get_rank() != 0:
            show_error(error, f" (rank {distributed.get_rank()})")


def show_error(error: UserError, where: str = "") -> None:
    """Print an error for the user."""
    print(error.as_text(where), file=sys.stderr, flush=True)


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def host_group() -> Any:
    """A group of all ranks for host-side values, patient enough to wait for hours of preparation."""
    assert _host_group is not None, "process_groups() is not entered"
    return _host_group


@contextlib.contextmanager
def all_ranks_agree() -> Iterator[None]:
    """Run the block on every rank; if it raises UserError on any of them, raise the first one on all.

    Collective. Without it a rank that finds bad input would leave the others waiting in their next collective.
    """
    problem: str | None = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(problems, problem, group=host_group())
    for found in problems:
        if found is not None:
            raise UserError(found)


def broadcast[T](value: T | None) -> T:
    """Rank 0's value, on every rank. Collective."""
    box = [value]
    distributed.broadcast_object_list(box, src=0, group=host_group())
    result: T = box[0]  # type: ignore[assignment]
    return result


def gather[T](value: T) -> list[T]:
    """Every rank's value, on every rank. Collective."""
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group=host_group())
    return values


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over all ranks, on the host. Collective."""
    distributed.all_reduce(values, group=host_group())
    return values


def is_rank_zero() -> bool:
    """Whether this is global rank 0; before the process groups exist, by the launcher's environment."""
    if distributed.is_initialized():
        return distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def context_rank() -> ContextRank:
    """This rank's place among those that share its packs. After Megatron has set up its groups."""
    from megatron.core import parallel_state

    return ContextRank(parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank())


def say(message: str) -> None:
    """Print once, from rank 0."""
    if is_rank_zero():
        show(message)
