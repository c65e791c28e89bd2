"""Installations known to break, and what computes beneath torch.

Everything here runs before Megatron is imported: several of these faults are crashes at its import.
"""

from __future__ import annotations

import importlib.util

import torch
from packaging.version import Version

from megatron_bdpo.errors import UserError
from megatron_bdpo.platform.versions import MEGATRON_BELOW, MEGATRON_MINIMUM, TORCH_MINIMUM, megatron_version


def check_environment() -> None:
    """Refuse an environment in which Megatron crashes or our seams do not fit.

    Raises:
        UserError: with the offending package and what to do about it.
    """
    if Version(torch.__version__) < TORCH_MINIMUM:
        least = TORCH_MINIMUM.base_version
        raise UserError(
            f"torch {torch.__version__} is installed, but megatron_bdpo needs {least} or newer: torch.mm returns fp32 "
            f"products of half-precision matrices since then. Install: pip install 'torch>={least}'."
        )
    found = megatron_version()
    if not MEGATRON_MINIMUM <= found < MEGATRON_BELOW:
        raise UserError(
            f"megatron-core {found} is installed, but megatron_bdpo is written for >={MEGATRON_MINIMUM},"
            f"<{MEGATRON_BELOW}: it replaces functions of megatron.training by name. "
            f"Install: pip install 'megatron-core>={MEGATRON_MINIMUM},<{MEGATRON_BELOW}'."
        )
    if importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is None:
        raise UserError(
            "A package named 'apex' is installed that is not NVIDIA Apex (PyPI's apex is unrelated) and Megatron "
            "would take it for NVIDIA's. Remove it: pip uninstall apex. NVIDIA Apex is optional and installed from "
            "source, see the README."
        )


def libraries() -> dict[str, str]:
    """Versions of what computes beneath torch, and on which GPUs; without a usable GPU, that there is none."""
    if not torch.cuda.is_available():
        return {"GPU": "none"}
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = {
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        "GPU": ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)),
    }
    return {name: str(value) for name, value in found.items() if value}
