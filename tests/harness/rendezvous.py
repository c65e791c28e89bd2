"""Where ranks meet: those of a pool in a store that outlives their jobs, as torchrun's does; others at a port."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
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

    What is forked from the rank, with a ``MASTER_PORT`` of its own, meets there.

    By itself torch has rank 0 serve a store for as long as it has the group. Another rank's next group could find that
    of the last one, which ends while they talk.
    """
    from torch.distributed import PrefixStore, TCPStore
    from torch.distributed.rendezvous import _env_rendezvous_handler, _rendezvous_handlers

    groups = itertools.count()

    def handler(url: str, timeout: timedelta, **more: Any) -> Iterator[tuple[Any, int, int]]:
        if os.environ["MASTER_PORT"] != str(port):
            yield from _env_rendezvous_handler(url, timeout=timeout, **more)
            return
        given = dict(parse_qsl(urlparse(url).query))  # the arguments of init_process_group
        rank, ranks = (int(given.get(name) or os.environ[name.upper()]) for name in ("rank", "world_size"))
        yield PrefixStore(f"group{next(groups)}", TCPStore("127.0.0.1", port, timeout=timeout)), rank, ranks

    _rendezvous_handlers["env"] = handler


def free_port() -> int:
    """A port that nobody listens at. Below those that Linux gives to whoever asks for any, so it is free later, too."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
