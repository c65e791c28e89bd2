"""RMSNorm and LayerNorm for the local (non-TE) layers that allow sequence parallelism.

Megatron's wrapper around torch's norms refuses sequence parallelism, although all it needs is the mark on the weights
that makes Megatron all-reduce their gradients over the tensor-parallel ranks, each of which has seen a part of the
sequence.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_bdpo.errors import UserError


class LocalNorm:
    """Builds the norm that ``config.normalization`` names, with Megatron's norm-builder signature."""

    def __new__(  # type: ignore[misc]
        cls, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        kinds = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        if config.normalization not in kinds:
            raise UserError(f"--normalization {config.normalization}: local layers have {' and '.join(kinds)}.")
        if config.layernorm_zero_centered_gamma:
            raise UserError(
                "--apply-layernorm-1p needs Transformer Engine layers (--transformer-impl transformer_engine)."
            )
        norm = kinds[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
