"""The weights of a live model as whole tensors on one rank, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, distributed

from megatron_bdpo.model.hf.tensors import Place, place_of
from megatron_bdpo.model.shards import is_main_copy, weight_shards

#: In the order of a forward pass, so that exported files are read in order.
_BEFORE_LAYERS, _AFTER_LAYERS = "embedding.", ("decoder.final_layernorm.", "output_layer.")


@dataclass(frozen=True)
class _Piece:
    """A part of a whole tensor that one rank holds."""

    shape: tuple[int, ...]
    slices: tuple[slice, ...]
    dtype: torch.dtype
    rank: int


@torch.no_grad()
def gathered_weights(model: Sequence[Any], group: Any) -> Iterator[tuple[Place, Tensor | None]]:
    """Every weight of all ranks together; the tensors are on rank 0's host, elsewhere None. Collective.

    Every rank has to run the iteration to its end. Rank 0 holds one whole tensor of one layer at a time, the others
    copy one piece at a time to their hosts.

    Args:
        model: this rank's chunks, unwrapped.
        group: a host-side (gloo) group of all ranks.
    """
    rank = distributed.get_rank(group)
    own: dict[Place, list[ShardedTensor]] = {}
    for shard in weight_shards(model):
        if is_main_copy(shard):
            own.setdefault(place_of(shard.key, shard.global_offset[: shard.prepend_axis_num]), []).append(shard)
    described = {place: [_describe(shard, rank) for shard in shards] for place, shards in own.items()}
    everyone: list[dict[Place, list[_Piece]]] = [{}] * distributed.get_world_size(group)
    distributed.all_gather_object(everyone, described, group=group)
    for place in sorted({place for rank_has in everyone for place in rank_has}, key=in_order):
        pieces = [piece for rank_has in everyone for piece in rank_has.get(place, [])]
        yield place, _assemble(pieces, iter(own.get(place, [])), rank, group)


def in_order(place: Place) -> tuple[Any, ...]:
    """Sort key: embeddings, layers, output."""
    stage = 0 if place.key.startswith(_BEFORE_LAYERS) else 2 if place.key.startswith(_AFTER_LAYERS) else 1
    return stage, place.indices, place.key


def _describe(shard: ShardedTensor, rank: int) -> _Piece:
    stacked = shard.prepend_axis_num
    assert shard.data is not None
    return _Piece(tuple(shard.global_shape[stacked:]), tuple(shard.global_slice()[stacked:]), shard.data.dtype, rank)


def _assemble(pieces: list[_Piece], own: Iterator[ShardedTensor], rank: int, group: Any) -> Tensor | None:
    """Send this rank's pieces to rank 0, which puts all of them in their places."""
    whole = torch.empty(pieces[0].shape, dtype=pieces[0].dtype) if rank == 0 else None
    found = 0
    for piece in pieces:
        target = None if whole is None else whole[piece.slices]
        found += 0 if target is None else target.numel()
        data = next(own).data.detach().cpu() if piece.rank == rank else None
        if target is not None and data is not None:
            target.copy_(data)
        elif target is not None:
            received = torch.empty(target.shape, dtype=piece.dtype)
            distributed.recv(_bytes(received), group=group, group_src=piece.rank)
            target.copy_(received)
        elif data is not None:
            distributed.send(_bytes(data.contiguous()), group=group, group_dst=0)
    assert whole is None or found == whole.numel(), "pieces that are missing or overlap"
    return whole


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: gloo does not know every data type."""
    return tensor.view(torch.uint8)
