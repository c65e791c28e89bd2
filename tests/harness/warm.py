"""What every rank imports, for the process that ranks are forked from: to import this module is to prepare it."""

from __future__ import annotations

import gc
import os


def _prepare() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported, and a fork leaves threads behind
    import torch

    torch.set_num_threads(1)
    from megatron_bdpo.platform.boot import prepare_platform

    prepare_platform()
    import megatron.core.tokenizers.text  # and with it transformers
    import megatron.training  # noqa: F401

    import megatron_bdpo.training.run  # noqa: F401
    from tests.harness.flags import remember_descriptions_of_flags
    from tests.harness.gloo import share_device

    remember_descriptions_of_flags()
    share_device()
    gc.freeze()  # imported for good: ranks share this memory, and look for no garbage in it


_prepare()
