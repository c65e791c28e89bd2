"""gpt-oss: sinks, windows in every second layer, biases everywhere, experts with a clamped gate, stored in MXFP4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bdpo.model.hf.family import (
    ATTENTION,
    QKV_BIAS,
    SILU,
    Config,
    Family,
    experts,
    tensors,
)
from megatron_bdpo.model.hf.packed import PackedExperts, UnpackedExperts
from megatron_bdpo.model.hf.tensors import Rule

_EXPERT = "mlp.experts.{expert}."
_SINKS_AND_BIASES = {
    "self_attention.core_attention.softmax_offset": Rule({"self_attn.sinks": "heads"}),
    "self_attention.linear_proj.bias": Rule({"self_attn.o_proj.bias": "hidden"}),
    "mlp.router.weight": Rule({"mlp.router.weight": "experts"}, "hidden"),
    "mlp.router.bias": Rule({"mlp.router.bias": "experts"}),
    "mlp.experts.experts.linear_fc1.bias": Rule({f"{_EXPERT}gate_proj.bias": "ffn", f"{_EXPERT}up_proj.bias": "ffn"}),
    "mlp.experts.experts.linear_fc2.bias": Rule({f"{_EXPERT}down_proj.bias": "hidden"}),
}

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _arguments(values: Config) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "ffn_hidden_size": values["intermediate_size"],
        "activation_func_clamp_value": float(values["swiglu_limit"]),
    }
    if values["layer_types"] is None and values["sliding_window"]:
        slides = [1 - layer % 2 for layer in range(values["num_hidden_layers"])]
        arguments["window_attn_skip_freq"] = slides if 0 in slides else None
    return arguments


def _config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    frequency, layers = arguments["window_attn_skip_freq"], arguments["num_layers"]
    slides = [bool(arguments["window_size"])] * layers if frequency is None else map(bool, frequency)
    return {
        "num_local_experts": arguments["num_experts"],
        "swiglu_limit": arguments["activation_func_clamp_value"],
        "layer_types": ["sliding_attention" if each else "full_attention" for each in slides],
        "attention_bias": True,
    }


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    tensors(ATTENTION, QKV_BIAS, experts("mlp", "gate_proj", "up_proj", "down_proj"), _SINKS_AND_BIASES),
    models="gpt-oss 20B, 120B",
    layers="attention sinks, windows in every other layer, biases, clamped gate, YaRN; MXFP4 is read",
    arguments={
        "softmax_type": "learnable",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "swiglu": False,
        "quick_geglu": True,  # gate * sigmoid(1.702 gate)
        "glu_linear_offset": 1.0,
        "moe_router_pre_softmax": False,
    },
    defaults={
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_scaling": _YARN,
        "head_dim": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "num_experts": None,  # transformers' other name for it
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": None,
        "swiglu_limit": 7.0,
    },
    only=SILU | {"attention_bias": (True,), "swiglu_alpha": (1.702,)},
    own_arguments=_arguments,
    own_config=_config,
    unpack=UnpackedExperts,
    pack=PackedExperts,
    dequantised=frozenset({"mxfp4"}),
    no_adapters="PEFT keeps the adapters of its stacked experts in a form that is not mapped",
)
