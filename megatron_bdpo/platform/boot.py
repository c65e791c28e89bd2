"""The first thing a process does, before it imports Megatron."""

from __future__ import annotations

import functools
import logging
import os
import warnings

import torch

from megatron_bdpo.platform import cpu, installation, safe_pickles


def prepare_platform() -> None:
    """Check the installation and, where there is no GPU, emulate one on the CPU. Idempotent.

    Raises:
        UserError: if the installed packages cannot work.
    """
    has_gpu = torch.cuda.is_available()
    _leave_out_known_warnings(has_gpu)
    installation.check_environment()
    safe_pickles.restrict_pickles()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asserts it with tensor parallelism
    if not has_gpu and not cpu.is_active():
        if int(os.environ.get("RANK", "0")) == 0:
            print("no GPU found: running Megatron on the CPU with gloo (for trials and tests)", flush=True)
        cpu.emulate_cuda_on_cpu()


@functools.cache  # once: each filter makes Python forget which warnings it has shown
def _leave_out_known_warnings(has_gpu: bool) -> None:
    """What Megatron and torch say at each import and each collective, of what we know and have dealt with."""
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer-engine).*", category=UserWarning)
    warnings.filterwarnings("ignore", message=".*is experimental and still under active development.*")
    warnings.filterwarnings("ignore", message="absl.logging is not installed.*")
    warnings.filterwarnings("ignore", message="`torch.distributed.*", category=FutureWarning)
    if not has_gpu:
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is none: we say so
