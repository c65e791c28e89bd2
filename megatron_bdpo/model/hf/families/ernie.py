"""ERNIE 4.5, dense: Llama's layers whose rotary embedding turns neighbouring pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bdpo.model.hf.family import ATTENTION, MLP, SILU, Config, Family, bias_arguments, bias_rules, tensors


def _biases(values: Config) -> dict[str, bool]:
    """One key for those of all projections."""
    return dict.fromkeys(("attention_bias", "mlp_bias"), bool(values["use_bias"]))


def _config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_bias": bool(arguments["add_qkv_bias"])}


ERNIE4_5 = Family(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    lambda values: tensors(ATTENTION, MLP, bias_rules(_biases(values))),
    models="ERNIE 4.5 0.3B",
    layers="neighbouring dimensions rotated",
    arguments={"rotary_interleaved": True},
    defaults={
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    only=SILU,
    own_arguments=lambda values: bias_arguments(_biases(values)),
    own_config=_config,
)
