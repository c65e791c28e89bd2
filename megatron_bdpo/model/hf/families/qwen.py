"""Qwen2, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from megatron_bdpo.model.hf.family import (
    ALL_LAYERS_SPARSE,
    ATTENTION,
    MLP,
    QK_NORM,
    QK_NORM_ALWAYS,
    QKV_BIAS,
    QKV_BIAS_ALWAYS,
    SILU,
    SOME_LAYERS_SLIDE,
    Family,
    experts,
    tensors,
)

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    tensors(ATTENTION, QKV_BIAS, MLP),
    models="Qwen2, Qwen2.5, DeepSeek R1 distilled to Qwen",
    layers="biases of q, k, v; windows in some layers",
    arguments={"add_qkv_bias": True},
    defaults={"rms_norm_eps": 1e-6, **SOME_LAYERS_SLIDE},
    only=SILU | QKV_BIAS_ALWAYS,
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    tensors(ATTENTION, QK_NORM, MLP),
    models="Qwen3 0.6B to 32B",
    layers="norms of q and k; windows in some layers",
    arguments={"qk_layernorm": True},
    defaults={"rms_norm_eps": 1e-6, "head_dim": 128, **SOME_LAYERS_SLIDE},
    only=SILU | QK_NORM_ALWAYS,
)

QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    tensors(ATTENTION, QK_NORM, experts("mlp", "gate_proj", "up_proj", "down_proj")),
    models="Qwen3 30B-A3B, 235B-A22B, Coder",
    layers="norms of q and k; experts",
    arguments={"qk_layernorm": True},
    defaults={
        "rms_norm_eps": 1e-6,
        "num_experts": 128,
        "num_local_experts": None,  # transformers 5's name for it
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": None,
    },
    only=SILU | ALL_LAYERS_SPARSE | QK_NORM_ALWAYS | {"use_sliding_window": (False, None)},
)
