"""The first thing a process does, before it imports Megatron."""

from __future__ import annotations

import os

import torch

from megatron_bdpo.platform import cpu, versions


def prepare_platform() -> None:
    """Check the installation and, where there is no GPU, emulate one on the CPU. Idempotent.

    Raises:
        UserError: if the installed packages cannot work.
    """
    has_gpu = torch.cuda.is_available()
    versions.check_environment(has_gpu=has_gpu)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asserts it with tensor parallelism
    if not has_gpu and not cpu.is_active():
        if int(os.environ.get("RANK", "0")) == 0:
            print("no GPU found: running Megatron on the CPU with gloo (for trials and tests)", flush=True)
        cpu.emulate_cuda_on_cpu()
