"""Adapters' weights into a model's shards and out of them, as whole tensors under PEFT's names."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, distributed

from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint
from megatron_bdpo.model.hf.export import split
from megatron_bdpo.model.hf.load import fill
from megatron_bdpo.model.hf.tensors import Place, WeightMap, place_of
from megatron_bdpo.model.lora.peft_format import MAGNITUDE, PREFIX
from megatron_bdpo.model.shards import adapter_shards, is_main_copy, own_slices


@torch.no_grad()
def load_adapters(model: list[Any], checkpoint: HuggingFaceCheckpoint, weights: WeightMap) -> None:
    """Fill the adapters of a model. Not collective: every rank reads for itself.

    Args:
        model: this rank's chunks, unwrapped.
        weights: ``peft_format.adapter_map``.
    """
    for shard in adapter_shards(model):
        assert shard.data is not None
        start = _start(shard)
        if start is None:
            fill(shard, checkpoint, weights)
        else:
            magnitude = _with_data(shard, torch.empty_like(start))
            fill(magnitude, checkpoint, weights)
            assert magnitude.data is not None
            shard.data.detach().copy_(magnitude.data - start)
    checkpoint.close()


@torch.no_grad()
def gather_adapters(model: Iterable[Any], weights: WeightMap, group: Any) -> dict[str, Tensor]:
    """All adapters of all ranks, whole and on the host of rank 0, by PEFT's names; nothing elsewhere. Collective.

    Args:
        model: this rank's chunks, unwrapped.
        weights: ``peft_format.adapter_map``.
        group: a host-side (gloo) group of all ranks.
    """
    own = [_piece(shard) for shard in _as_peft_has_them(model) if is_main_copy(shard)]
    rank, ranks = distributed.get_rank(), distributed.get_world_size(group)
    everyone: list[list[_Piece]] | None = [[]] * ranks if rank == 0 else None
    distributed.gather_object(own, everyone, dst=0, group=group)
    return names_of(_put_together(piece for pieces in everyone or () for piece in pieces), weights)


def names_of(wholes: Iterable[tuple[Place, Tensor]], weights: WeightMap) -> dict[str, Tensor]:
    """Whole adapters by PEFT's names."""
    return {name: tensor for place, whole in wholes for name, tensor in split(place, whole, weights).items()}


def with_whole_magnitudes(tensors: Mapping[str, Tensor], base: HuggingFaceCheckpoint) -> dict[str, Tensor]:
    """Adapters of a checkpoint, with DoRA's m in the place of what it has gained.

    Args:
        tensors: by PEFT's names.
        base: of the model that they stand beside.
    """
    found = dict(tensors)
    for name, gained in tensors.items():
        if name.endswith(MAGNITUDE):
            weight = name.removeprefix(PREFIX).removesuffix(MAGNITUDE) + ".weight"
            found[name] = base.rows(weight, 0, len(gained)).float().norm(dim=1) + gained.float()
    base.close()
    return found


_Piece = tuple[Place, tuple[int, ...], tuple[slice, ...], Tensor]
"""Whose it is, the shape of the whole, where it is in it, and its values on the host."""


def _piece(shard: ShardedTensor) -> _Piece:
    stacked = shard.prepend_axis_num
    assert shard.data is not None
    place = place_of(shard.key, shard.global_offset[:stacked])
    shape, slices = tuple(shard.global_shape[stacked:]), own_slices(shard)
    return place, shape, slices, shard.data.detach().cpu().clone()


def _put_together(pieces: Iterable[_Piece]) -> Iterator[tuple[Place, Tensor]]:
    of_place: dict[Place, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        of_place[piece[0]].append(piece)
    for place, parts in of_place.items():
        whole = parts[0][3].new_empty(parts[0][1])
        for _, _, slices, values in parts:
            whole[slices] = values
        yield place, whole


def _as_peft_has_them(model: Iterable[Any]) -> Iterator[ShardedTensor]:
    """DoRA's m itself, in fp32, in the place of what it has gained."""
    for shard in adapter_shards(model):
        start = _start(shard)
        assert shard.data is not None
        yield shard if start is None else _with_data(shard, start + shard.data.detach().float())


def _start(shard: ShardedTensor) -> Tensor | None:
    start: Tensor | None = getattr(shard.data, "start", None)
    return None if start is None or shard.data is None else start.to(shard.data.device)


def _with_data(shard: ShardedTensor, data: Tensor) -> ShardedTensor:
    other = copy.copy(shard)
    other.data, other.dtype = data, data.dtype
    return other
