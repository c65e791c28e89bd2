"""The families of models, one table each: which settings they have and which tensors.

A family says what Megatron's arguments cannot say by themselves, what a key that is absent from its ``config.json``
means, and which values of a key its layers here cannot honour. How keys become arguments is in ``config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_bdpo.model.hf.tensors import Rule

_LAYER = "model.layers.{layer}."

_OUTSIDE = {
    "embedding.word_embeddings.weight": Rule({"model.embed_tokens.weight": "vocab"}, "hidden"),
    "decoder.final_layernorm.weight": Rule({"model.norm.weight": "hidden"}),
}

#: Where input and output embeddings are one, this tensor does not exist.
OUTPUT_LAYER = "output_layer.weight"
_OUTPUT = {OUTPUT_LAYER: Rule({"lm_head.weight": "vocab"}, "hidden")}


def _tensors(*of_a_layer: Mapping[str, Rule]) -> dict[str, Rule]:
    """The tensors of a model whose layers have these."""
    in_layers = {
        f"decoder.layers.{key}": Rule(
            {_LAYER + name: size for name, size in rule.rows.items()}, rule.columns, rule.interleaved_by
        )
        for rules in of_a_layer
        for key, rule in rules.items()
    }
    return _OUTSIDE | in_layers | _OUTPUT


def _fused_qkv(kind: str, columns: str | None) -> Rule:
    projections = {"q": "queries", "k": "keys", "v": "keys"}
    return Rule({f"self_attn.{name}_proj.{kind}": size for name, size in projections.items()}, columns, "groups")


_ATTENTION = {
    "self_attention.linear_qkv.layer_norm_weight": Rule({"input_layernorm.weight": "hidden"}),
    "self_attention.linear_qkv.weight": _fused_qkv("weight", "hidden"),
    "self_attention.linear_proj.weight": Rule({"self_attn.o_proj.weight": "hidden"}, "queries"),
}
_QKV_BIAS = {"self_attention.linear_qkv.bias": _fused_qkv("bias", None)}
_QK_NORM = {
    "self_attention.q_layernorm.weight": Rule({"self_attn.q_norm.weight": "head"}),
    "self_attention.k_layernorm.weight": Rule({"self_attn.k_norm.weight": "head"}),
}
_MLP = {
    "mlp.linear_fc1.layer_norm_weight": Rule({"post_attention_layernorm.weight": "hidden"}),
    "mlp.linear_fc1.weight": Rule({"mlp.gate_proj.weight": "ffn", "mlp.up_proj.weight": "ffn"}, "hidden"),
    "mlp.linear_fc2.weight": Rule({"mlp.down_proj.weight": "hidden"}, "ffn"),
}


def _experts(block: str, gate: str, up: str, down: str) -> dict[str, Rule]:
    expert = block + ".experts.{expert}."
    norm = Rule({"post_attention_layernorm.weight": "hidden"})
    return {
        "mlp.linear_fc1.layer_norm_weight": norm,  # of local layers
        "pre_mlp_layernorm.weight": norm,  # of Transformer Engine's
        "mlp.router.weight": Rule({f"{block}.gate.weight": "experts"}, "hidden"),
        "mlp.experts.experts.linear_fc1.weight": Rule(
            {f"{expert}{gate}.weight": "ffn", f"{expert}{up}.weight": "ffn"}, "hidden"
        ),
        "mlp.experts.experts.linear_fc2.weight": Rule({f"{expert}{down}.weight": "hidden"}, "ffn"),
    }


@dataclass(frozen=True)
class Family:
    """What the models of one ``model_type`` have in common."""

    model_type: str
    architecture: str
    """The one in ``architectures`` that is a language model."""
    rules: Mapping[str, Rule]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Megatron's, beyond those that all families share."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What an absent key of ``config.json`` means, where it is not as in ``config.DEFAULTS``; these keys are read."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys whose other values the layers here do not have, where it is not as in ``keys.FIXED``."""


_SILU = {"hidden_act": ("silu",)}
#: Of families whose layers have the part always, whatever the key says.
_QKV_BIAS_ALWAYS = dict.fromkeys(("attention_bias", "qkv_bias"), (True, False, None))
_QK_NORM_ALWAYS = dict.fromkeys(("use_qk_norm", "qk_layernorm"), (True, None))
_ALL_LAYERS_SPARSE = {"mlp_layer_types": ("sparse", None)}
_SOME_LAYERS_SLIDE = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

_FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        _tensors(_ATTENTION, _MLP),
        defaults={"rms_norm_eps": 1e-6},
        only=_SILU,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        _tensors(_ATTENTION, _MLP),
        defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
        only=_SILU,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        _tensors(_ATTENTION, _QKV_BIAS, _MLP),
        arguments={"add_qkv_bias": True},
        defaults={"rms_norm_eps": 1e-6, **_SOME_LAYERS_SLIDE},
        only=_SILU | _QKV_BIAS_ALWAYS,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        _tensors(_ATTENTION, _QK_NORM, _MLP),
        arguments={"qk_layernorm": True},
        defaults={"rms_norm_eps": 1e-6, "head_dim": 128, **_SOME_LAYERS_SLIDE},
        only=_SILU | _QK_NORM_ALWAYS,
    ),
    Family(
        "gemma",
        "GemmaForCausalLM",
        _tensors(_ATTENTION, _MLP),
        arguments={"layernorm_zero_centered_gamma": True, "scale_embeddings": True, "geglu_tanh": True},
        defaults={"rms_norm_eps": 1e-6, "head_dim": 256, "tie_word_embeddings": True},
        # Early releases say "gelu" and mean its tanh approximation; transformers reads them so, too.
        only={
            "hidden_act": ("gelu_pytorch_tanh", "gelu"),
            "hidden_activation": ("gelu_pytorch_tanh", None),
        },
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        _tensors(_ATTENTION, _experts("block_sparse_moe", "w1", "w3", "w2")),
        defaults={
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
        only=_SILU | _ALL_LAYERS_SPARSE | {"norm_topk_prob": (True, None)},
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _tensors(_ATTENTION, _QK_NORM, _experts("mlp", "gate_proj", "up_proj", "down_proj")),
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
        only=_SILU | _ALL_LAYERS_SPARSE | _QK_NORM_ALWAYS | {"use_sliding_window": (False, None)},
    ),
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _FAMILIES}

#: Families that people will try, and why they cannot be trained here.
REFUSED: Mapping[str, str] = {
    "gemma2": "its attention scores and logits are capped by tanh (attn_logit_softcapping, final_logit_softcapping), "
    "and it has norms behind attention and MLP, which Megatron's layers do not have",
    "gemma3_text": "it has norms behind attention and MLP, and another rotary base in every kind of layer",
    "gemma3": "it has norms behind attention and MLP, and another rotary base in every kind of layer",
    "qwen2_moe": "its shared expert has a gate of its own, which is not mapped",
    "phi3": "its projections are stored fused in another order, which is not mapped",
}
