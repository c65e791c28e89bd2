"""``--deterministic-mode``: Megatron's, made to hold from the first collective on.

Megatron checks its flags, sets NCCL_ALGO, CUBLAS_WORKSPACE_CONFIG and NVTE_ALLOW_NONDETERMINISTIC_ALGO, and calls
``torch.use_deterministic_algorithms``, all while it validates its arguments: after the process groups are made here,
and what NCCL has read by then stays. So the environment is settled before them.

What computes on a GPU then, as read in the sources of torch 2.10 to 2.14 (an H200 has run varlen and SDPA): torch's
flash attention, varlen too, asks for its deterministic backward in this mode (``_flash_attention_backward``), and
cuDNN's attention, which has none, is not taken: from 2.14 on ``varlen_attn`` prefers it, but not for a causal window,
which is what pairs have, and SDPA leaves it out in this mode. Transformer Engine's attention follows the environment.
Gathered keys, scored positions and sums use ``index_select`` and ``index_put``, which torch makes deterministic; the
log-probs' kernels are.
"""

from __future__ import annotations

import os

import torch
from megatron.training.determinism import apply_determinism_env

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.settings import Settings


def settle_environment(settings: Settings) -> None:
    """Before the process groups: what libraries read once, as ``--deterministic-mode`` needs it.

    Raises:
        UserError: the environment has a value that is not deterministic.
    """
    if not settings.schedule.deterministic_mode:
        return
    try:
        apply_determinism_env(os.environ)
    except AssertionError as error:
        raise UserError(
            f"--deterministic-mode: the environment contradicts it ({error}). Unset the variable, or leave the flag "
            "out."
        ) from error


def forget_determinism() -> None:
    """After a run: the next one in this process asks for it by itself."""
    torch.use_deterministic_algorithms(False)
