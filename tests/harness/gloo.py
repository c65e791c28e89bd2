"""One thread of gloo's for a rank, where torch starts one for every group."""

from __future__ import annotations

import functools
import os
from typing import Any


def share_device() -> None:
    """All process groups of this process, and of those forked from it, use one device of gloo's each.

    A device has a thread that looks for events a hundred times a second; a job has 25 to 40 groups. With eight ranks
    their threads alone keep most of a core busy, and those of groups that a failed job leaves behind go on.
    """
    from torch.distributed import distributed_c10d

    original: Any = distributed_c10d.ProcessGroupGloo

    @functools.cache
    def device(process: int) -> Any:
        return original.create_default_device()

    class OnSharedDevice(original):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            options = original._Options()
            options._devices, options._timeout, options._threads = [device(os.getpid())], timeout, 2  # 2 as in torch
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = OnSharedDevice
