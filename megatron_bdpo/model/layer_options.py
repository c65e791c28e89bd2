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
    attention_output_bias: bool = False
    """without --add-bias-linear: a bias behind attention's output projection (Llama's attention_bias)"""
    mlp_bias: bool = False
    """without --add-bias-linear: biases in the MLPs of layers that have no experts (Llama's mlp_bias)"""
