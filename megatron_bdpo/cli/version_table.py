"""All versions that decide what a run does, and the machine they are on; torch is read, not imported."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import megatron_bdpo
from megatron_bdpo.display import Table
from megatron_bdpo.platform.versions import DECISIVE, installed_versions, source_commit


def versions() -> Table:
    """A row per package, also for those that are not installed."""
    found = installed_versions() | {"megatron_bdpo": megatron_bdpo.__version__}
    rows = {name: found.get(name, "not installed") for name in ("megatron_bdpo", "python", *DECISIVE)}
    rows["commit"] = source_commit() or "not known"
    rows["CUDA"] = _cuda_of_torch() or "torch is built without"
    rows["GPU"] = ", ".join(_gpus()) or "none"
    return Table(["", ""], list(rows.items()), left=(0, 1), whole=(0, 1))


def _cuda_of_torch() -> str:
    """The CUDA release that the installed torch is built for; empty where it is none."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return ""
    version = Path(found.origin).with_name("version.py")
    told = re.search(r"^cuda\b[^=]*= '([^']+)'", version.read_text("utf-8"), re.MULTILINE) if version.exists() else None
    return told[1] if told else ""


def _gpus() -> list[str]:
    """What NVIDIA's driver shows."""
    models = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        told = re.search(r"^Model:\s*(.+)$", file.read_text("utf-8"), re.MULTILINE)
        models.append(told[1].strip() if told else "unknown")
    return models
