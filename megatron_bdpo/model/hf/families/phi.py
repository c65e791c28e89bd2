"""Phi-3 and what came of it (Phi-3.5, Phi-4): Llama's layers, their projections stored in one."""

from __future__ import annotations

from megatron_bdpo.model.hf.family import ATTENTION, MLP, SILU, Family, tensors
from megatron_bdpo.model.hf.tensors import Rule

_NO_DROPOUT = (0, None)

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
    defaults={"rms_norm_eps": 1e-5, "sliding_window": None, "partial_rotary_factor": 1.0},
    only=SILU | {"resid_pdrop": _NO_DROPOUT, "embd_pdrop": _NO_DROPOUT},
)
