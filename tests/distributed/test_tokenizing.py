"""Tokenizing as a job: nodes share the work, all of them hear of a stop, and the training run finds the tokens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_bdpo.data.store import PairStore
from tests.harness.jobs import DATA
from tests.harness.rendezvous import free_port

ROWS = 800
PATIENCE = 300.0

#: Small shards, and a mark in a file for each record of a process; ``SLOW`` seconds for each.
SMALL_SHARDS = """
import os, time
from megatron_bdpo.platform.boot import prepare_platform
prepare_platform()
from megatron_bdpo.data import tokenizing
tokenizing.CHUNK_ROWS, tokenizing.CHUNKS = 20, 3
encode = tokenizing.PairTokenizer.encode
def counted(self, record, known=None):
    time.sleep(float(os.environ["SLOW"]))
    with open(f"{os.environ['MARKS']}.{os.environ['RANK']}", "a") as marks:
        marks.write(f"{str(record.prompt).split()[0]}\\n")
    return encode(self, record, known)
tokenizing.PairTokenizer.encode = counted
from megatron_bdpo.training.entry import tokenize_main
tokenize_main()
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i} please tell", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Nodes:
    """Two nodes of one rank each."""

    def __init__(self, data: Path, slow: float) -> None:
        self.directory = data.parent
        flags = ["--pair-data", data, "--pair-cache-dir", self.directory / "cache", "--tokenizer-workers", "2"]
        flags += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", DATA / "tokenizer.model"]
        environment = os.environ | {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(free_port()), "SLOW": str(slow), "MARKS": str(self.directory / "marks")}
        environment |= {"BDPO_STATUS_FILE": str(self.directory / "status.json")}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", SMALL_SHARDS, *map(str, flags)],
                env=environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]

    def end(self) -> list[str]:
        told = [process.communicate(timeout=PATIENCE)[0] for process in self.processes]
        assert [process.returncode for process in self.processes] == [0, 0], told
        return told

    def shards(self) -> int:
        return len(list(self.directory.glob("cache/*.shards/*.safetensors")))

    def marks(self) -> list[set[int]]:
        """Records that each node has encoded since this was last asked."""
        files = [Path(f"{self.directory}/marks.{rank}") for rank in range(2)]
        found = [set(map(int, file.read_text().split())) if file.exists() else set() for file in files]
        for file in files:
            file.unlink(missing_ok=True)
        return found

    def status(self) -> dict[str, object]:
        return json.loads((self.directory / "status.json").read_text())


def store(directory: Path) -> PairStore:
    (meta,) = directory.glob("cache/*/meta.json")
    return PairStore.open(meta.parent)


def test_nodes_share_the_work(data):
    nodes = Nodes(data, slow=0)
    nodes.end()
    first, second = nodes.marks()
    assert second == {row for row in range(ROWS) if row // 60 % 2}  # shards of 60 rows in turn
    assert first == set(range(ROWS)) - second
    assert store(data.parent).row.tolist() == list(range(1, ROWS + 1))
    assert nodes.status()["state"] == "finished" and nodes.shards() == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_on_any_node_stops_all_and_loses_a_shard_at_most(data, rank):
    nodes = Nodes(data, slow=0.02)
    deadline = time.monotonic() + PATIENCE
    while nodes.shards() < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    nodes.processes[rank].send_signal(signal.SIGTERM)
    asked = time.monotonic()
    told = nodes.end()
    assert time.monotonic() - asked < 20
    assert "stopped (SIGTERM received); the same command goes on." in told[0]
    assert nodes.status() | {"time": ""} == {
        "state": "stopped", "phase": "tokenizing", "step": 0, "of": 0, "reason": "SIGTERM received", "time": ""
    }  # fmt: skip
    kept = nodes.shards()
    assert kept >= 4
    nodes.marks()

    again = Nodes(data, slow=0)
    again.end()
    first, second = again.marks()
    assert len(first | second) <= ROWS - 60 * kept
    assert store(data.parent).row.tolist() == list(range(1, ROWS + 1))
