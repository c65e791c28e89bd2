"""Phi-3 and what came of it (Phi-3.5, Phi-4): Llama's layers, their projections stored in one."""

from __future__ import annotations

from megatron_bdpo.model.hf.family import ATTENTION, MLP, SILU, Config, Family, tensors
from megatron_bdpo.model.hf.tensors import Rule

_NO_DROPOUT = (0, None)


def _spelling(values: Config) -> Config:
    """Early files call longrope by other names, as transformers knows."""
    for key in ("rope_scaling", "rope_parameters"):
        scaling = values.get(key) or {}
        if (scaling.get("rope_type") or scaling.get("type")) in ("su", "yarn"):
            values = {**values, key: {**scaling, "rope_type": "longrope", "type": "longrope"}}
    return values


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    tensors(
        ATTENTION,
        MLP,
        {
            "self_attention.linear_qkv.weight": Rule(
                {"self_attn.qkv_proj.weight": ("queries", "keys", "keys")}, "hidden", "groups"
            ),
            "mlp.linear_fc1.weight": Rule({"mlp.gate_up_proj.weight": ("ffn", "ffn")}, "hidden"),
        },
    ),
    models="Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4-mini",
    layers="projections stored in one, part of a head rotated, windows, LongRoPE up to its original length",
    defaults={
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 4096,
    },
    only=SILU | {"resid_pdrop": _NO_DROPOUT, "embd_pdrop": _NO_DROPOUT},
    spelling=_spelling,
    own_code=("configuration_phi3.", "modeling_phi3."),
)
