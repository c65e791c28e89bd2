"""A model's weights as pieces of whole tensors, whatever the layout: name, place, and the local data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import nested_values

#: What the name of a layer's adapter ends in: it stands beside the layer. See ``model.lora``.
ADAPTER = "_adapter"

#: Entry of the metadata of ``sharded_state_dict`` that asks a model for all weights, also where its checkpoints hold
#: adapters alone.
WHOLE = "megatron_bdpo_whole"


def is_adapter(key: str) -> bool:
    """Whether a name of a checkpoint or a state dict is that of an adapter's weight."""
    return f"{ADAPTER}." in key


def weight_shards(model: Iterable[Any]) -> Iterator[ShardedTensor]:
    """This rank's pieces of all weights but adapters', as Megatron describes them to its checkpoints.

    Data are views, not copies.

    Args:
        model: model chunks, unwrapped.
    """
    yield from (shard for shard in _shards(model) if not is_adapter(shard.key))


def adapter_shards(model: Iterable[Any]) -> Iterator[ShardedTensor]:
    """Those of the adapters."""
    yield from (shard for shard in _shards(model) if is_adapter(shard.key))


def whole_state(chunk: Any) -> dict[str, Any]:
    """Megatron's description of all of a chunk's weights, adapters or not."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True), WHOLE: True}
    state: dict[str, Any] = chunk.sharded_state_dict(metadata=metadata)
    return state


def _shards(model: Iterable[Any]) -> Iterator[ShardedTensor]:
    for chunk in model:
        for value in nested_values(whole_state(chunk)):
            # Fused tensors (gate and up projection) come as a factory of their parts.
            parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
            yield from (part for part in parts if isinstance(part, ShardedTensor))


def own_slices(shard: ShardedTensor) -> tuple[slice, ...]:
    """What this piece is of its whole: of the one layer's and expert's tensor, not of all that checkpoints stack."""
    starts = shard.global_offset[shard.prepend_axis_num :]
    return tuple(slice(start, start + size) for start, size in zip(starts, shard.local_shape, strict=True))


def is_main_copy(shard: ShardedTensor) -> bool:
    """Whether, of all ranks that hold this piece, this one counts."""
    replica = shard.replica_id
    return replica == 0 if isinstance(replica, int) else not any(replica)
