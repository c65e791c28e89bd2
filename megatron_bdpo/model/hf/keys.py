"""Which keys of a ``config.json`` matter, and which values of them are honoured here.

A key is one of four kinds:

- translated: ``TRANSLATED`` for all families, ``Family.defaults`` for one;
- fixed: it makes another model of it, and only the values that leave the model as it is are taken (``FIXED``,
  ``Family.only``);
- ``GENERAL``: bookkeeping, which never changes logits;
- any other: transformers' code of the family does not read it, so it is without effect.

The last kind is safe because the other three cover everything that transformers' code of the families declares or
reads, in all releases up to ``KNOWN_RELEASE``; ``tests/hf/test_keys.py`` compares them with its sources.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.family import Config, Family
from megatron_bdpo.model.hf.kinds import shown

#: The newest release of transformers whose sources these tables were compared with.
KNOWN_RELEASE = (5, 24)

TRANSLATED = frozenset({
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
    "original_max_position_embeddings",
})  # fmt: skip

#: Why a key changes no logits in training -> keys.
_GENERAL: Mapping[str, frozenset[str]] = {
    "names, versions and types of what wrote the file": frozenset({
        "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "name_or_path",
        "_commit_hash", "_auto_class", "tokenizer_class", "model_name", "unsloth_fixed", "unsloth_version",
        "base_config_key", "is_composition", "sub_configs", "has_no_defaults_at_init", "is_heterogeneous",
        "ignore_keys_at_rope_validation", "_post_init_done",
    }),
    "ids of special tokens, which the tokenizer decides here": frozenset({
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "cls_token_id",
        "mask_token_id", "decoder_start_token_id", "bos_token", "eos_token", "pad_token", "unk_token",
    }),
    "how weights were or would be initialised": frozenset({
        "initializer_range", "initializer_factor", "init_std",
    }),
    "how a computation is done: the same numbers, but for rounding": frozenset({
        "use_cache", "pretraining_tp", "_attn_implementation", "_attn_implementation_internal",
        "_attn_implementation_autoset", "attn_implementation", "_attn_was_changed", "_experts_implementation",
        "_experts_implementation_internal", "experts_implementation", "xla_device",
        "chunk_size_feed_forward", "gradient_checkpointing", "use_bfloat16", "torchscript", "tf_legacy_loss",
        "base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "distributed_config", "fusion_config",
        "_pre_quantization_dtype",
    }),
    "the longest sequence; only kinds of rotary scaling read it that are refused": frozenset({
        "max_position_embeddings",
    }),
    "what a forward pass returns beside logits": frozenset({
        "return_dict", "use_return_dict", "output_hidden_states", "output_attentions", "_output_attentions",
        "output_router_logits",
        "keys_to_ignore_at_inference",
    }),
    "the loss of the routers, which is no part of a preference loss": frozenset({"router_aux_loss_coef"}),
    "heads of other tasks": frozenset({
        "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task", "prefix",
        "classifier_dropout", "hidden_dropout", "token_classification_bias", "summary_type", "summary_use_proj",
        "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "summary_last_dropout",
        "start_n_top", "end_n_top", "layer_norm_eps",
    }),
    "layers that predict further tokens, which are no part of the model's logits": frozenset({
        "mtp_hidden_states_first", "mtp_layer_types", "chain_hidden_post_norm", "logits_mup_width_multiplier",
        "unpadded_vocab_size", "mtp_mlp_layer_types", "mtp_per_layer_config",
    }),
    "other models' caches, read by name alone": frozenset({"number_of_conv_states", "state_size", "conv_kernel"}),
    "images, which a language model alone does not read": frozenset({
        "image_token_id", "image_token_index", "boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index",
        "mm_tokens_per_image",
    }),
    "generation": frozenset({
        "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
        "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
        "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
        "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    }),
}  # fmt: skip
GENERAL = frozenset[str]().union(*_GENERAL.values())

_OFF = (False, None)
_NONE = (None, 0)
_ONE = (1, None)

#: Keys of which a family takes these values only, unless it says otherwise. transformers reads some of them in all
#: families; by the others a config says that it is of another architecture, and then it is not trained as this one.
FIXED: Mapping[str, tuple[Any, ...]] = {
    # What attends to what.
    "is_causal": (True, None),
    "use_bidirectional_attention": _OFF,
    "sliding_window": _NONE,
    "use_sliding_window": _OFF,
    "sliding_window_pattern": (None,),
    "layer_types": ("full_attention", None),  # a list of these
    "attention_chunk_size": _NONE,
    "num_kv_shared_layers": _NONE,
    "kv_sharing_modes": (None,),
    "is_decoder": (False, True),
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": _OFF,
    # Attention itself.
    "attention_bias": _OFF,
    "qkv_bias": _OFF,
    "attention_out_bias": _OFF,
    "attention_dropout": (0, None),
    "attn_logit_softcapping": _NONE,
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "use_qk_norm": _OFF,
    "qk_layernorm": _OFF,
    "clip_qkv": (None,),
    "q_lora_rank": _NONE,
    "kv_lora_rank": _NONE,
    "attn_temperature_tuning": (False, None),
    # Positions.
    "partial_rotary_factor": _ONE,
    "rotary_pct": _ONE,
    "rope_interleaved": _OFF,
    "rope_traditional": _OFF,
    "use_mrope": _OFF,
    "no_rope_layers": (1, None),  # a list of these: 1 stands for a layer with rotary positions
    "no_rope_layer_interval": _NONE,
    "alibi": _OFF,
    "use_alibi": _OFF,
    # Scales.
    "final_logit_softcapping": _NONE,
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "lm_head_multiplier": _ONE,
    "embedding_multiplier": _ONE,
    "residual_multiplier": _ONE,
    "scale_emb": _ONE,
    "scale_depth": (None,),
    "dim_model_base": (None,),
    # Layers.
    "mlp_bias": _OFF,
    "parallel_attn": _OFF,
    "use_parallel_residual": _OFF,
    "per_layer_config": (None, {}),
    "per_layer_attributes": (None, []),
    "block_configs": (None, []),
    "pruned_heads": ({}, None),
    "hidden_size_per_layer_input": _NONE,
    "num_nextn_predict_layers": _NONE,
    "num_mtp_layers": _NONE,
    # Experts.
    "num_experts": _NONE,
    "num_local_experts": _NONE,
    "n_routed_experts": _NONE,
    "n_shared_experts": _NONE,
    "num_shared_experts": _NONE,
    "shared_expert_intermediate_size": _NONE,
    "first_k_dense_replace": _NONE,
    "mlp_layer_types": ("dense", None),  # a list of these
    "decoder_sparse_step": _ONE,
    "mlp_only_layers": ([], None),
    "router_jitter_noise": _NONE,
    "routed_scaling_factor": _ONE,
    "scoring_func": ("softmax", None),
    # Other names for keys.
    "attribute_map": ({}, None),
    # Models inside the model.
    "text_config": (None,),
    "vision_config": (None,),
    "audio_config": (None,),
    "vision_tower": (None,),
    "mm_vision_tower": (None,),
    # Other weights than those that are read.
    "transformers_weights": ("model.safetensors", "model.safetensors.index.json", None),
}


def keys_without_effect(config: Config, family: Family) -> tuple[str, ...]:
    """The keys that transformers' code of the family does not read, in the file's order.

    Raises:
        UserError: a key that matters has a value that cannot be honoured.
    """
    only = {**FIXED, **dict.fromkeys(family.defaults, ()), **family.only}
    unread = []
    for key, value in config.items():
        if key in TRANSLATED or key in GENERAL or key in CHECKED:
            continue
        if key not in only:
            unread.append(key)
        elif only[key] and not _is_among(value, only[key]):
            raise UserError(
                f"config.json: {key} is {shown(value)}, which models of the family '{family.model_type}' cannot "
                f"have here. Possible: {', '.join(map(repr, only[key]))}."
            )
    if unread and _is_later(config.get("transformers_version")):
        raise UserError(
            f"config.json: {_listed(unread)}: not known, and transformers {shown(config['transformers_version'])} "
            f"wrote them, which is newer than {_known()}. Remove what does not change the model, or install a newer "
            "megatron_bdpo."
        )
    return tuple(unread)


def line_about(unread: tuple[str, ...], family: Family) -> str:
    """The line that says which keys are without effect; empty where there are none."""
    if not unread:
        return ""
    return f"config.json: without effect, as transformers' code of '{family.model_type}' does not read it: " + _listed(
        unread
    )


def _is_among(value: Any, possible: tuple[Any, ...]) -> bool:
    """Whether it is one of these values, or a list of nothing else."""
    return value in possible or (isinstance(value, list) and bool(value) and all(each in possible for each in value))


def _is_later(release: Any) -> bool:
    parts = re.match(r"(\d{1,6})\.(\d{1,6})", release) if isinstance(release, str) else None
    return parts is not None and (int(parts[1]), int(parts[2])) > KNOWN_RELEASE


def _known() -> str:
    return ".".join(map(str, KNOWN_RELEASE))


def _listed(keys: list[str] | tuple[str, ...]) -> str:
    return ", ".join(key if key.isprintable() and len(key) <= 60 else shown(key) for key in keys)


# Keys with a check of their own --------------------------------------------------------------------------------------

#: Where a file says that its weights are quantised: transformers, early compressed-tensors, MLX.
_QUANTISATION = ("quantization_config", "compression_config", "quantization")

CHECKED = frozenset({"auto_map", *_QUANTISATION})

#: Methods that transformers undoes, and how; read in its ``quantizers`` of release 5.23. It has no way for the others.
_DEQUANTISED: Mapping[str, str] = {
    "bitsandbytes": "AutoModelForCausalLM.from_pretrained(MODEL).dequantize().save_pretrained(DIR)",
    **{
        method: f"AutoModelForCausalLM.from_pretrained(MODEL, quantization_config={config}(dequantize=True))"
        ".save_pretrained(DIR)"
        for method, config in {
            "fp8": "FineGrainedFP8Config",
            "compressed-tensors": "CompressedTensorsConfig",
            "mxfp4": "Mxfp4Config",
        }.items()
    },
}


def refuse_quantised(config: Config, family: Family) -> None:
    """Training needs the weights themselves; of some families they are made from quantised ones as they are read.

    Raises:
        UserError: the file says that they are quantised, with the way out.
    """
    for key in _QUANTISATION:
        value = config.get(key)
        if _is_quantised(value):
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            if key == "quantization_config" and method in family.dequantised:
                continue
            method = "bitsandbytes" if method is None and _loads_bits(value) else method
            way = _DEQUANTISED.get(method) if isinstance(method, str) else None
            raise UserError(
                f"config.json: {key}: the weights are quantised{f' ({shown(method)})' if method else ''}, and training "
                "needs them as they were before. Name the model that it was made from"
                + (f", or dequantise it with transformers: {way}." if way else "; transformers cannot dequantise it.")
            )


def _is_quantised(value: Any) -> bool:
    if isinstance(value, Mapping) and value.get("quant_method") == "bitsandbytes":
        return _loads_bits(value)  # models that were merged in 16 bits keep the entry with both switches off
    return bool(value)


def _loads_bits(value: Any) -> bool:
    names = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
    return isinstance(value, Mapping) and any(value.get(name) for name in names)


def refuse_own_code(config: Config, family: Family) -> None:
    """A file may name code beside it that computes the model.

    Raises:
        UserError: it does; code for the tokenizer alone is no matter.
    """
    named = config.get("auto_map")
    if isinstance(named, Mapping):
        named = [each for name, each in named.items() if "Tokenizer" not in str(name) and "Processor" not in str(name)]
    if isinstance(named, list):
        named = [each for each in named if not str(each).startswith(family.own_code)]
    if named:
        raise UserError(
            f"config.json: auto_map: the model brings code of its own ({shown(named)}), which may compute something "
            f"else. Remove the key if {family.architecture} of transformers gives the same logits."
        )
