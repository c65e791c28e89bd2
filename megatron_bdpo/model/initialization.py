"""Random weights that do not depend on the layout: a run from scratch starts alike on 1 rank and on 64.

Megatron's own initialisation draws from generators whose state depends on the parallel layout. Preference runs start
from a checkpoint, except in trials, tests and benchmarks; there, equal starts are what makes runs comparable.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_bdpo.model.shards import weight_shards


@torch.no_grad()
def initialize_by_name(model: list[Any], seed: int) -> list[Any]:
    """Redraw every matrix from a generator seeded with its name and layer, by Megatron's own init methods.

    Each rank draws the whole tensor and keeps its part. Vectors (norms, biases) already start at a constant.

    Args:
        model: this rank's chunks, before DDP.
    """
    for shard in weight_shards(model):
        assert shard.data is not None
        if shard.data.dim() >= 2:
            whole = torch.empty(shard.global_shape[shard.prepend_axis_num :], dtype=torch.float32, device="cpu")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_seed_of(shard, seed))
                _init_method(shard.key, model[0].config)(whole)
            own = shard.global_slice()[shard.prepend_axis_num :]
            shard.data.copy_(whole[own])
    return model


def _seed_of(shard: ShardedTensor, seed: int) -> int:
    layer = shard.global_offset[: shard.prepend_axis_num]
    return int.from_bytes(hashlib.sha256(f"{seed} {shard.key} {layer}".encode()).digest()[:8], "little")


def _init_method(key: str, config: Any) -> Any:
    if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return config.output_layer_init_method
    return config.embedding_init_method if "embedding" in key else config.init_method
