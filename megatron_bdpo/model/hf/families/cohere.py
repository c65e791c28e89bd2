"""Command R7B and A: attention and MLP side by side; layers that attend to all know no positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bdpo.model.hf.family import ATTENTION, GATED, SILU, Config, Family, bias_arguments, bias_rules, tensors
from megatron_bdpo.model.hf.layer_kinds import GLOBAL, layer_types, with_layer_types


def _spelling(values: Config) -> Config:
    values = with_layer_types(values, values["sliding_window_pattern"] or 4)
    return {**values, "rms_norm_eps": values["layer_norm_eps"]}


def _arguments(values: Config) -> dict[str, Any]:
    without_positions = [int(kind == GLOBAL) for kind in values["layer_types"]]
    return {
        **bias_arguments(values),
        "logit_scale": None if values["logit_scale"] == 1 else float(values["logit_scale"]),
        "no_rope_freq": without_positions if any(without_positions) else None,
    }


def _config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "layer_norm_eps": arguments["layernorm_epsilon"],
        "layer_types": layer_types(arguments),
        "logit_scale": arguments["logit_scale"] or 1.0,
    }


COHERE2 = Family(
    "cohere2",
    "Cohere2ForCausalLM",
    lambda values: tensors(ATTENTION, GATED, bias_rules(values)),
    models="Command R7B, Command A",
    layers="attention and MLP side by side under one norm without bias, windows, other layers without positions",
    arguments={
        "normalization": "LayerNorm",
        "norms_without_bias": True,
        "parallel_layers": True,
        "rotary_interleaved": True,
    },
    defaults={
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
        "tie_word_embeddings": True,
    },
    only=SILU,
    spelling=_spelling,
    own_arguments=_arguments,
    own_config=_config,
)
