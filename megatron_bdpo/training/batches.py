"""Packs as tensors, and the endless data loader over a step plan.

Every rank builds its own packs from the memory-mapped tokens: the ranks of one data-parallel group build the same ones,
so nothing is broadcast and no pipeline stage waits for another's data.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_bdpo.data.bin_packing import round_up
from megatron_bdpo.data.context import ALONE, ContextRank, context_part
from megatron_bdpo.data.packs import IntArray, Pack, lay_out
from megatron_bdpo.data.pool import PairPool
from megatron_bdpo.logprobs import ScoredPositions
from megatron_bdpo.model.attention import AttentionPlan, KeptKeys


@dataclass
class PackBatch:
    """One microbatch: a pack as tensors, or this context-parallel rank's part of one. Shapes as in ``data.layout``.

    A part has T / C positions, but all S sequences and P pairs of the pack (see ``data.context``). All tensors are
    views of one piece of memory, which is pinned and sent to the device as a whole.
    """

    whole: Tensor  # [bytes] uint8

    tokens: Tensor  # [1, T]
    positions: Tensor  # [1, T]
    key_index: Tensor  # [K]
    query_starts: Tensor  # [R + 1] int32
    key_starts: Tensor  # [R + 1] int32
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    scored_hidden: Tensor  # [N]
    scored_target: Tensor  # [N]
    scored_sequence: Tensor  # [N]
    scored_tokens: Tensor  # [S] positions scored here, of each sequence
    most_scored: int  # largest of scored_tokens
    sequence_tokens: Tensor  # [S] response tokens, here or on other ranks
    pack_length: int  # T
    table_length: int  # of the rotary table, the same for all packs of a run
    unsafe: Tensor  # [P, 2]
    pair_ids: IntArray  # [P], on the host
    unconditional: PackBatch | None = None
    """The same answers after the empty prompt, where the reference is scored on the fly and the loss needs it."""

    @property
    def pairs(self) -> int:
        return len(self.pair_ids)

    def attention_plan(self, kept: KeptKeys | None = None) -> AttentionPlan:
        """Who attends to whom. ``kept``: where keys of earlier packs are, if this one goes on with them."""
        return AttentionPlan(
            qkv_format="sbhd",
            max_seqlen_q=self.table_length,
            max_seqlen_kv=self.table_length,
            positions=self.positions[0],
            key_index=self.key_index,
            query_starts=self.query_starts,
            key_starts=self.key_starts,
            query_lengths=self.query_lengths,
            key_lengths=self.key_lengths,
            kept=kept,
        )

    def scored(self) -> ScoredPositions:
        return ScoredPositions(
            self.scored_hidden, self.scored_target, self.scored_sequence, self.scored_tokens, self.most_scored
        )

    def to_device(self) -> PackBatch:
        """This batch on the current CUDA device (the CPU where there is none)."""
        return self._moved(lambda whole: whole.cuda(non_blocking=True))

    def pin_memory(self) -> PackBatch:
        """Called by the data loader."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> PackBatch:
        whole = move(self.whole)
        changes: dict[str, Any] = {"whole": whole}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name != "whole":
                changes[field.name] = _view(whole, int(value.storage_offset()) * value.element_size(), value)
            elif isinstance(value, PackBatch):
                changes[field.name] = value._moved(move)
        return dataclasses.replace(self, **changes)


def _view(whole: Tensor, start: int, like: Tensor) -> Tensor:
    """What ``like`` is, at byte ``start`` of ``whole``."""
    return whole[start : start + like.nbytes].view(like.dtype).view(like.shape)


_ALIGNMENT = 16  # bytes, of each tensor: enough for any type, and for vector loads


