"""``config.json`` to Megatron's arguments and back, by the families' tables.

A key that matters and cannot be honoured is refused by name (``keys``). Configurations are read as JSON, so that every
release of transformers writes what is understood here; the two spellings of rotary settings (``rope_theta`` and
``rope_scaling``, or ``rope_parameters`` since release 5) included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint
from megatron_bdpo.model.hf.classifier import classifier_of, classifier_rules, is_classifier, refuse_other_labels
from megatron_bdpo.model.hf.experts import expert_arguments, expert_config, expert_sizes
from megatron_bdpo.model.hf.families import FAMILIES, REFUSED
from megatron_bdpo.model.hf.family import OUTPUT_LAYER, Config, Family
from megatron_bdpo.model.hf.keys import TRANSLATED, keys_without_effect, line_about, refuse_own_code, refuse_quantised
from megatron_bdpo.model.hf.kinds import check_kinds, shown
from megatron_bdpo.model.hf.rope import rope_arguments, rope_scaling
from megatron_bdpo.model.hf.tensors import Dimensions, WeightMap
from megatron_bdpo.model.layer_options import LayerOptions

#: Megatron's arguments that are the same for all families, unless a family says otherwise.
SHARED_ARGUMENTS: Mapping[str, Any] = {
    "group_query_attention": True,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "swiglu": True,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "softmax_type": "vanilla",
    "multi_latent_attention": False,
    "squared_relu": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "apply_residual_connection_post_layernorm": False,
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    **asdict(LayerOptions()),
}

#: What transformers assumes for an absent key.
DEFAULTS: Mapping[str, Any] = {"tie_word_embeddings": False, "rope_theta": 10_000.0}

#: Names for the number of layers that predict further tokens. They are no part of the model's log-probs.
_FURTHER = ("num_nextn_predict_layers", "num_mtp_layers")
_LEFT_OUT = (
    "config.json: the model's layers for multi-token prediction ({}) are neither trained nor exported: they predict "
    "what the model said before it was trained."
)

#: Probabilities that files of some families hold though their models are used without.
DROPOUTS = ("attention_dropout", "residual_dropout")
_NO_DROPOUT = (
    "config.json: {}: left out, as in evaluation: with dropout the policy would differ from its own reference at the "
    "first step."
)


@dataclass(frozen=True)
class Architecture:
    """A model, as both sides describe it."""

    family: Family
    arguments: Mapping[str, Any]
    """Megatron's, by name."""
    weights: WeightMap
    left_out: tuple[str, ...] = ()
    """How the names of tensors begin that files have beside the model's: of layers that predict further tokens."""
    is_reward_model: bool = False
    """It has a scalar head and no output layer."""
    remark: str = field(default="", compare=False)
    """A line for the user about keys of the configuration that are without effect; empty if there are none."""

    def open_weights(self, directory: Path) -> HuggingFaceCheckpoint:
        """The model's files, whose tensors have the names and the shapes of ``weights``, however they are stored.

        Raises:
            UserError: a file is missing, truncated or no safetensors file.
        """
        checkpoint = HuggingFaceCheckpoint.open(directory)
        return self.family.unpack(checkpoint, self.weights.sizes) if self.family.unpack else checkpoint


def read_config(config: Config, *, reward_models: bool = False) -> Architecture:
    """The architecture that a ``config.json`` describes.

    Args:
        reward_models: take these, too.

    Raises:
        UserError: a family, key or value that cannot be honoured, by name.
    """
    is_reward_model = reward_models and is_classifier(config)
    family = _family(config, is_reward_model=is_reward_model)
    refuse_quantised(config, family)
    refuse_own_code(config, family)
    unread = keys_without_effect(config, family)
    # Another family's key must not be taken for one of this family.
    read = {key: value for key, value in config.items() if key in TRANSLATED or key in family.defaults}
    values = {**DEFAULTS, **family.defaults, **read}
    check_kinds(values)
    values = dict(family.spelling(values))
    sizes = dataclasses.replace(_sizes(values), **family.own_sizes(values))
    arguments = (
        dict(SHARED_ARGUMENTS)
        | _size_arguments(sizes, values)
        | rope_arguments(values)
        | _window_arguments(values, sizes.layers)
        | expert_arguments(values, sizes)
        | dict(family.arguments)
        | dict(family.own_arguments(values))
    )
    tied = values["tie_word_embeddings"]
    rules = {key: rule for key, rule in family.rules_of(values).items() if not (tied and key == OUTPUT_LAYER)}
    if is_reward_model:
        refuse_other_labels(config)
        rules = classifier_rules(rules)
    further = max(values.get(key) or 0 for key in _FURTHER)
    left_out = tuple(f"model.layers.{sizes.layers + number}." for number in range(further))
    dropped = ", ".join(key for key in DROPOUTS if config.get(key))
    remarks = [
        line_about(unread, family),
        _LEFT_OUT.format(further) if further else "",
        _NO_DROPOUT.format(dropped) if dropped else "",
    ]
    remark = "\n".join(filter(None, remarks))
    return Architecture(family, arguments, WeightMap(rules, sizes), left_out, is_reward_model, remark)


