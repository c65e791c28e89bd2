"""Nodes do not see each other's disks unless they share them: what rank 0 has found is looked for on every node.

A node is told by the first of its ranks, which torchrun numbers one after another. Everything here is collective.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, gather, is_rank_zero

#: Seconds until a node has to see what another one has just written: NFS keeps what it knows of a directory so long.
PATIENCE = 60.0


def is_first_of_node() -> bool:
    """Whether this rank speaks for its node."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def same_flags(recipe: Mapping[str, object]) -> None:
    """Refuse flags that differ between nodes: another recipe under the same name, another environment.

    Args:
        recipe: what this rank was given (see ``flags.arguments.Arguments``).

    Raises:
        UserError: on every rank, naming a node and its flags.
    """
    first = broadcast(recipe)
    with all_ranks_agree():
        if is_first_of_node() and recipe != first:
            keys = {*recipe, *first}
            differing = sorted(f"--{key}" for key in keys if recipe.get(key) != first.get(key))
            raise UserError(
                f"on {socket.gethostname()} these flags are not what they are on the first node: "
                f"{', '.join(differing)}. Give every node the same --recipe files, environment and command line."
            )


def on_every_node(flag: str, named: str, found: str, fetch: Callable[[str, str], Path] | None = None) -> str:
    """Where this node has what rank 0 has found; a node that does not see it fetches its own, if it has a name.

    Args:
        flag: which names it, for messages.
        named: what the flag names: a path, or a name on the hub.
        found: where rank 0 has it: a file or a directory.
        fetch: given a name and its revision, gets it to this node's cache.

    Raises:
        UserError: on every rank; a node does not see it and cannot fetch it, with the node's name.
    """
    found, files, is_name = broadcast((found, _files(Path(found)), not Path(named).exists()))
    own = next((place for place in (found, named) if files <= _files(Path(place))), "")
    with all_ranks_agree():
        if is_first_of_node() and not own:
            host = socket.gethostname()
            if not is_name or fetch is None:
                raise UserError(
                    f"{flag} {named}: {host} does not see it, the first node does. Put it on a file system that all "
                    "nodes share, or at the same place on each."
                )
            try:
                own = str(fetch(named, Path(found).name))
            except UserError as error:
                raise UserError(
                    f"on {host}: {error} Or let all nodes share an HF_HOME: the first node has it in {found}."
                ) from error
    return gather(own)[first_rank_of_node()]


def _files(path: Path) -> set[str]:
    """Names of the files in a directory; of a file one without a name."""
    if path.is_dir():
        return {file.name for file in path.iterdir() if file.exists()}
    return {""} if path.is_file() else set()


def first_rank_of_node() -> int:
    """The global rank of the first rank on this node."""
    return int(os.environ.get("RANK", "0")) - int(os.environ.get("LOCAL_RANK", "0"))


def shared_by_every_node(flag: str, directory: Path) -> None:
    """Refuse a directory that is not the same one on every node: rank 0 leaves a file there for them to see.

    Raises:
        UserError: on every rank, with the name of a node; also where rank 0 cannot write there.
    """
    if not any(gather(first_rank_of_node())):  # one node
        return
    mark: Path | None = None
    try:
        with all_ranks_agree():
            if is_rank_zero():
                mark = _leave_mark(flag, directory)
        name = broadcast(mark.name if mark else None)
        with all_ranks_agree():
            if is_first_of_node() and not _appears(directory / name):
                raise UserError(
                    f"{flag} {directory} is not one directory for all nodes: {socket.gethostname()} does not see what "
                    "the first node has written there. Name one on a file system that they share."
                )
    finally:
        if mark:
            mark.unlink(missing_ok=True)


def _leave_mark(flag: str, directory: Path) -> Path:
    mark = directory / f".seen-by-all-nodes.{secrets.token_hex(8)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise UserError(f"{flag} {directory} cannot be written: {error}") from error
    return mark


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