def _in_one_piece(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Arrays, copied into one piece of memory: that, and its views by name."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    ends = list(itertools.accumulate(round_up(tensor.nbytes, _ALIGNMENT) for tensor in tensors.values()))
    whole = torch.zeros(ends[-1], dtype=torch.uint8)
    views = {
        name: _view(whole, start, tensor) for (name, tensor), start in zip(tensors.items(), [0, *ends], strict=False)
    }
    for name, view in views.items():
        view.copy_(tensors[name])
    return whole, views


@dataclass(frozen=True)
class PackMaker:
    """Turns pair ids into batches, as one context-parallel rank sees them.

    Attributes:
        limit: greatest length of a pack, so no position is beyond it. Megatron keeps a rotary table for each length
            that it is asked for; all packs ask for this one.
    """

    pool: PairPool
    limit: int
    share_prompts: bool = True
    with_unconditional: bool = False
    context: ContextRank = ALONE

    def __call__(self, ids: IntArray, length: int) -> PackBatch:
        """The pack of these pairs, of ``length`` positions."""
        batch = self.mixed(ids, np.zeros(len(ids), bool), length)
        if self.with_unconditional:
            batch.unconditional = self.mixed(ids, np.ones(len(ids), bool), length)
        return batch

    def mixed(self, ids: IntArray, unconditional: npt.NDArray[np.bool_], length: int) -> PackBatch:
        """A pack in which the answers of some pairs follow the empty prompt: those with True in ``unconditional``."""
        groups = [self.pool.group(pair, unconditional=empty) for pair, empty in zip(ids, unconditional, strict=True)]
        pack = lay_out(groups, length, share_prompts=self.share_prompts)
        return to_batch(context_part(pack, self.context), self.pool.unsafe[ids], length, self.limit)


def to_batch(pack: Pack, unsafe: np.ndarray[Any, Any], pack_length: int, table_length: int) -> PackBatch:
    """The arrays of a pack, or of one rank's part of a pack of ``pack_length`` positions, as tensors on the host."""
    scored_tokens = np.bincount(pack.scored_sequence, minlength=len(pack.sequence_tokens))
    whole, tensors = _in_one_piece(
        {
            "tokens": pack.tokens[None],
            "positions": pack.positions[None],
            "key_index": pack.key_index,
            "query_starts": _starts(pack.query_lengths),
            "key_starts": _starts(pack.key_lengths),
            "scored_hidden": pack.scored_hidden,
            "scored_target": pack.scored_target,
            "scored_sequence": pack.scored_sequence,
            "scored_tokens": scored_tokens,
            "sequence_tokens": pack.sequence_tokens,
            "unsafe": unsafe.astype(np.int64),
        }
    )
    return PackBatch(
        whole=whole,
        **tensors,
        query_lengths=tuple(pack.query_lengths.tolist()),
        key_lengths=tuple(pack.key_lengths.tolist()),
        most_scored=int(scored_tokens.max(initial=0)),
        pack_length=pack_length,
        table_length=table_length,
        pair_ids=pack.pair_ids,
        unconditional=None,
    )


def _starts(lengths: IntArray) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


#: Pack number -> the ids of its pairs, and its length.
Packs = Callable[[int], tuple[IntArray, int]]


class _PackDataset(torch.utils.data.Dataset[PackBatch]):
    def __init__(self, packs: Packs, make: PackMaker) -> None:
        self.packs = packs
        self.make = make

    def __getitem__(self, index: int) -> PackBatch:
        return self.make(*self.packs(index))


def iterate_packs(
    packs: Packs, order: Iterator[int], make: PackMaker, *, workers: int, pin: bool
) -> Iterator[PackBatch]:
    """Batches of ``packs(i)`` for i in ``order``, prepared by ``workers`` processes ahead of time (0: in place)."""
    loader = torch.utils.data.DataLoader(
        _PackDataset(packs, make),
        batch_size=None,
        sampler=_Order(order),
        num_workers=workers,
        # Workers share the plan and the tokens' maps with this process; Python 3.14 would pickle them by default.
        multiprocessing_context="fork" if workers else None,
        pin_memory=pin,
        persistent_workers=workers > 0,
    )
    return iter(loader)


class _Order(torch.utils.data.Sampler[int]):
    def __init__(self, order: Iterator[int]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[int]:
        return self.order
