"""The interface by which this node reaches another: ``interface.py PEER``, for gloo.

By itself gloo takes the address that the node's own name has, which on many clusters is the loopback's or that of
another network. An interface that the site has set is kept, if the node has it. What NCCL is told names beginnings of
interfaces, "=" whole ones, "^" those to leave out.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys

SIOCGIFADDR = 0x8915


def main(peer: str) -> None:
    here = [name for _, name in socket.if_nameindex()]
    gloo, nccl = os.environ.get("GLOO_SOCKET_IFNAME", ""), os.environ.get("NCCL_SOCKET_IFNAME", "")
    missing = [f"GLOO_SOCKET_IFNAME={name}" for name in filter(None, gloo.split(",")) if name not in here]
    names, whole = nccl.lstrip("=").split(","), nccl.startswith("=")
    found = any(name == each or (not whole and each.startswith(name)) for name in names for each in here)
    if nccl and not nccl.startswith("^") and not found:
        missing.append(f"NCCL_SOCKET_IFNAME={nccl}")
    if missing:
        there = " ".join(here)
        sys.exit(
            f"{', '.join(missing)}: no such interface; there are {there}. Set one that all nodes have, in slurm/site.sh"
        )
    try:
        print(gloo or leads_to(peer, here))
    except OSError as error:
        sys.exit(
            f"there is no way to {peer} ({error}). Set GLOO_SOCKET_IFNAME in slurm/site.sh to the interface that gloo "
            "is to use"
        )


def leads_to(peer: str, here: list[str]) -> str:
    """The interface whose address a packet to the peer would have; empty where none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:  # sends nothing: the kernel chooses the way there
        asking.connect((peer, 9))
        own = asking.getsockname()[0]
        for name in here:
            try:
                answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return ""


if __name__ == "__main__":
    main(sys.argv[1])
