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
    if settings.objective.is_reward:
        config.rewards, config.share_embeddings_and_output_weights = True, False
    build_output_layer_without_apex(settings.architecture.implementation == "transformer_engine")
    if settings.layers.geglu_tanh:
        if not settings.architecture.swiglu:
            raise UserError("--geglu-tanh is the activation of gated layers: add --swiglu.")
        config.transformer.activation_func = functools.partial(functional.gelu, approximate="tanh")
        config.transformer.bias_activation_fusion = False  # Megatron's fused kernels are for SiLU and plain GELU
    _check_layer_options(config, settings.schedule.seq_length)
    if settings.architecture.multi_latent:
        _finish_latent_attention(config, arguments)
    if settings.architecture.clamp is not None:
        # Megatron's fused kernels clamp before they add a bias, its plain layers after it, as models are trained.
        config.transformer.bias_activation_fusion = False
    if settings.architecture.experts and settings.architecture.biases:
        config.transformer.bias_dropout_fusion = False  # grouped experts refuse it; there is no dropout either way
    return config


def _check_layer_options(config: PairGPTConfig, seq_length: int) -> None:
    """Refuse options that exclude each other, or that have nothing to change.

    Raises:
        UserError: naming the flags, and the way out.
    """
    layers, transformer = config.layers, config.transformer
    latent = transformer.multi_latent_attention
    if layers.qk_norm_over_heads and (latent or not transformer.qk_layernorm):
        raise UserError("--qk-norm-over-heads is a kind of --qk-layernorm: give both.")
    if layers.norms_without_bias and transformer.normalization != "LayerNorm":
        raise UserError("--norms-without-bias: an RMSNorm has none. Add --normalization LayerNorm, or leave it out.")
    if layers.parallel_layers and layers.layer_norms != "before":
        raise UserError("--parallel-layers: their norm is before both. Leave --layer-norms out.")
    if layers.latent_norm_epsilon is not None and not latent:
        raise UserError("--latent-norm-epsilon is of --multi-latent-attention: give both, or leave it out.")
    if layers.local_rotary_base is not None and (latent or not transformer.window_size):
        raise UserError("--local-rotary-base is of layers with a window: add --window-size, or leave it out.")
    _check_rotary_factors(config, seq_length)


def _check_rotary_factors(config: PairGPTConfig, seq_length: int) -> None:
    layers, transformer = config.layers, config.transformer
    if not layers.rotary_factors:
        if layers.rotary_attention_factor is not None or layers.rotary_factors_until is not None:
            raise UserError("--rotary-attention-factor, --rotary-factors-until: only beside --rotary-factors.")
        return
    if config.position_embedding_type != "rope" or transformer.multi_latent_attention:
        raise UserError("--rotary-factors: only with --position-embedding-type rope, and not in latent attention.")
    frequencies = int(transformer.kv_channels * config.rotary_percent) // 2
    if len(layers.rotary_factors) != frequencies:
        raise UserError(f"--rotary-factors: {frequencies} numbers, one for each frequency of a head.")
    longest = layers.rotary_factors_until
    if longest and seq_length > longest:
        raise UserError(
            f"--seq-length {seq_length}: the model's rotary factors are those of sequences of up to {longest} "
            f"positions, and longer ones would have others. Use --seq-length {longest} or less."
        )


def _finish_latent_attention(config: PairGPTConfig, arguments: Arguments) -> None:
    """What Megatron leaves behind of YaRN's arguments, which it reads for its other attention."""
    given = vars(arguments.megatron)
    for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
        if given.get(f"yarn_{name}") is not None:
            setattr(config.transformer, name, given[f"yarn_{name}"])
    config.transformer.apply_rope_fusion = False  # its kernel takes positions as they come, not a plan's
