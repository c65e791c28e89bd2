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
