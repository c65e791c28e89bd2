"""The versions this package is written for, and installations known to break.

Everything here runs before Megatron is imported: several of these faults are crashes at its import.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform

from packaging.version import Version

from megatron_bdpo.errors import UserError

MEGATRON_MINIMUM = Version("0.19.2")
MEGATRON_BELOW = Version("0.20")


def megatron_version() -> Version:
    """Version of the installed megatron-core; ``UserError`` when there is none."""
    try:
        return Version(importlib.metadata.version("megatron-core"))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"megatron-core is not installed. Install it with: pip install 'megatron-core>={MEGATRON_MINIMUM},"
            f"<{MEGATRON_BELOW}' (its wheels need Python >= 3.12)."
        ) from error


def check_environment(*, has_gpu: bool) -> None:
    """Refuse an environment in which Megatron crashes or our seams do not fit.

    Args:
        has_gpu: whether CUDA is usable here.

    Raises:
        UserError: with the offending package and what to do about it.
    """
    found = megatron_version()
    if not MEGATRON_MINIMUM <= found < MEGATRON_BELOW:
        raise UserError(
            f"megatron-core {found} is installed, but megatron_bdpo is written for >={MEGATRON_MINIMUM},"
            f"<{MEGATRON_BELOW}: it replaces functions of megatron.training by name. "
            f"Install: pip install 'megatron-core>={MEGATRON_MINIMUM},<{MEGATRON_BELOW}'."
        )
    has_te = importlib.util.find_spec("transformer_engine") is not None
    if has_te and not has_gpu:
        raise UserError(
            "transformer-engine is installed but no GPU is usable here: megatron.core crashes when it imports it "
            "without the CUDA libraries. Use an environment without transformer-engine on CPU, or make the GPU "
            "visible (check nvidia-smi and CUDA_VISIBLE_DEVICES)."
        )
    if importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is None:
        raise UserError(
            "A package named 'apex' is installed that is not NVIDIA Apex (PyPI's apex is unrelated) and Megatron "
            "would take it for NVIDIA's. Remove it: pip uninstall apex. NVIDIA Apex is optional and installed from "
            "source, see the README."
        )


#: What decides a run's numbers. Not all of it is there everywhere.
DECISIVE = ("megatron_bdpo", "megatron-core", "torch", "transformer-engine", "transformers", "datasets")


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in DECISIVE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
