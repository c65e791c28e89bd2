"""OLMo 2 and 3: norms behind attention and MLP, and over whole query and key projections; windows in 3 of 4 layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.family import (
    GATED,
    PROJECTIONS,
    QK_NORM_ALWAYS,
    SILU,
    Config,
    Family,
    bias_arguments,
    bias_rules,
    norms_behind,
    tensors,
)
from megatron_bdpo.model.hf.kinds import whole
from megatron_bdpo.model.hf.layer_kinds import (
    GLOBAL,
    LOCAL,
    LOCAL_BASE,
    layer_types,
    with_layer_types,
    with_rope_of_kinds,
)
from megatron_bdpo.model.hf.tensors import Rule

_QK_NORM_OVER_HEADS = {
    "self_attention.q_layernorm.weight": Rule({"self_attn.q_norm.weight": "queries"}),
    "self_attention.k_layernorm.weight": Rule({"self_attn.k_norm.weight": "keys"}),
}


def _tensors(values: Config) -> dict[str, Rule]:
    return tensors(
        PROJECTIONS,
        _QK_NORM_OVER_HEADS,
        GATED,
        norms_behind("post_attention_layernorm", "post_feedforward_layernorm"),
        bias_rules(values),
    )


_LAYERS = {"qk_layernorm": True, "qk_norm_over_heads": True, "layer_norms": "after"}

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    _tensors,
    models="OLMo 2",
    layers="norms behind, norms over all heads of q and of k",
    arguments=_LAYERS,
    defaults={"rms_norm_eps": 1e-5, "attention_bias": False},
    only=SILU | QK_NORM_ALWAYS,
    own_arguments=bias_arguments,
)

_OLMO3_BASE = 5e5


def _olmo3_spelling(values: Config) -> Config:
    values = with_layer_types(values, 4)
    if values.get("rope_parameters") is None:
        if values["rope_theta"] != _OLMO3_BASE:
            raise UserError(
                f"config.json: rope_theta {values['rope_theta']}: releases of transformers do not agree on whether it "
                f"is that of layers with a window, too. Write rope_parameters, with a base of {LOCAL} and of {GLOBAL}."
            )
        scaling = {"rope_theta": _OLMO3_BASE, **(values.get("rope_scaling") or {})}
        values = {**values, "rope_parameters": {GLOBAL: scaling}}
    return with_rope_of_kinds({**values, LOCAL_BASE: _OLMO3_BASE})


def _olmo3_arguments(values: Config) -> dict[str, Any]:
    """One table for all layers where both kinds have the same."""
    rope = values["rope_parameters"]
    alike = {"rope_theta": values[LOCAL_BASE], "rope_type": "default"} == {
        "rope_theta": values["rope_theta"],
        "rope_type": "default",
        **rope,
    }
    return {
        **bias_arguments(values),
        "local_rotary_base": None if alike or LOCAL not in values["layer_types"] else whole(values[LOCAL_BASE]),
    }


def _olmo3_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """In the spelling of early releases where that says it all: base and scaling beside each other."""
    bases = {LOCAL: arguments["local_rotary_base"] or arguments["rotary_base"], GLOBAL: arguments["rotary_base"]}
    config: dict[str, Any] = {"layer_types": layer_types(arguments)}
    if set(bases.values()) != {_OLMO3_BASE}:
        config["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": float(base)} for kind, base in bases.items()
        }
    return config


OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    _tensors,
    models="OLMo 3",
    layers="as OLMo 2, windows in three of four layers, scaled positions in the others",
    arguments=_LAYERS,
    defaults={
        "rms_norm_eps": 1e-5,
        "rope_theta": _OLMO3_BASE,
        "sliding_window": 4096,
        "layer_types": None,
        "attention_bias": False,
    },
    only=SILU | QK_NORM_ALWAYS,
    spelling=_olmo3_spelling,
    own_arguments=_olmo3_arguments,
    own_config=_olmo3_config,
)
