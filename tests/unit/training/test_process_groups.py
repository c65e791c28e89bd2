"""How the ranks' communicators are asked for: what only NCCL would show is read off the call."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_bdpo.training import distributed
from megatron_bdpo.training.megatron_settings import ProcessSettings


class Asked(Exception):
    """torch has been asked for the process group."""


def test_nccl_groups_are_not_split_off_one_communicator(monkeypatch):
    """``_new_process_group_helper`` of torch 2.13.0 splits each new group off a default group that has a
    ``bound_device_id``, which is the ``device_id`` that it was started with."""
    asked: dict[str, Any] = {}
    devices: list[int] = []

    def start(**keywords: Any) -> None:
        asked.update(keywords)
        raise Asked

    monkeypatch.setattr(torch.distributed, "init_process_group", start)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    process = ProcessSettings(rank=3, local_rank=3, ranks=8, backend="nccl", timeout_minutes=10, is_made_up=False)
    with pytest.raises(Asked), distributed.process_groups(process):
        pass
    assert asked["backend"] == "nccl" and asked["rank"] == 3
    assert "device_id" not in asked
    assert devices == [3], "collectives without a device take the current one"


def test_arrays_are_broadcast_as_they_are(ranks):
    """Types, shapes and NaN; what other ranks get is theirs to change."""
    for shown in ranks(2)(_broadcast_on_a_rank):
        assert shown == [
            ("a", "float64", [[1.5, 2.0], [7.0, 3.0]], True),
            ("b", "int8", [-1, 2], True),
        ]


def _broadcast_on_a_rank() -> list[tuple[str, str, list[Any], bool]]:
    from megatron_bdpo.training.flags.arguments import Arguments

    arguments = Arguments.parse(["--recipe", str(Path(__file__).parents[3] / "recipes" / "tiny.yaml")])
    with distributed.process_groups(arguments.settings.process):
        arrays = {"a": np.array([[1.5, 2.0], [np.nan, 3.0]]), "b": np.array([-1, 2], np.int8)}
        found = distributed.broadcast_arrays(arrays if distributed.is_rank_zero() else None)
    return [(name, str(a.dtype), np.nan_to_num(a, nan=7).tolist(), a.flags.writeable) for name, a in found.items()]


def test_the_host_waits_long_for_work_and_briefly_for_steps(ranks):
    """One rank may tokenize for hours; in a step nobody works alone."""
    for longs, brief in ranks(2)(_patience_of_a_rank):
        assert longs == [2 * 24 * 3600] * 2
        assert brief == 60


def _patience_of_a_rank() -> tuple[list[float], float]:
    from megatron_bdpo.training.phases import phase
    from tests.harness.jobs import own_process

    def patience() -> float:
        backend = distributed.host_group()._get_backend(torch.device("cpu"))
        return float(backend.options._timeout.total_seconds())

    with distributed.process_groups(own_process()):
        before = patience()
        with phase("step"):
            brief = patience()
        return [before, patience()], brief


def test_a_pools_jobs_do_not_meet_in_the_store_of_the_one_before(ranks):
    """A failed job's store lives on in its traceback; another rank's next job met in it and lost it."""
    first, second = ranks(2)(_groups_one_after_another, 3)
    assert [sorted(counts) for counts in zip(first, second, strict=True)] == [[1, 2]] * 3


def _groups_one_after_another(jobs: int) -> list[int]:
    counts, kept = [], None
    for _ in range(jobs):
        torch.distributed.init_process_group("gloo")
        kept = torch.distributed.distributed_c10d._get_default_store()
        counts.append(kept.add("count", 1))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        if os.environ["RANK"] == "0":
            time.sleep(0.3)  # the others are at their next group, and this one still has its store
    return counts
