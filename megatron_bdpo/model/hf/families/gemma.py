"""Gemma: scaled embeddings, norms around one, a tanh-approximated gate."""

from __future__ import annotations

from megatron_bdpo.model.hf.family import (
    ATTENTION,
    MLP,
    Family,
    tensors,
)

GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    tensors(ATTENTION, MLP),
    models="Gemma 1",
    layers="scaled embeddings, zero-centred norms, tanh GELU",
    arguments={"layernorm_zero_centered_gamma": True, "scale_embeddings": True, "geglu_tanh": True},
    defaults={"rms_norm_eps": 1e-6, "head_dim": 256, "tie_word_embeddings": True},
    # Early releases say "gelu" and mean its tanh approximation; transformers reads them so, too.
    only={
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),
        "hidden_activation": ("gelu_pytorch_tanh", None),
    },
)
