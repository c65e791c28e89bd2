"""Hugging Face models with the weights of a tiny job, by the package's own tables, which logits prove elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

VOCABULARY = 1024  # of the example tokenizer; Megatron pads it

#: Megatron's arguments that make ``TINY_MODEL`` a small sister of the family, rope settings of its releases included.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rotary_base": 500_000, "use_rope_scaling": True, "rope_scaling_factor": 8.0},
    "qwen2": {"rotary_base": 1_000_000, "add_qkv_bias": True, "layernorm_epsilon": 1e-6},
    "qwen3": {"rotary_base": 1_000_000, "qk_layernorm": True, "layernorm_epsilon": 1e-6, "kv_channels": 16},
}

Arguments = Mapping[str, Any]
Tensors = dict[str, np.ndarray]


def build_model(family: str, arguments: Arguments, weights: Tensors) -> Any:
    """The family's ``...ForCausalLM`` in fp32 on the CPU.

    Args:
        arguments: Megatron's, by name, as far as they describe the model.
        weights: Megatron's whole tensors (``jobs.assemble``).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**_config(family, arguments))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    mapped = to_hugging_face(family, weights, arguments)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == mapped.keys()
    for name, parameter in parameters.items():
        assert parameter.shape == mapped[name].shape, name
        parameter.data.copy_(torch.from_numpy(mapped[name]))
    return model


def _config(family: str, arguments: Arguments) -> dict[str, Any]:
    from megatron_bdpo.model.hf.config import write_config

    return write_config(family, {"rotary_base": 10_000, "layernorm_epsilon": 1e-5, **arguments}, VOCABULARY)


def to_hugging_face(family: str, tensors: Tensors, arguments: Arguments) -> Tensors:
    """Megatron's whole tensors, weights or gradients, under Hugging Face's names. Every one has to have a rule."""
    return renamed(tensors, _config(family, arguments))


def renamed(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """The same, of the model that a ``config.json`` describes."""
    from megatron_bdpo.model.hf.config import read_config
    from megatron_bdpo.model.hf.export import split
    from megatron_bdpo.model.hf.tensors import place_of

    weights = read_config(config, reward_models=True).weights
    mapped: Tensors = {}
    for key, value in tensors.items():
        stacked = value.ndim - weights.matrix_axes(place_of(key, ()).key)
        for leading in itertools.product(*map(range, value.shape[:stacked])):  # Megatron stacks layers
            parts = split(place_of(key, leading), torch.from_numpy(value[leading]), weights)
            mapped |= {name: part.numpy() for name, part in parts.items()}
    return mapped


# Log-probs -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_log_probs(model: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """log p of each response token after the prompt and the tokens before it, nothing packed, nothing shared."""
    return response_log_probs(model, prompt, response).numpy()


def response_log_probs(model: Any, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """The same with its graph, [length] float64."""
    tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    log_probs = model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return log_probs.gather(1, tokens[len(prompt) :, None])[:, 0]
