"""Hugging Face models with the weights of a tiny job: one mapping of names for Llama, Qwen2 and Qwen3.

The families differ in which tensors they have (``FAMILIES``), not in how these are named or stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

VOCABULARY = 1024  # of the example tokenizer; Megatron pads it

#: Megatron's arguments that make ``TINY_MODEL`` a small sister of the family, rope settings of its releases included.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"rotary_base": 500_000, "use_rope_scaling": True, "rope_scaling_factor": 8.0},
    "Qwen2": {"rotary_base": 1_000_000, "add_qkv_bias": True, "layernorm_epsilon": 1e-6},
    "Qwen3": {"rotary_base": 1_000_000, "qk_layernorm": True, "layernorm_epsilon": 1e-6, "kv_channels": 16},
}

Arguments = Mapping[str, Any]
Tensors = dict[str, np.ndarray]


def build_model(family: str, arguments: Arguments, weights: Tensors) -> Any:
    """The family's ``...ForCausalLM`` in fp32 on the CPU.

    Args:
        arguments: Megatron's, by name, as far as they describe the model.
        weights: Megatron's whole tensors (``jobs.assemble``).
    """
    import transformers

    model = getattr(transformers, f"{family}ForCausalLM")(_config(family, arguments)).float().eval()
    mapped = to_hugging_face(weights, arguments)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == mapped.keys()
    for name, parameter in parameters.items():
        assert parameter.shape == mapped[name].shape, name
        parameter.data.copy_(torch.from_numpy(mapped[name]))
    return model


def _config(family: str, arguments: Arguments) -> Any:
    import transformers

    optional = {"head_dim": arguments["kv_channels"]} if "kv_channels" in arguments else {}
    return getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=arguments["hidden_size"],
        intermediate_size=arguments["ffn_hidden_size"],
        num_hidden_layers=arguments["num_layers"],
        num_attention_heads=arguments["num_attention_heads"],
        num_key_value_heads=arguments["num_query_groups"],
        rms_norm_eps=arguments.get("layernorm_epsilon", 1e-5),
        rope_parameters=_rope(arguments),
        max_position_embeddings=32_768,
        tie_word_embeddings=not arguments["untie_embeddings_and_output_weights"],
        attn_implementation="eager",
        **optional,
    )


def _rope(arguments: Arguments) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(arguments.get("rotary_base", 10_000))}
    if arguments.get("use_rope_scaling"):
        rope |= {
            "rope_type": "llama3",
            "factor": arguments["rope_scaling_factor"],
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return rope


# Names ---------------------------------------------------------------------------------------------------------------


def to_hugging_face(tensors: Tensors, arguments: Arguments) -> Tensors:
    """Megatron's whole tensors, weights or gradients, under Hugging Face's names. Every one has to have a rule."""
    mapped: Tensors = {}
    for name, value in tensors.items():
        if name in _OUTSIDE:
            mapped |= _apply(_OUTSIDE[name], value, arguments)
            continue
        rule = _LAYER[name.removeprefix("decoder.layers.")]
        for layer, own in enumerate(value):  # Megatron stacks layers
            parts = _apply(rule, own, arguments)
            mapped |= {f"model.layers.{layer}.{part}": part_value for part, part_value in parts.items()}
    return mapped


Split = Callable[[np.ndarray, Arguments], Sequence[np.ndarray]]
Rule = tuple[Split, tuple[str, ...]]


def _apply(rule: Rule, value: np.ndarray, arguments: Arguments) -> Tensors:
    split, names = rule
    return dict(zip(names, split(value, arguments), strict=True))


def _as_it_is(value: np.ndarray, arguments: Arguments) -> list[np.ndarray]:
    return [value]


def _without_padding(value: np.ndarray, arguments: Arguments) -> list[np.ndarray]:
    return [value[:VOCABULARY]]


def _by_group(value: np.ndarray, arguments: Arguments) -> list[np.ndarray]:
    """Rows are fused per group of heads: its queries, one key, one value."""
    groups, inner = arguments["num_query_groups"], value.shape[1:]
    queries = arguments["num_attention_heads"] // groups
    grouped = value.reshape(groups, queries + 2, -1, *inner)
    return [part.reshape(-1, *inner) for part in np.split(grouped, [queries, queries + 1], axis=1)]


def _halves(value: np.ndarray, arguments: Arguments) -> list[np.ndarray]:
    return np.split(value, 2)


_OUTSIDE: dict[str, Rule] = {
    "embedding.word_embeddings.weight": (_without_padding, ("model.embed_tokens.weight",)),
    "output_layer.weight": (_without_padding, ("lm_head.weight",)),
    "decoder.final_layernorm.weight": (_as_it_is, ("model.norm.weight",)),
}

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_LAYER: dict[str, Rule] = {
    "self_attention.linear_qkv.layer_norm_weight": (_as_it_is, ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": (_by_group, tuple(f"{name}.weight" for name in _QKV)),
    "self_attention.linear_qkv.bias": (_by_group, tuple(f"{name}.bias" for name in _QKV)),
    "self_attention.q_layernorm.weight": (_as_it_is, ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": (_as_it_is, ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": (_as_it_is, ("self_attn.o_proj.weight",)),
    "mlp.linear_fc1.layer_norm_weight": (_as_it_is, ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": (_halves, ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": (_as_it_is, ("mlp.down_proj.weight",)),
}


# Log-probs -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_log_probs(model: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """log p of each response token after the prompt and the tokens before it, nothing packed, nothing shared."""
    tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    log_probs = model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return log_probs.gather(1, tokens[len(prompt) :, None])[:, 0].numpy()
