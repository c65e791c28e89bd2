"""All versions that decide what a run does, and the machine they are on."""

from __future__ import annotations

import torch

import megatron_bdpo
from megatron_bdpo.display import Table
from megatron_bdpo.platform.versions import DECISIVE, installed_versions, source_commit


def versions() -> Table:
    """A row per package, also for those that are not installed."""
    found = installed_versions() | {"megatron_bdpo": megatron_bdpo.__version__}
    rows = {name: found.get(name, "not installed") for name in ("megatron_bdpo", "python", *DECISIVE)}
    rows["commit"] = source_commit() or "not known"
    rows["CUDA"] = torch.version.cuda or "torch is built without"
    rows["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    return Table(["", ""], list(rows.items()), left=(0, 1), whole=(0, 1))
