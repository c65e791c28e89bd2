"""Hugging Face weights into the ranks' shards: each rank reads the rows and columns that it holds, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint
from megatron_bdpo.model.hf.tensors import WeightMap, place_of
from megatron_bdpo.model.shards import own_slices, weight_shards


@torch.no_grad()
def load_weights(
    model: list[Any],
    checkpoint: HuggingFaceCheckpoint,
    weights: WeightMap,
    pause: Callable[[], None] = lambda: None,
    left: Collection[str] = (),
) -> None:
    """Fill the model's weights. Not collective: every rank reads for itself.

    Host memory beside the model: the pages of one file that are mapped while its rows are copied.

    Args:
        model: this rank's chunks, unwrapped.
        pause: called before each weight; what it raises ends the reading.
        left: names of weights that stay as they are.

    Raises:
        UserError: the model is not of the architecture that ``weights`` describes, or a file cannot be read.
    """
    for shard in weight_shards(model):
        pause()
        if shard.key in left:
            continue
        fill(shard, checkpoint, weights)
    checkpoint.close()


def fill(shard: ShardedTensor, checkpoint: HuggingFaceCheckpoint, weights: WeightMap) -> None:
    """Read one piece of a weight.

    Raises:
        UserError: as :func:`load_weights`.
    """
    assert shard.data is not None
    stacked = shard.prepend_axis_num
    place = place_of(shard.key, shard.global_offset[:stacked])
    if place.key not in weights.rules:
        raise UserError(f"the model has the weight {shard.key}, for which its Hugging Face family has no tensor.")
    own, *columns = own_slices(shard)
    target, first = shard.data.detach(), 0
    for part in weights.parts(place):
        # The part is at rows first ... first + length of the whole tensor; this shard has own.start ... own.stop.
        begin, end = max(first, own.start), min(first + part.stop - part.start, own.stop)
        if begin < end:
            offset = part.start - first
            read = checkpoint.rows(part.name, begin + offset, end + offset, tuple(columns))
            target[begin - own.start : end - own.start].copy_(read)
        first += part.stop - part.start
    rows = shard.global_shape[stacked]
    if shard.allow_shape_mismatch and rows > first:
        target[max(first - own.start, 0) :].zero_()  # rows that pad the vocabulary
    elif rows != first:
        raise UserError(f"the model's weight {shard.key} has {rows} rows, those of its Hugging Face family {first}.")
