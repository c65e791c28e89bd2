"""Random weights that do not depend on the layout: a run from scratch starts alike on 1 rank and on 64.

Megatron's own initialisation draws from generators whose state depends on the parallel layout. Preference runs start
from a checkpoint, except in trials, tests and benchmarks; there, equal starts are what makes runs comparable.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_bdpo.model.shards import own_slices, weight_shards


def initialize_by_name(model: list[Any], seed: int, only: Collection[str] | None = None) -> list[Any]:
    """Redraw every matrix from a generator seeded with its name and layer, by Megatron's own init methods.

    Vectors (norms, biases) already start at a constant.

    Args:
        model: this rank's chunks, before DDP.
        only: names of those that are redrawn; None: all.
    """
    shards = (shard for shard in weight_shards(model) if only is None or shard.key in only)
    matrices = (shard for shard in shards if shard.data is not None and shard.data.dim() >= 2)
    fill_by_name(matrices, functools.partial(_init_method, config=model[0].config), seed)
    return model


@torch.no_grad()
def fill_by_name(
    shards: Iterable[ShardedTensor], method_of: Callable[[str], Callable[[torch.Tensor], Any]], seed: int
) -> None:
    """Draw weights from generators seeded with their names and layers. Each rank draws the whole tensor and keeps its
    part.

    Args:
        method_of: a weight's name -> what fills the whole tensor.
    """
    for shard in shards:
        assert shard.data is not None
        whole = torch.empty(shard.global_shape[shard.prepend_axis_num :], dtype=torch.float32, device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_seed_of(shard, seed))  # and no other device's
            method_of(shard.key)(whole)
        shard.data.copy_(whole[own_slices(shard)])


def _seed_of(shard: ShardedTensor, seed: int) -> int:
    layer = shard.global_offset[: shard.prepend_axis_num]
    return int.from_bytes(hashlib.sha256(f"{seed} {shard.key} {layer}".encode()).digest()[:8], "little")


def _init_method(key: str, config: Any) -> Any:
    if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return config.output_layer_init_method
    return config.embedding_init_method if "embedding" in key else config.init_method
