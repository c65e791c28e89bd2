"""The model's configuration: Megatron's from its arguments, and what its arguments do not reach."""

from __future__ import annotations

import functools

from megatron.training.argument_utils import gpt_config_from_args
from torch.nn import functional

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.pair_gpt import PairGPTConfig
from megatron_bdpo.platform.compilation import build_output_layer_without_apex
from megatron_bdpo.training.flags.arguments import Arguments


def model_config(arguments: Arguments) -> PairGPTConfig:
    """The configuration of policy and reference, from validated arguments.

    Raises:
        UserError: ``--geglu-tanh`` without the gated layers that it changes.
    """
    settings = arguments.settings
    config: PairGPTConfig = gpt_config_from_args(arguments.megatron, model_config_cls=PairGPTConfig)
    config.rope_scaling_factor = settings.architecture.rope_scaling_factor  # Megatron leaves the flag's value behind
    config.layers = settings.layers
    config.pair_attention = None if settings.model.pair_attention == "auto" else settings.model.pair_attention
    config.fuse_local_layers = bool(settings.model.fuse_local_layers)
    config.freeze_routers = settings.model.moe_freeze_router
    config.separate_norms = settings.lora.is_wanted
    build_output_layer_without_apex(settings.architecture.implementation == "transformer_engine")
    if settings.layers.geglu_tanh:
        if not settings.architecture.gated:
            raise UserError("--geglu-tanh is the activation of gated layers: add --swiglu.")
        config.transformer.activation_func = functools.partial(functional.gelu, approximate="tanh")
        config.transformer.bias_activation_fusion = False  # Megatron's fused kernels are for SiLU and plain GELU
    return config
