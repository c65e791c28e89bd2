"""Where the ranks of a pool meet: a store that outlives their jobs, as torchrun's does."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl, urlparse


def serve_store() -> Any:
    """Start a store at a free port of this process."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet_in(port: int) -> None:
    """From now on the process groups of this rank meet in the store at ``port``, each in a part of its own.

    By itself torch has rank 0 serve a store for as long as it has the group. Another rank's next group could find that
    of the last one, which ends while they talk.
    """
    from torch.distributed import PrefixStore, TCPStore
    from torch.distributed.rendezvous import _rendezvous_handlers

    groups = itertools.count()

    def handler(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Any, int, int]]:
        given = dict(parse_qsl(urlparse(url).query))  # the arguments of init_process_group
        rank, ranks = (int(given.get(name) or os.environ[name.upper()]) for name in ("rank", "world_size"))
        yield PrefixStore(f"group{next(groups)}", TCPStore("127.0.0.1", port, timeout=timeout)), rank, ranks

    _rendezvous_handlers["env"] = handler
