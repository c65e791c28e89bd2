"""All-reduces between neighbours: which nodes exchange data, and how fast.

    links.py DIRECTORY NUMBER NODE...

is run once on every node of a job, with the node's number among them. The nodes are a ring; each pair of neighbours
all-reduces a tensor between all their ranks, NCCL's on GPUs and gloo's on CPUs. So a node that is broken fails with
both neighbours, and these only with it. What a node has seen is left in DIRECTORY, in a file of its name: for each
neighbour a line with its name and GB/s, or ``failed`` and why. A single node is tried by itself.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path

import torch
import torch.distributed as dist

type Edge = tuple[int, int]


def rounds(nodes: int) -> list[list[Edge]]:
    """The ring's pairs, those of a round without a node in common."""
    if nodes <= 2:
        return [[(0, nodes - 1)]]
    edges = [(node, (node + 1) % nodes) for node in range(nodes)]
    if nodes % 2:
        return [edges[0:-1:2], edges[1::2], edges[-1:]]
    return [edges[0::2], edges[1::2]]


def exchange(
    answer: connection.Connection, host: str, port: int, rank: int, world: int, local: int, seconds: float
) -> None:
    """One rank of a pair, in a process of its own. Sends GB/s, or what went wrong."""
    gpu = os.environ.get("BDPO_DEVICE", "gpu") == "gpu"
    size, times = (2**26, 5) if gpu else (2**20, 3)
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    limit = timedelta(seconds=seconds)
    try:
        if gpu:
            torch.cuda.set_device(device)
        store = dist.TCPStore(host, port, world, rank == 0, timeout=limit)
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world, timeout=limit)
        tensor = torch.ones(size, device=device)
        dist.all_reduce(tensor)  # connections are made
        if (mean := tensor.mean().item()) != world:
            raise RuntimeError(f"the sum is {mean}, not {world}")
        began = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(tensor)
        tensor.sum().item()  # until the device is done
        answer.send(times * tensor.nbytes / (time.perf_counter() - began) / 1e9)
        dist.barrier()  # the store lives as long as its rank
    except Exception as error:  # whatever it is, the node is told of by it
        answer.send(" ".join(str(error).split())[:200] or type(error).__name__)


def try_edge(edge: Edge, own: int, nodes: list[str], port: int, seconds: float) -> float | str:
    """This node's part. Returns GB/s of its slowest rank, or why there are none."""
    ranks = int(os.environ.get("BDPO_RANKS_PER_NODE", "1")) if os.environ.get("BDPO_DEVICE", "gpu") == "gpu" else 1
    first, world = (0 if own == edge[0] else ranks), ranks * len(set(edge))
    context, parts = get_context("fork"), []
    for local in range(ranks):
        here, there = context.Pipe(duplex=False)
        arguments = (there, nodes[edge[0]], port, first + local, world, local, seconds)
        process = context.Process(target=exchange, args=arguments, daemon=True)
        process.start()
        there.close()
        parts.append((process, here))
    end, found = time.monotonic() + seconds + 5, []
    for _, here in parts:
        try:
            found.append(here.recv() if here.poll(max(0.0, end - time.monotonic())) else f"no answer in {seconds:g} s")
        except EOFError:
            found.append("its process was killed")
    for process, _ in parts:
        process.join(max(0.1, end - time.monotonic()) if all(isinstance(each, float) for each in found) else 0.1)
        process.kill()
    wrong = [each for each in found if isinstance(each, str)]
    return wrong[0] if wrong else min(found)


def main(directory: str, number: str, *nodes: str) -> None:
    own, port, seconds = int(number), int(os.environ["BDPO_PORT"]), float(os.environ["BDPO_LINKS_SECONDS"])
    file = Path(directory) / nodes[own]
    for turn, edges in enumerate(rounds(len(nodes))):
        for edge in edges:
            if own in edge:
                # Others may have waited for a broken neighbour in each turn before.
                result = try_edge(edge, own, list(nodes), port + turn, seconds * (turn + 1))
                other = nodes[edge[0] if own == edge[1] else edge[1]]
                line = f"{other} {result:.6f}" if isinstance(result, float) else f"{other} failed {result}"
                print(line, flush=True)
                with file.open("a") as told:
                    told.write(f"{line}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
