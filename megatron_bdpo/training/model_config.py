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
        UserError: an option of layers without what it changes.
    """
    settings = arguments.settings
    config: PairGPTConfig = gpt_config_from_args(arguments.megatron, model_config_cls=PairGPTConfig)
    config.rope_scaling_factor = settings.architecture.rope_scaling_factor  # Megatron leaves the flag's value behind
    config.layers = settings.layers
    config.transformer.softmax_scale = settings.layers.attention_scale
    config.pair_attention = None if settings.model.pair_attention == "auto" else settings.model.pair_attention
    config.fuse_local_layers = bool(settings.model.fuse_local_layers)
    config.freeze_routers = settings.model.moe_freeze_router
    config.separate_norms = settings.lora.is_wanted
    build_output_layer_without_apex(settings.architecture.implementation == "transformer_engine")
    if settings.layers.geglu_tanh:
        if not settings.architecture.swiglu:
            raise UserError("--geglu-tanh is the activation of gated layers: add --swiglu.")
        config.transformer.activation_func = functools.partial(functional.gelu, approximate="tanh")
        config.transformer.bias_activation_fusion = False  # Megatron's fused kernels are for SiLU and plain GELU
    if settings.layers.qk_norm_over_heads and not config.transformer.qk_layernorm:
        raise UserError("--qk-norm-over-heads is a kind of --qk-layernorm: give both.")
    if settings.layers.norms_without_bias and config.transformer.normalization != "LayerNorm":
        raise UserError("--norms-without-bias: an RMSNorm has none. Add --normalization LayerNorm, or leave it out.")
    if settings.layers.parallel_layers and settings.layers.layer_norms != "before":
        raise UserError("--parallel-layers: their norm is before both. Leave --layer-norms out.")
    longest = settings.layers.rotary_factors_until
    if longest and settings.schedule.seq_length > longest:
        raise UserError(
            f"--seq-length {settings.schedule.seq_length}: the model's rotary factors are those of sequences of up to "
            f"{longest} positions, and longer ones would have others. Use --seq-length {longest} or less."
        )
    if settings.architecture.multi_latent:
        _finish_latent_attention(config, arguments)
    if settings.architecture.clamp is not None:
        # Megatron's fused kernels clamp before they add a bias, its plain layers after it, as models are trained.
        config.transformer.bias_activation_fusion = False
    if settings.architecture.experts and settings.architecture.biases:
        config.transformer.bias_dropout_fusion = False  # grouped experts refuse it; there is no dropout either way
    return config


def _finish_latent_attention(config: PairGPTConfig, arguments: Arguments) -> None:
    """What Megatron leaves behind of YaRN's arguments, which it reads for its other attention."""
    given = vars(arguments.megatron)
    for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
        if given.get(f"yarn_{name}") is not None:
            setattr(config.transformer, name, given[f"yarn_{name}"])
    config.transformer.apply_rope_fusion = False  # its kernel takes positions as they come, not a plan's
