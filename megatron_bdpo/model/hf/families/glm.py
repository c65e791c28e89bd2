"""GLM-4 and GLM-4.5: part of each head is rotated; of 4.5 and its mixtures the first layers are dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bdpo.model.hf.family import (
    ATTENTION,
    DENSE_MLP,
    EXPERT_BIAS,
    QK_NORM,
    QKV_BIAS,
    SIGMOID_ROUTER,
    SIGMOID_ROUTER_ARGUMENTS,
    SILU,
    Config,
    Family,
    experts,
    gated_mlp,
    norms_behind,
    shared_expert,
    tensors,
)
from megatron_bdpo.model.hf.tensors import Rule


def _rules(values: Config) -> Mapping[str, Rule]:
    return tensors(
        ATTENTION,
        QKV_BIAS if values["attention_bias"] else {},
        QK_NORM if values["use_qk_norm"] else {},
        DENSE_MLP,
        experts("mlp", "gate_proj", "up_proj", "down_proj"),
        shared_expert("mlp.shared_experts") if values["n_shared_experts"] else {},
        EXPERT_BIAS,
    )


def _arguments(values: Config) -> dict[str, Any]:
    return {"add_qkv_bias": bool(values["attention_bias"]), "qk_layernorm": bool(values["use_qk_norm"])}


def _config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_qk_norm": bool(arguments["qk_layernorm"])}


GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    _rules,
    models="GLM-4.5, 4.6, Air",
    layers="part of a head rotated, biases and norms of q and k, sigmoid router with biases, shared expert",
    arguments=SIGMOID_ROUTER_ARGUMENTS,
    defaults={
        **SIGMOID_ROUTER,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "use_qk_norm": False,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "num_mtp_layers": 0,
    },
    only=SILU | {"norm_topk_prob": (True,)},
    own_arguments=_arguments,
    own_config=_config,
)


def _glm4_rules(values: Config) -> Mapping[str, Rule]:
    return tensors(
        ATTENTION,
        QKV_BIAS if values["attention_bias"] else {},
        gated_mlp("post_attention_layernorm"),
        {"mlp.linear_fc1.weight": Rule({"mlp.gate_up_proj.weight": ("ffn", "ffn")}, "hidden")},
        norms_behind("post_self_attn_layernorm", "post_mlp_layernorm"),
    )


GLM4 = Family(
    "glm4",
    "Glm4ForCausalLM",
    _glm4_rules,
    models="GLM-4 9B, 32B (0414)",
    layers="norms around, half of a head rotated, neighbouring dimensions",
    arguments={"layer_norms": "around", "rotary_interleaved": True},
    defaults={
        "rms_norm_eps": 1.5625e-7,
        "head_dim": 128,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    },
    only=SILU,
    own_arguments=lambda values: {"add_qkv_bias": bool(values["attention_bias"])},
    own_config=lambda arguments: {"attention_bias": bool(arguments["add_qkv_bias"])},
)
