"""EXAONE 4: norms behind attention and MLP; beside layers with a window, those that attend to all know no positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.family import (
    GATED,
    PROJECTIONS,
    QK_NORM,
    QK_NORM_ALWAYS,
    SILU,
    Config,
    Family,
    norms_behind,
    tensors,
)
from megatron_bdpo.model.hf.kinds import shown
from megatron_bdpo.model.hf.layer_kinds import GLOBAL, layer_types, with_layer_types


def _spelling(values: Config) -> Config:
    pattern = values["sliding_window_pattern"]
    if values.get("layer_types") is None and not (values["sliding_window"] and type(pattern) is int and pattern > 0):
        # transformers fails on these files.
        raise UserError(
            f"config.json: sliding_window_pattern is {shown(pattern)}, and there are no layer_types. Write these."
        )
    return with_layer_types(values, pattern)


def _arguments(values: Config) -> dict[str, Any]:
    without_positions = [int(kind == GLOBAL) for kind in values["layer_types"]]
    return {"no_rope_freq": without_positions if values["sliding_window"] and any(without_positions) else None}


def _config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"layer_types": layer_types(arguments)}


EXAONE4 = Family(
    "exaone4",
    "Exaone4ForCausalLM",
    tensors(PROJECTIONS, QK_NORM, GATED, norms_behind("post_attention_layernorm", "post_feedforward_layernorm")),
    models="EXAONE 4.0 1.2B, 32B",
    layers="norms behind attention and MLP, norms of q and k, windows, no rotary positions in layers without a window",
    arguments={"qk_layernorm": True, "layer_norms": "after"},
    defaults={
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
    },
    only=SILU | QK_NORM_ALWAYS,
    spelling=_spelling,
    own_arguments=_arguments,
    own_config=_config,
)
