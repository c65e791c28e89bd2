"""Qwen2, Qwen2-MoE, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from megatron_bdpo.model.hf.family import (
    ALL_LAYERS_SPARSE,
    ATTENTION,
    DENSE_MLP,
    MLP,
    QK_NORM,
    QK_NORM_ALWAYS,
    QKV_BIAS,
    QKV_BIAS_ALWAYS,
    SHARED_EXPERT_GATE,
    SILU,
    SOME_LAYERS_SLIDE,
    SOME_LAYERS_SPARSE,
    Family,
    bias_arguments,
    bias_rules,
    experts,
    shared_expert,
    tensors,
)

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    tensors(ATTENTION, QKV_BIAS, MLP),
    models="Qwen2, Qwen2.5, R1 distilled to Qwen",
    layers="biases of q, k, v; windows in some layers",
    arguments={"add_qkv_bias": True},
    defaults={"rms_norm_eps": 1e-6, **SOME_LAYERS_SLIDE},
    only=SILU | QKV_BIAS_ALWAYS,
)

QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    tensors(
        ATTENTION,
        QKV_BIAS,
        DENSE_MLP,
        experts("mlp", "gate_proj", "up_proj", "down_proj"),
        shared_expert("mlp.shared_expert"),
        SHARED_EXPERT_GATE,
    ),
    models="Qwen1.5-MoE, Qwen2-57B-A14B",
    layers="biases of q, k, v; experts, also in some layers alone; a shared expert with a gate",
    arguments={"add_qkv_bias": True, "moe_shared_expert_gate": True},
    defaults={
        **SOME_LAYERS_SPARSE,
        "rms_norm_eps": 1e-6,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
        # Which layers slide differs between releases of transformers.
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": None,
    },
    only=SILU | {"qkv_bias": (True, None), "use_sliding_window": (False, None)},
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    lambda values: tensors(ATTENTION, QK_NORM, MLP, bias_rules(values)),
    models="Qwen3 0.6B to 32B",
    layers="norms of q and k; windows in some layers",
    arguments={"qk_layernorm": True},
    own_arguments=bias_arguments,
    defaults={"attention_bias": False, "rms_norm_eps": 1e-6, "head_dim": 128, **SOME_LAYERS_SLIDE},
    only=SILU | QK_NORM_ALWAYS,
)

QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    lambda values: tensors(
        ATTENTION, QK_NORM, bias_rules(values), DENSE_MLP, experts("mlp", "gate_proj", "up_proj", "down_proj")
    ),
    models="Qwen3 30B-A3B, 235B-A22B, Coder",
    layers="norms of q and k; experts, also in some layers alone",
    arguments={"qk_layernorm": True},
    own_arguments=bias_arguments,
    defaults={
        "attention_bias": False,
        **SOME_LAYERS_SPARSE,
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
