"""Llama, Mistral and Mixtral, and others with their layers (Seed-OSS, SmolLM3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.family import (
    ALL_LAYERS_SPARSE,
    ATTENTION,
    MLP,
    SILU,
    Config,
    Family,
    bias_arguments,
    bias_rules,
    experts,
    tensors,
)
from megatron_bdpo.model.hf.kinds import shown

#: The published model has it in its file. It is left out with a remark (``config.DROPOUTS``).
_DROPOUT = (0, 0.1, None)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    lambda values: tensors(ATTENTION, MLP, bias_rules(values)),
    models="Llama 1 to 3.3, Yi, Falcon 3, SmolLM 1 and 2, CodeLlama, R1 distilled to Llama",
    defaults={"rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False},
    only=SILU,
    own_arguments=bias_arguments,
)

SEED_OSS = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    lambda values: tensors(ATTENTION, MLP, bias_rules(values)),
    models="Seed-OSS 36B",
    layers="biases of q, k, v",
    defaults={
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    only=SILU | {"attention_dropout": _DROPOUT, "residual_dropout": _DROPOUT},
    own_arguments=bias_arguments,
)


def _without_rope(values: Config) -> list[bool]:
    layers, every = values["num_hidden_layers"], values["no_rope_layer_interval"] or 0
    told = values["no_rope_layers"]
    if told is None:
        return [bool(every) and (layer + 1) % every == 0 for layer in range(layers)]
    if len(told) < layers or not set(told) <= {0, 1}:
        raise UserError(f"config.json: no_rope_layers must be {layers} times 0 or 1, not {shown(told)}.")
    return [not each for each in told[:layers]]


def _smollm3_arguments(values: Config) -> dict[str, Any]:
    without, window = _without_rope(values), values["sliding_window"]
    found: dict[str, Any] = bias_arguments(values)
    if any(without):
        found["no_rope_freq"] = [int(each) for each in without]
    if values["layer_types"] is None and values["use_sliding_window"] and window and any(without):
        # Without a list of them, the layers that slide are those without rotary positions.
        found |= {"window_size": (window - 1, 0), "window_attn_skip_freq": [int(each) for each in without]}
    elif values["layer_types"] is None:
        found |= {"window_size": None, "window_attn_skip_freq": None}
    return found


def _smollm3_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    without = arguments.get("no_rope_freq") or [0] * arguments["num_layers"]
    return {"no_rope_layers": [1 - each for each in without]}


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    lambda values: tensors(ATTENTION, MLP, bias_rules(values)),
    models="SmolLM3 3B",
    layers="no rotary positions in every fourth layer",
    defaults={
        "rms_norm_eps": 1e-6,
        "rope_theta": 2e6,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
    },
    only=SILU,
    own_arguments=_smollm3_arguments,
    own_config=_smollm3_config,
)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    tensors(ATTENTION, MLP),
    models="Mistral 7B, Nemo",
    layers="windows",
    defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    only=SILU,
)

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    tensors(ATTENTION, experts("block_sparse_moe", "w1", "w3", "w2")),
    models="Mixtral 8x7B, 8x22B",
    layers="experts",
    defaults={
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    only=SILU | ALL_LAYERS_SPARSE | {"norm_topk_prob": (True, None)},
)
