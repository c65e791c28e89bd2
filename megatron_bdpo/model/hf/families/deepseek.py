"""DeepSeek-V3 and R1, Kimi K2, Moonlight: multi-latent attention, experts in groups, stored in FP8 by blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.block_scaled import BlockScaled
from megatron_bdpo.model.hf.family import (
    DENSE_MLP,
    EXPERT_BIAS,
    SIGMOID_ROUTER,
    SIGMOID_ROUTER_ARGUMENTS,
    SILU,
    Config,
    Family,
    experts,
    shared_expert,
    tensors,
)
from megatron_bdpo.model.hf.kinds import shown
from megatron_bdpo.model.hf.tensors import Rule

#: Of transformers' class, whatever rms_norm_eps says of the others.
_LATENT_EPSILON = 1e-6

_ATTENTION = {
    "input_layernorm.weight": Rule({"input_layernorm.weight": "hidden"}),
    "self_attention.linear_kv_down_proj.weight": Rule(
        {"self_attn.kv_a_proj_with_mqa.weight": "latent_and_rotated"}, "hidden"
    ),
    "self_attention.kv_layernorm.weight": Rule({"self_attn.kv_a_layernorm.weight": "latent"}),
    "self_attention.linear_kv_up_proj.weight": Rule({"self_attn.kv_b_proj.weight": "keys_and_values"}, "latent"),
    "self_attention.linear_proj.weight": Rule({"self_attn.o_proj.weight": "hidden"}, "values"),
}
_QUERIES = {"self_attention.linear_q_proj.weight": Rule({"self_attn.q_proj.weight": "queries"}, "hidden")}
_QUERIES_FROM_A_LATENT = {
    "self_attention.linear_q_down_proj.weight": Rule({"self_attn.q_a_proj.weight": "query_latent"}, "hidden"),
    "self_attention.q_layernorm.weight": Rule({"self_attn.q_a_layernorm.weight": "query_latent"}),
    "self_attention.linear_q_up_proj.weight": Rule({"self_attn.q_b_proj.weight": "queries"}, "query_latent"),
}


def _rules(values: Config) -> Mapping[str, Rule]:
    return tensors(
        _ATTENTION,
        _QUERIES_FROM_A_LATENT if values["q_lora_rank"] else _QUERIES,
        DENSE_MLP,
        experts("mlp", "gate_proj", "up_proj", "down_proj"),
        shared_expert("mlp.shared_experts") if values["n_shared_experts"] else {},
        EXPERT_BIAS,
    )


def _sizes(values: Config) -> dict[str, Any]:
    plain, rotated = values["qk_nope_head_dim"], values["qk_rope_head_dim"]
    return {
        "head": plain + rotated,
        "query_latent": values["q_lora_rank"] or 0,
        "latent": values["kv_lora_rank"],
        "plain_part": plain,
        "rotated_part": rotated,
        "value": values["v_head_dim"],
    }


def _arguments(values: Config) -> dict[str, Any]:
    heads, groups = values["num_attention_heads"], values.get("num_key_value_heads")
    if groups not in (None, heads):
        raise UserError(
            f"config.json: num_key_value_heads is {groups}, num_attention_heads {heads}: in multi-latent attention "
            "every head has keys and values of its own."
        )
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("truncate") is False or bool(rope.get("mscale")) is not bool(rope.get("mscale_all_dim")):
        raise UserError(
            f"config.json: rotary settings {shown(rope)}: of multi-latent attention Megatron's YaRN rounds its range, "
            "and mscale and mscale_all_dim are there together or not at all."
        )
    scales = {} if rope.get("factor") else {"rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    return {
        "multi_latent_attention": True,
        "group_query_attention": False,
        "num_query_groups": heads,
        "q_lora_rank": values["q_lora_rank"],
        "kv_lora_rank": values["kv_lora_rank"],
        "qk_head_dim": values["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": values["qk_rope_head_dim"],
        "v_head_dim": values["v_head_dim"],
        "kv_channels": values["qk_nope_head_dim"] + values["qk_rope_head_dim"],
        "position_embedding_type": "rope",  # of the layers' own
        "rope_type": "yarn" if rope.get("factor") else "rope",
        **scales,
        "latent_norm_epsilon": None if values["rms_norm_eps"] == _LATENT_EPSILON else _LATENT_EPSILON,
    }


def _config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "q_lora_rank": arguments["q_lora_rank"],
        "kv_lora_rank": arguments["kv_lora_rank"],
        "qk_nope_head_dim": arguments["qk_head_dim"],
        "qk_rope_head_dim": arguments["qk_pos_emb_head_dim"],
        "v_head_dim": arguments["v_head_dim"],
        "head_dim": arguments["qk_pos_emb_head_dim"],
        "rope_interleave": True,
    }


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    _rules,
    models="DeepSeek-V3, R1, V3.1; Moonlight",
    layers="latent attention, YaRN, sigmoid router with biases and groups, shared experts; FP8 blocks are read",
    arguments=SIGMOID_ROUTER_ARGUMENTS | {"qk_layernorm": True},
    defaults={
        **SIGMOID_ROUTER,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_head_dim": None,  # the sum of the two
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 0,
        "num_mtp_layers": 0,
    },
    only=SILU
    | {
        "norm_topk_prob": (True,),
        "rope_interleave": (True, None),
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
        "moe_layer_freq": (1, None),
    },
    own_sizes=_sizes,
    own_arguments=_arguments,
    own_config=_config,
    own_code=("configuration_deepseek.", "modeling_deepseek."),
    unpack=BlockScaled,
    dequantised=frozenset({"fp8"}),
    no_adapters="its projections of queries, keys and values are others than those that adapters stand beside",
)

#: The same layers under another name, with code of its own that calls itself DeepSeek's.
KIMI_K2 = dataclasses.replace(
    DEEPSEEK_V3, model_type="kimi_k2", models="Kimi K2", layers="as DeepSeek-V3", exported_as="deepseek_v3"
)
