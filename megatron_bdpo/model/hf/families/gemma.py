"""Gemma: scaled embeddings, norms around one, a tanh-approximated gate; from 2 on norms behind and windows, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bdpo.model.hf.family import (
    ATTENTION,
    MLP,
    QK_NORM,
    Config,
    Family,
    bias_arguments,
    bias_rules,
    gated_mlp,
    norms_behind,
    tensors,
)
from megatron_bdpo.model.hf.kinds import whole
from megatron_bdpo.model.hf.layer_kinds import LOCAL, LOCAL_BASE, layer_types, with_layer_types, with_rope_of_kinds

_ARGUMENTS = {"layernorm_zero_centered_gamma": True, "scale_embeddings": True, "geglu_tanh": True}
_DEFAULTS = {"rms_norm_eps": 1e-6, "head_dim": 256, "tie_word_embeddings": True}
# Early releases say "gelu" and mean its tanh approximation; transformers reads them so, too.
_GELU = {"hidden_act": ("gelu_pytorch_tanh", "gelu"), "hidden_activation": ("gelu_pytorch_tanh", None)}

GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    tensors(ATTENTION, MLP),
    models="Gemma 1",
    layers="scaled embeddings, zero-centred norms, tanh GELU",
    arguments=_ARGUMENTS,
    defaults=_DEFAULTS,
    only=_GELU,
)

_NORMS_AROUND = (
    gated_mlp("pre_feedforward_layernorm"),
    norms_behind("post_attention_layernorm", "post_feedforward_layernorm"),
)
_ONE_KIND_OF_GELU = {**_GELU, "hidden_activation": ("gelu_pytorch_tanh",)}
_LATER_DEFAULTS = {
    **_DEFAULTS,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}


def _later_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": whole(arguments["attention_scale"] ** -2),
        "layer_types": layer_types(arguments),
        "final_logit_softcapping": arguments["logit_softcap"],
    }


def _gemma2_arguments(values: Config) -> dict[str, Any]:
    return {
        **bias_arguments(values),
        "attention_scale": values["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": values["attn_logit_softcapping"],
        "logit_softcap": values["final_logit_softcapping"],
    }


GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    lambda values: tensors(ATTENTION, *_NORMS_AROUND, bias_rules(values)),
    arguments={**_ARGUMENTS, "layer_norms": "around"},
    defaults={**_LATER_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    only=_ONE_KIND_OF_GELU,
    models="Gemma 2 2B to 27B",
    layers="as Gemma, norms around attention and MLP, capped scores and logits, windows in every other layer",
    spelling=lambda values: with_layer_types(values, 2),
    own_arguments=_gemma2_arguments,
    own_config=lambda arguments: {
        **_later_config(arguments),
        "attn_logit_softcapping": arguments["attention_softcap"],
    },
)


def _gemma3_arguments(values: Config) -> dict[str, Any]:
    return {
        **bias_arguments(values),
        "attention_scale": values["query_pre_attn_scalar"] ** -0.5,
        "logit_softcap": values["final_logit_softcapping"],
        "local_rotary_base": whole(values[LOCAL_BASE]) if LOCAL in values["layer_types"] else None,
    }


GEMMA3_TEXT = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    lambda values: tensors(ATTENTION, QK_NORM, *_NORMS_AROUND, bias_rules(values)),
    arguments={**_ARGUMENTS, "layer_norms": "around", "qk_layernorm": True},
    defaults={
        **_LATER_DEFAULTS,
        "rope_theta": 1e6,
        LOCAL_BASE: 1e4,
        "sliding_window_pattern": 6,
        "_sliding_window_pattern": None,  # releases that write it write layer_types, too
        "final_logit_softcapping": None,
    },
    models="Gemma 3 270M, 1B, and the larger ones' language model",
    layers="as Gemma, norms around, norms of q and k, windows and a rotary base of their own in five of six layers",
    only=_ONE_KIND_OF_GELU,
    spelling=lambda values: with_rope_of_kinds(with_layer_types(values, values["sliding_window_pattern"] or 6)),
    own_arguments=_gemma3_arguments,
    own_config=lambda arguments: {
        **_later_config(arguments),
        **({} if arguments["local_rotary_base"] is None else {LOCAL_BASE: float(arguments["local_rotary_base"])}),
    },
)