def _family(config: Config, *, is_reward_model: bool) -> Family:
    name = str(config.get("model_type"))
    mapped = f"Families that can: {', '.join(sorted(FAMILIES))}."
    if name in REFUSED:
        raise UserError(f"models of the family '{name}' cannot be trained here: {REFUSED[name]}. {mapped}")
    if name not in FAMILIES:
        raise UserError(f"models of the family {shown(name)} (model_type) cannot be trained here: not mapped. {mapped}")
    family = FAMILIES[name]
    expected = classifier_of(family) if is_reward_model else family.architecture
    architectures = config.get("architectures") or [expected]
    # The first conversions of Llama write LLaMAForCausalLM, those of ERNIE Ernie4_5_ForCausalLM.
    if not isinstance(architectures, list) or [_letters(each) for each in architectures] != [_letters(expected)]:
        raise UserError(
            f"config.json: architectures {shown(architectures)} is no language model of the family '{name}', which is "
            f"{family.architecture}."
            + (" Reward models are trained with --objective reward." if is_classifier(config) else "")
        )
    return family


def _letters(name: Any) -> str:
    return str(name).lower().replace("_", "")


# Sizes ---------------------------------------------------------------------------------------------------------------


def _sizes(values: Config) -> Dimensions:
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    return Dimensions(
        layers=values["num_hidden_layers"],
        hidden=hidden,
        ffn=values["intermediate_size"],
        heads=heads,
        groups=values.get("num_key_value_heads") or heads,
        head=values.get("head_dim") or hidden // heads,
        vocab=values["vocab_size"],
        **expert_sizes(values, values["num_hidden_layers"]),
    )


def _size_arguments(sizes: Dimensions, values: Config) -> dict[str, Any]:
    return {
        "num_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "ffn_hidden_size": values["intermediate_size"],
        "num_attention_heads": sizes.heads,
        "num_query_groups": sizes.groups,
        "kv_channels": sizes.head,
        "layernorm_epsilon": float(values["rms_norm_eps"]),
        "untie_embeddings_and_output_weights": not values["tie_word_embeddings"],
    }


# Windows -------------------------------------------------------------------------------------------------------------


def _window_arguments(values: Config, layers: int) -> dict[str, Any]:
    """Hugging Face's window counts the token itself; Megatron's is how far back it may look."""
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.get("max_window_layers") or 0 if "use_sliding_window" in values else 0
        kinds = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise UserError(f"config.json: layer_types {kinds} are not {layers} times sliding_attention or full_attention.")
    slides = [int(kind == "sliding_attention") for kind in kinds]
    if not any(slides):
        return {"window_size": None, "window_attn_skip_freq": None}
    if not window:
        raise UserError("config.json: layer_types has sliding_attention, but there is no sliding_window.")
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": None if all(slides) else slides}


# Back ----------------------------------------------------------------------------------------------------------------


def write_config(model_type: str, arguments: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The ``config.json`` of a model that Megatron's arguments describe, in the spelling that all releases read.

    Raises:
        UserError: the arguments describe no model of that family.
    """
    if model_type not in FAMILIES:
        raise UserError(f"unknown family '{model_type}'. Known: {', '.join(sorted(FAMILIES))}.")
    config = _unchecked_config(FAMILIES[model_type], arguments, vocab_size)
    differing = differences(read_config(config).arguments, arguments)
    if differing:
        raise UserError(f"no model of the family '{model_type}' has these settings: {'; '.join(differing)}.")
    return config


def _unchecked_config(family: Family, arguments: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    window = arguments.get("window_size")
    heads, hidden = arguments["num_attention_heads"], arguments["hidden_size"]
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": vocab_size,
        "num_hidden_layers": arguments["num_layers"],
        "hidden_size": hidden,
        "intermediate_size": arguments["ffn_hidden_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": arguments["num_query_groups"],
        "head_dim": arguments.get("kv_channels") or hidden // heads,
        "hidden_act": family.only["hidden_act"][0],
        "rms_norm_eps": arguments["layernorm_epsilon"],
        "rope_theta": float(arguments["rotary_base"]),
        "tie_word_embeddings": not arguments["untie_embeddings_and_output_weights"],
    }
    if scaling := rope_scaling(arguments):
        config["rope_scaling"] = scaling
    if "sliding_window" in family.defaults:
        config["sliding_window"] = window[0] + 1 if window else None
    if "use_sliding_window" in family.defaults and window:
        config["use_sliding_window"] = True
        if "max_window_layers" in family.defaults:
            config["max_window_layers"] = 0
        if "layer_types" in family.defaults:
            slides = arguments.get("window_attn_skip_freq") or [1] * arguments["num_layers"]
            config["layer_types"] = ["sliding_attention" if each else "full_attention" for each in slides]
    told = {
        "partial_rotary_factor": arguments.get("rotary_percent"),
        "attention_bias": bool(arguments.get("add_qkv_bias")),
        "attention_out_bias": bool(arguments.get("attention_output_bias")),
        "mlp_bias": bool(arguments.get("mlp_bias")),
    }
    config |= {key: value for key, value in told.items() if key in family.defaults}
    return config | expert_config(family, arguments) | dict(family.own_config(arguments))


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Arguments that are found, but not as expected: 'name: found, but expected'."""
    return [
        f"{name}: {found[name]!r}, but {value!r} expected"
        for name, value in expected.items()
        if name in found and _plain(found[name]) != _plain(value)
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def exported(config: Config, dtype: str) -> dict[str, Any]:
    """The configuration of what is written: with the weights' data type, and without layers that are left out."""
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    written = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    family = FAMILIES.get(config.get("model_type", ""))
    if family and family.exported_as:
        written["model_type"] = family.exported_as
    return {**written, **{key: 0 for key in _FURTHER if config.get(key)}, name: dtype}
