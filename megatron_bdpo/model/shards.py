"""A model's weights as pieces of whole tensors, whatever the layout: name, place, and the local data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import nested_values


def weight_shards(model: Iterable[Any]) -> Iterator[ShardedTensor]:
    """This rank's pieces of all weights, as Megatron describes them to its checkpoints; data are views, not copies.

    Args:
        model: model chunks, unwrapped.
    """
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for chunk in model:
        for value in nested_values(chunk.sharded_state_dict(metadata=metadata)):
            # Fused tensors (gate and up projection) come as a factory of their parts.
            parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
            yield from (part for part in parts if isinstance(part, ShardedTensor))


def is_main_copy(shard: ShardedTensor) -> bool:
    """Whether, of all ranks that hold this piece, this one counts."""
    replica = shard.replica_id
    return replica == 0 if isinstance(replica, int) else not any(replica)
