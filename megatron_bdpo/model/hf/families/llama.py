"""Llama, Mistral and Mixtral: the layers that Megatron's arguments describe."""

from __future__ import annotations

from megatron_bdpo.model.hf.family import (
    ALL_LAYERS_SPARSE,
    ATTENTION,
    MLP,
    SILU,
    Family,
    experts,
    tensors,
)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    tensors(ATTENTION, MLP),
    models="Llama 1 to 3.3, Yi, Falcon 3, SmolLM 1 and 2, CodeLlama, TinyLlama, DeepSeek R1 distilled to Llama",
    layers="",
    defaults={"rms_norm_eps": 1e-6},
    only=SILU,
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
