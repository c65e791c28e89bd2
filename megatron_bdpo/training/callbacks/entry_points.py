"""Callbacks that other packages offer, through the entry-point group ``megatron_bdpo.callbacks``."""

from __future__ import annotations

import socket
from importlib.metadata import EntryPoint, entry_points

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.callbacks.callback import Callback
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.settings import Settings

#: Each of this group is called with the job's ``Settings`` and ``PairJob``, and returns a ``Callback``.
GROUP = "megatron_bdpo.callbacks"


def callbacks_of_packages(settings: Settings, job: PairJob) -> list[Callback]:
    """All that are installed, by name: in one order on all ranks, since they may communicate. Collective.

    Raises:
        UserError: on every rank; a node has other ones than the first, or one cannot be made.
    """
    points = offered()
    names = [f"{point.name} ({point.value})" for point in points]
    first = broadcast(names)
    with all_ranks_agree():
        if names != first:
            raise UserError(
                f"{socket.gethostname()} has other callbacks than the first node: {', '.join(names) or 'none'} here, "
                f"{', '.join(first) or 'none'} there. Install the same packages on all nodes."
            )
        return [make(point, settings, job) for point in points]


def offered() -> list[EntryPoint]:
    """What is installed, by name."""
    return sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))


def make(point: EntryPoint, settings: Settings, job: PairJob) -> Callback:
    """The callback that a package offers.

    Raises:
        UserError: it cannot be made; the message names its distribution.
    """
    try:
        callback = point.load()(settings, job)
        if not isinstance(callback, Callback):
            raise TypeError(f"it returns a {type(callback).__name__}, which is no Callback")
    except Exception as error:  # third-party code may raise anything
        provider = f"distribution '{point.dist.name}'" if point.dist else "an unnamed distribution"
        raise UserError(
            f"{provider} offers the callback '{point.name}' ({point.value}), but it cannot be used: "
            f"{type(error).__name__}: {error}. Repair or uninstall it."
        ) from error
    return callback
