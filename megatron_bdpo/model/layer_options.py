"""What models have and Megatron's arguments do not say."""

# Field types are evaluated: Megatron makes flags of them. So no ``from __future__ import annotations`` here.

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerOptions:
    """Each is off by default, and then layers are Megatron's. A family of Hugging Face models turns its own on."""

    scale_embeddings: bool = False
    """multiply embeddings by the root of the hidden size (Gemma)"""
    geglu_tanh: bool = False
    """with --swiglu: tanh-approximated GELU in the place of SiLU (Gemma)"""
    layer_norms: Literal["before", "after", "around"] = "before"
    """norms before attention and MLP, or of what they return before it is added to the residual (OLMo 2, EXAONE 4), or
    both (Gemma 2 and 3, GLM 4)"""
    qk_norm_over_heads: bool = False
    """with --qk-layernorm: one norm over all heads of the queries, and one over those of the keys (OLMo 2)"""
    attention_scale: float | None = None
    """of attention scores, where it is not one over the root of the head size (Gemma 2 and 3, Granite)"""
    attention_softcap: float | None = None
    """attention scores become C tanh(scores / C) (Gemma 2)"""
    local_rotary_base: float | None = None
    """rotary base of layers with a window, whose positions are not scaled; the others have --rotary-base (Gemma 3)"""
    rotary_factors: list[float] | None = None
    """divide the rotary frequencies by these, one for each (LongRoPE's of short sequences: Phi-3.5)"""
    rotary_attention_factor: float | None = None
    """with --rotary-factors: multiply rotated queries and keys by this"""
    rotary_factors_until: int | None = None
    """with --rotary-factors: the longest sequence that they are for; longer packs are refused"""
    embedding_multiplier: float | None = None
    """multiply embeddings by this (Granite)"""
    residual_multiplier: float | None = None
    """multiply what attention and MLP add to the residual by this (Granite)"""
    logit_scale: float | None = None
    """multiply logits by this (Granite, Cohere)"""
    logit_softcap: float | None = None
    """logits, scaled, become C tanh(logits / C) (Gemma 2)"""
    parallel_layers: bool = False
    """attention and MLP read the same norm, and both are added to its input (Cohere)"""
    norms_without_bias: bool = False
    """with --normalization LayerNorm: weights alone (Cohere)"""
    attention_output_bias: bool = False
    """without --add-bias-linear: a bias behind attention's output projection (Llama's attention_bias)"""
    mlp_bias: bool = False
    """without --add-bias-linear: biases in the MLPs of layers that have no experts (Llama's mlp_bias)"""
    latent_norm_epsilon: float | None = None
    """with --multi-latent-attention: epsilon of the latents' norms, where it is not that of the layers (DeepSeek-V3)"""
