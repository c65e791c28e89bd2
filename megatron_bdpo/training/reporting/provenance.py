"""What a run's numbers depend on, besides its flags: for ``run.json``, so that the run can be made again.

seed           of everything that is drawn: held-out pairs, their order, initial weights
data           fingerprint of each token store, by use: of rows, tokenizer, template and limits
pair_stores    directory of each of them
reference      digest of the reference's weights, and the arithmetic that they are used with; empty without a reference
layout         ranks, and what they are split by
determinism    switches of torch and of the environment that allow or forbid kernels whose results vary
versions       of packages and of the libraries beneath them; the commit where it is known
machine        of the rank that writes this
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from typing import Any

import torch

from megatron_bdpo.platform.installation import libraries
from megatron_bdpo.platform.versions import installed_versions
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.identity import RunIdentity
from megatron_bdpo.training.job import PairJob

_LAYOUT = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size", "data_parallel_size",
    "sequence_parallel", "use_distributed_optimizer",
)  # fmt: skip

_ENVIRONMENT = (
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_ALGO", "NCCL_PROTO",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "OMP_NUM_THREADS", "TORCH_ALLOW_TF32",
)  # fmt: skip


def provenance(arguments: Arguments, job: PairJob, identity: RunIdentity) -> dict[str, Any]:
    """The entries of the record, by the names above."""
    settings, told = arguments.settings, vars(arguments.megatron)
    return {
        "seed": settings.schedule.seed,
        "data": _by_use(store.fingerprint for store in job.pool.stores),
        "pair_stores": _by_use(str(store.directory.resolve()) for store in job.pool.stores),
        "reference": identity.reference,
        "layout": {"ranks": settings.layout.ranks, **{name: told[name] for name in _LAYOUT}},
        "precision": {
            "parameters": str(told["params_dtype"]),
            "fp8": told["fp8"],
            "fp8_recipe": told["fp8"] and told["fp8_recipe"],
        },
        "determinism": {
            "deterministic_mode": settings.schedule.deterministic_mode,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        },
        "versions": installed_versions() | libraries(),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "threads": torch.get_num_threads()},
    }


def _by_use(of_stores: Iterable[str]) -> dict[str, str]:
    return dict(zip(("train", "heldout"), of_stores, strict=False))
