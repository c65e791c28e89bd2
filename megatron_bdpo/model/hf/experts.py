"""Mixture-of-experts settings of a ``config.json`` to Megatron's arguments and back, for all families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.family import Config, Family
from megatron_bdpo.model.hf.tensors import Dimensions

#: Names for the number of experts. A file of Qwen3-MoE may have either of the last two, a family's default the other.
_READ = ("n_routed_experts", "num_local_experts", "num_experts")
_WRITTEN = ("n_routed_experts", "num_experts", "num_local_experts")


def expert_sizes(values: Config, layers: int) -> dict[str, Any]:
    """The fields of ``Dimensions`` that tell of experts."""
    experts = next((values[key] for key in _READ if values.get(key)), 0)
    if not experts:
        return {}
    width = values.get("moe_intermediate_size") or values["intermediate_size"]
    shared = values.get("shared_expert_intermediate_size") or (values.get("n_shared_experts") or 0) * width
    return {
        "experts": experts,
        "expert_ffn": width,
        "shared_ffn": shared,
        "sparse": _sparse_layers(values, layers),
    }


def _sparse_layers(values: Config, layers: int) -> tuple[bool, ...]:
    """Of each layer, whether it has experts; empty where all have them."""
    every, dense = values.get("decoder_sparse_step") or 1, values.get("mlp_only_layers") or []
    first = values.get("first_k_dense_replace") or 0
    sparse = tuple(layer >= first and layer not in dense and (layer + 1) % every == 0 for layer in range(layers))
    if not any(sparse):
        raise UserError("config.json: there are experts, but no layer has them.")
    return () if all(sparse) else sparse


def expert_arguments(values: Config, sizes: Dimensions) -> dict[str, Any]:
    """Megatron's arguments.

    Raises:
        UserError: a router that Megatron does not have.
    """
    if not sizes.experts:
        return {"num_experts": None}
    chosen = values.get("num_experts_per_tok")
    if not chosen or chosen > sizes.experts:
        raise UserError(f"config.json: num_experts_per_tok must lie between 1 and {sizes.experts}, not {chosen}.")
    groups, of_groups = values.get("n_group") or 1, values.get("topk_group") or 1
    if groups > 1 and (sizes.experts % groups or of_groups > groups or chosen // of_groups != 2):
        raise UserError(
            f"config.json: n_group {groups}, topk_group {of_groups}: Megatron scores a group by its best "
            f"num_experts_per_tok / topk_group experts, and the model by its best two; here they are {chosen} / "
            f"{of_groups} of {sizes.experts} / {groups}. Only n_group 1 and two experts of each chosen group can be "
            "trained here."
        )
    scale = values.get("routed_scaling_factor") or 1.0
    return {
        "num_experts": sizes.experts,
        "moe_ffn_hidden_size": sizes.expert_ffn,
        "moe_layer_freq": [int(each) for each in sizes.sparse] or 1,
        "moe_shared_expert_intermediate_size": sizes.shared_ffn or None,
        "moe_router_topk": chosen,
        # Softmax over all experts and then the largest, or over the largest only: Mixtral's, and with norm_topk_prob
        # Qwen's probabilities sum to one, which is the latter.
        "moe_router_pre_softmax": not values.get("norm_topk_prob", True),
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": of_groups if groups > 1 else None,
        "moe_router_topk_scaling_factor": None if scale == 1 else float(scale),
    }


def expert_config(family: Family, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The way back: keys of ``config.json`` from Megatron's arguments."""
    experts = arguments.get("num_experts")
    if not experts:
        return {}
    known, width = family.defaults.keys(), arguments["moe_ffn_hidden_size"]
    shared = arguments.get("moe_shared_expert_intermediate_size") or 0
    dense = _dense_layers(arguments.get("moe_layer_freq") or 1, arguments["num_layers"])
    told = {
        next(key for key in _WRITTEN if key in known): experts,
        "num_experts_per_tok": arguments["moe_router_topk"],
        "moe_intermediate_size": width,
        "norm_topk_prob": not arguments["moe_router_pre_softmax"],
        "shared_expert_intermediate_size": shared,
        "n_shared_experts": shared // width,
        "mlp_only_layers": dense,
        "first_k_dense_replace": len(dense),
        "n_group": arguments.get("moe_router_num_groups") or 1,
        "topk_group": arguments.get("moe_router_group_topk") or 1,
        "routed_scaling_factor": arguments.get("moe_router_topk_scaling_factor") or 1.0,
    }
    return {key: value for key, value in told.items() if key in known}


def _dense_layers(frequency: int | Sequence[int], layers: int) -> list[int]:
    if isinstance(frequency, int):
        return [layer for layer in range(layers) if layer % frequency]
    return [layer for layer, has_experts in enumerate(frequency) if not has_experts]
