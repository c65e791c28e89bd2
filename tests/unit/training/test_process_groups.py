"""How the ranks' communicators are asked for: what only NCCL would show is read off the call."""

from __future__ import annotations

from typing import Any

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
