"""RMSNorm and LayerNorm for the local (non-TE) layers that allow sequence parallelism.

Megatron's wrapper around torch's norms refuses sequence parallelism, although all it needs is the mark on the weights
that makes Megatron all-reduce their gradients over the tensor-parallel ranks, each of which has seen a part of the
sequence.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from megatron_bdpo.errors import UserError


class LocalNorm:
    """Builds the norm that ``config.normalization`` names, with Megatron's norm-builder signature."""

    def __new__(  # type: ignore[misc]
        cls, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        kinds = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        if config.layernorm_zero_centered_gamma:
            kinds = {"RMSNorm": ZeroCenteredRMSNorm}
        if config.normalization not in kinds:
            zero_centered = " zero-centered" if config.layernorm_zero_centered_gamma else ""
            raise UserError(
                f"--normalization {config.normalization}: local layers have{zero_centered} {' and '.join(kinds)}."
            )
        norm = kinds[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def separate_norms(layer: Any) -> None:
    """Have a Transformer Engine layer's norms built apart from the linear layers behind them, as local layers have
    them.

    Checkpoints name the weights alike.

    Args:
        layer: the spec's ``TransformerLayerSubmodules``, changed in place.
    """
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider  # needs Transformer Engine

    backend = TESpecProvider()
    names = dict(layer.sharded_state_dict_keys_map or {})
    attention = layer.self_attention.submodules
    if attention.linear_qkv is backend.column_parallel_layer_norm_linear():
        attention.linear_qkv = backend.column_parallel_linear()
        layer.input_layernorm = backend.layer_norm()
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    mlp = layer.mlp.keywords["submodules"]
    if getattr(mlp, "linear_fc1", None) is backend.column_parallel_layer_norm_linear():
        separate = dataclasses.replace(mlp, linear_fc1=backend.column_parallel_linear())
        layer.mlp = functools.partial(layer.mlp, submodules=separate)
        layer.pre_mlp_layernorm = backend.layer_norm()
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    layer.sharded_state_dict_keys_map = names


class ZeroCenteredRMSNorm(torch.nn.Module):
    """RMSNorm whose weight is stored less one (``--apply-layernorm-1p``, Gemma): small numbers, so precise in bf16."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis, in fp32."""
        normed = torch.nn.functional.rms_norm(hidden.float(), self.weight.shape, 1 + self.weight.float(), self.eps)
        return normed.to(hidden.dtype)
