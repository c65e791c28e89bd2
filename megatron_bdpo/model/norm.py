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
from megatron.core import parallel_state

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


class LayerNormWithoutBias:
    """Builds a LayerNorm that has a weight alone, which neither Megatron nor Transformer Engine has."""

    def __new__(  # type: ignore[misc]
        cls, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        norm = torch.nn.LayerNorm(hidden_size, eps=eps, bias=False)
        weight: Any = norm.weight
        weight.sequence_parallel = config.sequence_parallel
        return norm


def te_layers() -> Any:
    """Megatron's choice of Transformer Engine's layers."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider  # needs Transformer Engine

    return TESpecProvider()


def norm_builder(*, use_te: bool) -> Any:
    """What builds a norm of hidden states."""
    return te_layers().layer_norm() if use_te else LocalNorm


def separate_norms(layer: Any) -> None:
    """Have a Transformer Engine layer's norms built apart from the linear layers behind them, as local layers have
    them.

    Checkpoints name the weights alike.

    Args:
        layer: the spec's ``TransformerLayerSubmodules``, changed in place.
    """
    backend = te_layers()
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


class ProjectionNorm(torch.nn.Module):
    """RMSNorm over all heads of the query or key projection together (OLMo 2), which tensor-parallel ranks share.

        y = x / sqrt(mean(x^2) + eps) * weight      the mean over the heads of all ranks

    Every rank holds the whole weight and reads its own heads' part; Megatron sums over the ranks the gradients of what
    it calls ``q_layernorm`` and ``k_layernorm``. With fewer groups than ranks, several of these have the same key.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float, *, heads: str) -> None:
        """Megatron's norm-builder signature, ``hidden_size`` of one head; ``heads`` is the field that counts them."""
        super().__init__()
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise UserError("--qk-norm-over-heads: an RMSNorm, without --apply-layernorm-1p.")
        self.eps, self.group = eps, parallel_state.get_tensor_model_parallel_group()
        number, ranks = getattr(config, heads), self.group.size()
        self.weight = torch.nn.Parameter(torch.ones(number * hidden_size))
        self.copies = max(1, ranks // number)  # ranks that have the same heads
        width = number * hidden_size * self.copies // ranks
        self.own = slice(self.group.rank() // self.copies * width, (self.group.rank() // self.copies + 1) * width)

    def forward(self, projected: torch.Tensor) -> torch.Tensor:
        """Normalise [T, 1, n, d] of this rank's heads, in fp32. Forward and backward each one all-reduce of [T, 1]."""
        heads = projected.flatten(-2).float()
        squares = heads.square().sum(-1, keepdim=True) / self.copies
        if self.group.size() > 1:
            squares = _SumOverRanks.apply(squares, self.group)
        normed = heads * torch.rsqrt(squares / self.weight.numel() + self.eps) * self.weight[self.own].float()
        return normed.to(projected.dtype).view_as(projected)


class _SumOverRanks(torch.autograd.Function):
    """A sum that each rank goes on with in its own way: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        total = value.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = incoming.clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None
