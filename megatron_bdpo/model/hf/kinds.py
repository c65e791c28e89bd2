"""What kind of value each key of a ``config.json`` holds: a file of somebody else's may hold anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_bdpo.errors import UserError

_MOST = 2**31 - 1
#: No model has more, and a list is made of them.
_MOST_LAYERS = 10_000


def _is_int(value: Any, least: int, most: int = _MOST) -> bool:
    return type(value) is int and least <= value <= most


def is_number(value: Any) -> bool:
    """Positive and finite."""
    return type(value) in (int, float) and 0 < value < math.inf


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(each, 0) for each in value)


#: What a value must be, in words and as a check, and the keys of such values. Those of the second table may be null.
_VALUES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (f"a positive whole number up to {_MOST_LAYERS}", lambda v: _is_int(v, 1, _MOST_LAYERS), "num_hidden_layers"),
    (
        "a positive whole number", lambda v: _is_int(v, 1),
        "hidden_size intermediate_size num_attention_heads vocab_size kv_lora_rank qk_nope_head_dim qk_rope_head_dim "
        "v_head_dim",
    ),
    (
        "a positive number", is_number,
        "rms_norm_eps rope_theta rope_local_base_freq query_pre_attn_scalar attention_multiplier embedding_multiplier "
        "residual_multiplier logits_scaling logit_scale layer_norm_eps",
    ),
)  # fmt: skip
_VALUES_OR_NULL: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "a whole number", lambda v: _is_int(v, 0),
        "num_key_value_heads head_dim sliding_window max_window_layers num_local_experts num_experts "
        "num_experts_per_tok moe_intermediate_size original_max_position_embeddings n_routed_experts n_shared_experts "
        "shared_expert_intermediate_size first_k_dense_replace decoder_sparse_step n_group topk_group "
        "num_nextn_predict_layers num_mtp_layers no_rope_layer_interval q_lora_rank",
    ),
    ("a positive number", is_number, "attn_logit_softcapping final_logit_softcapping"),
    ("a positive number", is_number, "partial_rotary_factor routed_scaling_factor"),
    ("a list of whole numbers", _is_numbers, "mlp_only_layers no_rope_layers"),
    ("true or false", lambda v: isinstance(v, bool), "tie_word_embeddings use_sliding_window norm_topk_prob "
     "attention_bias attention_out_bias mlp_bias use_bias use_qk_norm"),
    ("an object", _is_object, "rope_scaling rope_parameters"),
    ("a list of words", _is_words, "layer_types"),
)  # fmt: skip
_KINDS = {
    key: (words, check, table is _VALUES_OR_NULL)
    for table in (_VALUES, _VALUES_OR_NULL)
    for words, check, keys in table
    for key in keys.split()
}

_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def check_kinds(values: Mapping[str, Any]) -> None:
    """Refuse values that their keys cannot hold.

    Args:
        values: of a ``config.json``, with its family's defaults.

    Raises:
        UserError: naming the key.
    """
    for key in {**dict.fromkeys(_REQUIRED), **values}:
        if key in _KINDS:
            words, check, may_be_null = _KINDS[key]
            value = values.get(key)
            if not (check(value) or (may_be_null and value is None)):
                raise UserError(f"config.json: {key} must be {words}, not {shown(value)}.")
    heads, groups = values["num_attention_heads"], values.get("num_key_value_heads")
    if not values.get("head_dim") and values["hidden_size"] % heads:
        raise UserError(
            f"config.json: hidden_size {values['hidden_size']} is no multiple of num_attention_heads {heads}, and "
            "there is no head_dim."
        )
    if groups and heads % groups:
        raise UserError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}.")


def pop_number(values: dict[str, Any], key: str) -> float:
    """Take out a number that has to be there.

    Raises:
        UserError: naming the key.
    """
    value = values.pop(key, None)
    if not is_number(value):
        raise UserError(f"config.json: {key} must be a positive number, not {shown(value)}.")
    return float(value)


def whole(value: float) -> int | float:
    """A number that is whole but for rounding as an int: Megatron's flags for some take these, its code takes any."""
    return round(value) if abs(value - round(value)) < 1e-9 * abs(value) else float(value)


def shown(value: Any) -> str:
    """A value of somebody else's, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}..."
