"""OLMo 2: norms behind attention and MLP, and over whole query and key projections."""

from __future__ import annotations

from megatron_bdpo.model.hf.family import (
    GATED,
    PROJECTIONS,
    QK_NORM_ALWAYS,
    SILU,
    Family,
    norms_behind,
    tensors,
)
from megatron_bdpo.model.hf.tensors import Rule

_QK_NORM_OVER_HEADS = {
    "self_attention.q_layernorm.weight": Rule({"self_attn.q_norm.weight": "queries"}),
    "self_attention.k_layernorm.weight": Rule({"self_attn.k_norm.weight": "keys"}),
}
_TENSORS = tensors(
    PROJECTIONS, _QK_NORM_OVER_HEADS, GATED, norms_behind("post_attention_layernorm", "post_feedforward_layernorm")
)
_LAYERS = {"qk_layernorm": True, "qk_norm_over_heads": True, "layer_norms": "after"}

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    _TENSORS,
    arguments=_LAYERS,
    defaults={"rms_norm_eps": 1e-5},
    only=SILU | QK_NORM_ALWAYS,
)
