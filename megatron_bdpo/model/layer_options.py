"""What models have and Megatron's arguments do not say."""

# Field types are evaluated: Megatron makes flags of them. So no ``from __future__ import annotations`` here.

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerOptions:
    """Each is off by default, and then layers are Megatron's. A family of Hugging Face models turns its own on."""

    scale_embeddings: bool = False
    """multiply embeddings by the root of the hidden size (Gemma)"""
    geglu_tanh: bool = False
    """with --swiglu: tanh-approximated GELU in the place of SiLU (Gemma)"""
