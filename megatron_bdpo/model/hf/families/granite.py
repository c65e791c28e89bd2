"""Granite: Llama's layers, with a scale for embeddings, attention scores, residuals and logits each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bdpo.model.hf.family import ATTENTION, MLP, SILU, Config, Family, bias_arguments, bias_rules, tensors
from megatron_bdpo.model.hf.kinds import whole


def _unless_one(value: float) -> float | None:
    return None if value == 1 else float(value)


def _arguments(values: Config) -> dict[str, Any]:
    return {
        **bias_arguments(values),
        "attention_scale": float(values["attention_multiplier"]),
        "embedding_multiplier": _unless_one(values["embedding_multiplier"]),
        "residual_multiplier": _unless_one(values["residual_multiplier"]),
        "logit_scale": _unless_one(1 / values["logits_scaling"]),
    }


def _config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention_multiplier": arguments["attention_scale"],
        "embedding_multiplier": arguments["embedding_multiplier"] or 1.0,
        "residual_multiplier": arguments["residual_multiplier"] or 1.0,
        "logits_scaling": whole(1 / (arguments["logit_scale"] or 1.0)),
    }


GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    lambda values: tensors(ATTENTION, MLP, bias_rules(values)),
    models="Granite 3.0 to 3.3, dense",
    layers="multipliers of embeddings, scores, residuals, logits",
    defaults={
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    only=SILU,
    own_arguments=_arguments,
    own_config=_config,
)
