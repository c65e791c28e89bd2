"""The weights of a live model as whole tensors: each on the rank that writes it, within its tensor-parallel group."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, distributed

from megatron_bdpo.model.hf.file_layout import ExportFile, Whole
from megatron_bdpo.model.hf.tensors import Place, place_of
from megatron_bdpo.model.shards import is_main_copy, own_slices, weight_shards


@dataclass(frozen=True)
class _Piece:
    """A part of a whole tensor that one rank holds."""

    shape: tuple[int, ...]
    """Of the whole."""
    slices: tuple[slice, ...]
    dtype: torch.dtype
    rank: int
    number: int
    """Among the rank's pieces of this tensor."""


@dataclass(frozen=True)
class _Move:
    """A whole tensor on its way to the rank that writes it."""

    whole: Whole
    writer: int


class LiveWeights:
    """The weights of all ranks together; a ``files.Source``. One data-parallel replica has them, the others nothing.

    Attributes:
        wholes: as ``files.Source`` has them.
    """

    def __init__(self, model: Sequence[Any], group: Any) -> None:
        """Tell all ranks what each of them has. Collective.

        Args:
            model: this rank's chunks, unwrapped.
            group: a host-side (gloo) group of all ranks.
        """
        self._rank = distributed.get_rank()
        self._own: dict[Place, list[ShardedTensor]] = defaultdict(list)
        for shard in weight_shards(model):
            if is_main_copy(shard):
                self._own[place_of(shard.key, shard.global_offset[: shard.prepend_axis_num])].append(shard)
        described = [(place, self._describe(place)) for place in self._own]
        everyone: list[list[tuple[Place, list[_Piece]]]] = [[]] * distributed.get_world_size(group)
        distributed.all_gather_object(everyone, described, group=group)
        self._pieces: dict[Place, list[_Piece]] = defaultdict(list)
        for place, pieces in itertools.chain.from_iterable(everyone):
            self._pieces[place] += pieces
        self.wholes = [
            Whole(place, pieces[0].shape, pieces[0].dtype, tuple(sorted({piece.rank for piece in pieces})))
            for place, pieces in self._pieces.items()
        ]
        groups = [parallel_state.get_tensor_model_parallel_group(), parallel_state.get_expert_tensor_parallel_group()]
        self._groups = [(group, set(distributed.get_process_group_ranks(group))) for group in groups]

    @torch.no_grad()
    def together(self, files: Sequence[ExportFile]) -> Iterator[tuple[Place, Tensor]]:
        """As ``files.Source`` has it. Every rank has to run the iteration to its end.

        The first tensors of all files travel at the same time, then the second ones, ...: each from the ranks of its
        tensor-parallel group, over that group's own connections (NVLink within a node), to its writer and none other.
        Beside its file, a rank holds one whole tensor on its host and one piece of it on its device.
        """
        for step in itertools.zip_longest(*([_Move(whole, file.writer) for whole in file.wholes] for file in files)):
            moves = [move for move in step if move is not None]
            mine = next((move.whole for move in moves if move.writer == self._rank), None)
            target = None if mine is None else torch.empty(mine.shape, dtype=mine.dtype)
            for within in self._groups:
                self._move([move for move in moves if self._group_of(move.whole) is within], within[0], target)
            if mine is not None and target is not None:
                yield mine.place, target

    def _move(self, moves: Iterable[_Move], group: Any, target: Tensor | None) -> None:
        """Put the pieces of tensors of one group together: piece by piece, for all of them at the same time.

        All ranks of the group come here in the same order, and a batch is received before the next one: no two wait
        for each other.
        """
        for batch in itertools.zip_longest(
            *([(move, piece) for piece in self._pieces[move.whole.place]] for move in moves)
        ):
            operations, arriving = [], []
            for move, piece in filter(None, batch):
                if piece.rank == move.writer == self._rank:
                    assert target is not None
                    target[piece.slices].copy_(self._data(move.whole, piece))
                elif piece.rank == self._rank:
                    data = self._data(move.whole, piece).contiguous()
                    operations.append(distributed.P2POp(distributed.isend, _bytes(data), move.writer, group))
                elif move.writer == self._rank:
                    assert target is not None
                    shape = target[piece.slices].shape
                    received = torch.empty(shape, dtype=piece.dtype, device=torch.cuda.current_device())
                    operations.append(distributed.P2POp(distributed.irecv, _bytes(received), piece.rank, group))
                    arriving.append((piece, received))
            for work in distributed.batch_isend_irecv(operations) if operations else ():
                work.wait()
            for piece, received in arriving:
                assert target is not None
                target[piece.slices].copy_(received)

    def _describe(self, place: Place) -> list[_Piece]:
        found = []
        for number, shard in enumerate(self._own[place]):
            stacked = shard.prepend_axis_num
            assert shard.data is not None
            shape, slices = tuple(shard.global_shape[stacked:]), own_slices(shard)
            found.append(_Piece(shape, slices, shard.data.dtype, self._rank, number))
        return found

    def _data(self, whole: Whole, piece: _Piece) -> Tensor:
        """A piece that this rank holds."""
        data = self._own[whole.place][piece.number].data
        assert data is not None
        return data.detach()

    def _group_of(self, whole: Whole) -> tuple[Any, set[int]] | None:
        """Of this rank's groups, the first that has the tensor. None: it is of other ranks."""
        if self._rank not in whole.holders:
            return None
        return next(within for within in self._groups if within[1].issuperset(whole.holders))


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: gloo does not know every data type."""
    return tensor.view(torch.uint8)
