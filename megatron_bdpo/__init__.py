"""Balanced DPO and its sister losses on NVIDIA Megatron.

What is named here is for a Megatron script of your own (``examples/own_script.py``); docs/api.md has what is of use
without Megatron. Reading a name prepares the platform, so this import stands before Megatron's.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_bdpo.training.callbacks.callback import Callback, Record, Start, StepResult
    from megatron_bdpo.training.distributed import process_groups
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.pack_iterators import dataset_provider
    from megatron_bdpo.training.run import PreferenceRun, in_megatron
    from megatron_bdpo.training.settings import Settings

__version__ = "0.1.0.dev0"

_HOMES = {
    "Arguments": "training.flags.arguments",
    "Callback": "training.callbacks.callback",
    "PreferenceRun": "training.run",
    "Record": "training.callbacks.callback",
    "Settings": "training.settings",
    "Start": "training.callbacks.callback",
    "StepResult": "training.callbacks.callback",
    "dataset_provider": "training.pack_iterators",
    "in_megatron": "training.run",
    "process_groups": "training.distributed",
}
__all__ = [
    "Arguments",
    "Callback",
    "PreferenceRun",
    "Record",
    "Settings",
    "Start",
    "StepResult",
    "dataset_provider",
    "in_megatron",
    "process_groups",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(f"{__name__}.platform.boot").prepare_platform()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
