"""Packs as tensors, and the endless data loader over a step plan.

Every rank builds its own packs from the memory-mapped tokens: the ranks of one data-parallel group build the same ones,
so nothing is broadcast and no pipeline stage waits for another's data.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_bdpo.data.answer_table import answer_table
from megatron_bdpo.data.bin_packing import round_up
from megatron_bdpo.data.context import ALONE, ContextRank, context_part
from megatron_bdpo.data.cuts import Cuts, common_lengths
from megatron_bdpo.data.labels import labelled_sides
from megatron_bdpo.data.packs import IntArray, Pack, lay_out
from megatron_bdpo.data.pool import ComparedGroup, PairPool
from megatron_bdpo.data.prompt_kinds import PromptKind
from megatron_bdpo.logprobs import ScoredPositions
from megatron_bdpo.losses.base import Takes
from megatron_bdpo.model.attention import AttentionPlan
from megatron_bdpo.model.reward_head import AnswerEnds


@dataclass(frozen=True)
class PackTable:
    """The answers of a pack's G groups as a table, for losses of whole groups: see ``data.answer_table``."""

    source: Tensor  # [G, K] which of the 2 P sides of the pairs an answer is
    place: Tensor  # [P, 2] of each pair's answers in the table, [G, K] in one row
    present: Tensor  # [G, K] bool
    score: Tensor  # [G, K] float64, the higher the better


@dataclass(frozen=True)
class PackSides:
    """The sides of a pack's pairs one by one, for losses of labelled answers: see ``data.labels``. N of them."""

    source: Tensor  # [N] which of the 2 P sides of the pairs
    desirable: Tensor  # [N] bool
    weight: Tensor  # [N] float64, in the step's mean: a pair's is shared by its sides
    pair: IntArray  # [N] which of the P pairs it is of, on the host


@dataclass(frozen=True)
class PackPairs:
    """The P pairs of a pack's groups: which of its A answers are compared, and what each counts."""

    ids: IntArray  # [P], on the host
    answers: Tensor  # [P, 2] numbers of the chosen and the rejected answer
    unsafe: Tensor  # [P, 2] safety labels: 1 unsafe, 0 safe, -1 unknown
    margin: Tensor  # [P] float64, of rewards; 0 where the row asks for none
    weight: Tensor  # [P] float64, of the pair in the step's mean
    count: int  # of what the step's mean is over: the sum of the weights
    first: IntArray  # [G] the first pair of each group, on the host
    group_weight: Tensor  # [G] float64, the sum of the weights of a group's pairs
    table: PackTable | None = None  # where the loss is of groups
    sides: PackSides | None = None  # where it is of labelled answers

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def key(self) -> bytes:
        """Equal for packs of the same pairs: a pair may come twice in a step, in packs with other pairs."""
        return self.ids.tobytes()


_NONE, _NO_NUMBERS = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
_NO_INDICES = np.zeros(0, np.int64)
NO_PAIRS = PackPairs(_NO_INDICES, _NONE, _NONE, _NO_NUMBERS, _NO_NUMBERS, 0, _NO_INDICES, _NO_NUMBERS)


@dataclass(frozen=True)
class PackCuts:
    """That a pack's answers are scored segment by segment: see ``data.cuts``. C segments of each of A answers."""

    per_answer: int  # C
    last: Tensor  # [P, 2] the last segment, within its answer, of the beginning that a pair compares

    def beginnings(self, sums: Tensor, answers: Tensor) -> Tensor:
        """[P, 2]: what sums over segments, [A C], are over the beginnings of pairs' answers, numbers [P, 2]."""
        place = torch.arange(self.per_answer, device=sums.device)
        segments = sums.unflatten(0, (-1, self.per_answer))[answers]
        return torch.where(place <= self.last[..., None], segments, 0).sum(dim=-1)


@dataclass(frozen=True)
class PackBatch:
    """One microbatch: a pack, or this context-parallel rank's part of one, as the model and the loss take it.

    A part has T / C positions, but all A answers and P pairs of the pack (see ``data.context``). All tensors are views
    of one piece of memory, which is pinned and sent to the device as a whole.
    """

    memory: Tensor  # [bytes] uint8
    tokens: Tensor  # [1, T]
    attention: AttentionPlan
    scored: ScoredPositions  # those of this rank, of answers or, with cuts, of their segments
    answer_tokens: Tensor  # [A] tokens of each answer, scored here or on other ranks
    ends: AnswerEnds
    pairs: PackPairs
    length: int  # of the whole pack
    unconditional: PackBatch | None = None
    """The same answers after the empty prompt, where the reference is scored on the fly and the loss needs it."""
    cuts: PackCuts | None = None
    """Where the loss compares beginnings of answers."""

    def over_answers(self, sums: Tensor) -> Tensor:
        """[A] sums over the answers, of those that the scored positions were added up to."""
        return sums if self.cuts is None else sums.unflatten(0, (-1, self.cuts.per_answer)).sum(dim=1)

    def over_beginnings(self, sums: Tensor) -> Tensor | None:
        """[P, 2] of the same over the beginnings of the pairs' answers; None where the answers are not cut."""
        return None if self.cuts is None else self.cuts.beginnings(sums, self.pairs.answers)

    def to_device(self) -> PackBatch:
        """This batch on the current CUDA device (the CPU where there is none)."""
        return self._moved(lambda memory: memory.cuda(non_blocking=True))

    def pin_memory(self) -> PackBatch:
        """Called by the data loader."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> PackBatch:
        memory = move(self.memory)

        def views(value: Any) -> Any:
            if isinstance(value, Tensor):
                return _view(memory, int(value.storage_offset()) * value.element_size(), value)
            if isinstance(value, PackBatch):
                return value._moved(move)
            return _replaced(value, views) if dataclasses.is_dataclass(value) else value

        moved: PackBatch = _replaced(self, views)
        return moved


def _replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """A dataclass with each of its fields changed."""
    return dataclasses.replace(value, **{each.name: change(getattr(value, each.name)) for each in fields(value)})


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """What ``like`` is, at byte ``start`` of ``memory``."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


_ALIGNMENT = 16  # bytes, of each tensor: enough for any type, and for vector loads


def _in_one_piece(arrays: Mapping[str, npt.NDArray[Any] | Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Arrays, copied into one piece of memory: that, and its views by name."""
    tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
    ends = list(itertools.accumulate(round_up(tensor.nbytes, _ALIGNMENT) for tensor in tensors.values()))
    memory = torch.zeros(ends[-1], dtype=torch.uint8)
    views = {
        name: _view(memory, start, tensor) for (name, tensor), start in zip(tensors.items(), [0, *ends], strict=False)
    }
    for name, view in views.items():
        view.copy_(tensors[name])
    return memory, views


@dataclass(frozen=True)
class PackMaker:
    """Turns group ids into batches, as one context-parallel rank sees them.

    Attributes:
        limit: greatest length of a pack, so no position is beyond it. Megatron keeps a rotary table for each length
            that it is asked for; all packs ask for this one.
        padding_token: see ``lay_out``.
        over_pairs: every pair counts 1 in the step's mean; otherwise every group does, its pairs alike.
        takes: what the loss does; batches for losses of groups have a ``PackTable``, for those of labelled answers
            ``PackSides``.
        with_cuts: batches have ``PackCuts``, at the common lengths of their pairs.
    """

    pool: PairPool
    limit: int
    share_prompts: bool = True
    with_unconditional: bool = False
    padding_token: int | None = None
    context: ContextRank = ALONE
    over_pairs: bool = False
    takes: Takes = "pairs"
    with_cuts: bool = False

    @functools.cached_property
    def _margins(self) -> npt.NDArray[np.float64]:
        return self.pool.pairs.margins()

    @functools.cached_property
    def _scores(self) -> npt.NDArray[np.float64]:
        return self.pool.pairs.scores()

    def __call__(self, ids: IntArray, length: int) -> PackBatch:
        """The pack of these groups, of ``length`` positions."""
        batch = self.mixed(ids, np.full_like(ids, PromptKind.OWN), length)
        if not self.with_unconditional:
            return batch
        unconditional = self.mixed(ids, np.full_like(ids, PromptKind.EMPTY), length)
        return dataclasses.replace(batch, unconditional=unconditional)

    def mixed(self, ids: IntArray, after: IntArray, length: int) -> PackBatch:
        """A pack in which each group's answers follow the prompt of a kind of their own (``PromptKind``)."""
        found = [self.pool.group(each, PromptKind(kind)) for each, kind in zip(ids, after, strict=True)]
        groups = [each.group for each in found]
        pack = lay_out(groups, length, share_prompts=self.share_prompts, padding_token=self.padding_token)
        pairs, cuts = self._pairs(found), None
        if self.with_cuts:
            cuts = common_lengths(pack.answer_tokens, pairs.answers.numpy())
            pack = dataclasses.replace(pack, scored_answer=cuts.segment)  # before a part of it is taken
        return to_batch(context_part(pack, self.context), length, self.limit, pairs, cuts)

    def _pairs(self, groups: Sequence[ComparedGroup]) -> PackPairs:
        ids = np.concatenate([_NO_INDICES, *(each.pairs for each in groups)])
        first = np.cumsum([0, *(len(each.group.answers) for each in groups)])
        compared = [each.answers + start for each, start in zip(groups, first, strict=False)]
        answers = np.concatenate([np.zeros((0, 2), np.int64), *compared])
        sizes = np.array([len(each.pairs) for each in groups], np.int64)
        weight = np.ones(len(ids)) if self.over_pairs else 1 / np.repeat(sizes, sizes)
        return PackPairs(
            ids,
            torch.from_numpy(answers),
            torch.from_numpy(self.pool.pairs.unsafe[ids].astype(np.int64)),
            torch.from_numpy(np.nan_to_num(self._margins[ids])),
            torch.from_numpy(weight),
            count=len(ids) if self.over_pairs else len(groups),
            first=np.cumsum(sizes) - sizes,
            group_weight=torch.from_numpy(sizes.astype(np.float64) if self.over_pairs else np.ones(len(sizes))),
            table=self._table(ids, answers, sizes) if self.takes == "groups" else None,
            sides=self._sides(ids, weight) if self.takes == "answers" else None,
        )

    def _sides(self, ids: IntArray, weight: npt.NDArray[np.float64]) -> PackSides:
        sides = labelled_sides(self.pool.pairs.label[ids])
        shares = np.broadcast_to((weight / sides.sum(axis=1))[:, None], sides.shape)
        source = np.flatnonzero(sides)
        desirable, of_side = torch.from_numpy(source % 2 == 0), torch.from_numpy(shares[sides])
        return PackSides(torch.from_numpy(source), desirable, of_side, source // 2)

    def _table(self, ids: IntArray, answers: IntArray, sizes: IntArray) -> PackTable:
        table = answer_table(answers, np.repeat(np.arange(len(sizes)), sizes), len(sizes))
        of_answers = table.source, table.place, table.present, table.scores(self._scores[ids])
        return PackTable(*map(torch.from_numpy, of_answers))


def to_batch(
    pack: Pack, length: int, table_length: int, pairs: PackPairs = NO_PAIRS, cuts: Cuts | None = None
) -> PackBatch:
    """A pack, or one rank's part of a pack of ``length`` positions, on the host.

    Args:
        pairs: of its answers.
        cuts: of its answers, whose segments ``pack.scored_answer`` then counts.
    """
    sums = len(pack.answer_tokens) * (1 if cuts is None else cuts.per_answer)
    scored_tokens = np.bincount(pack.scored_answer, minlength=sums)
    memory, views = _in_one_piece(
        {
            "tokens": pack.tokens[None],
            "positions": pack.positions,
            "groups": pack.groups,
            "key_index": pack.key_index,
            "query_starts": _starts(pack.query_lengths),
            "key_starts": _starts(pack.key_lengths),
            "hidden": pack.scored_hidden,
            "target": pack.scored_target,
            "answer": pack.scored_answer,
            "scored_tokens": scored_tokens,
            "answer_tokens": pack.answer_tokens,
            "ends": pack.ends,
            "end_answer": pack.end_answer,
            **({} if cuts is None else {"cuts": cuts.last}),
            **_tensors(pairs, "pairs"),
        }
    )
    return PackBatch(
        memory=memory,
        tokens=views["tokens"],
        attention=AttentionPlan(
            qkv_format="sbhd",
            max_seqlen_q=table_length,
            max_seqlen_kv=table_length,
            positions=views["positions"],
            groups=views["groups"],
            group_weight=views["pairs.group_weight"],
            key_index=views["key_index"],
            query_starts=views["query_starts"],
            key_starts=views["key_starts"],
            query_lengths=tuple(pack.query_lengths.tolist()),
            key_lengths=tuple(pack.key_lengths.tolist()),
        ),
        scored=ScoredPositions(
            views["hidden"],
            views["target"],
            views["answer"],
            views["scored_tokens"],
            longest=int(scored_tokens.max(initial=0)),
        ),
        answer_tokens=views["answer_tokens"],
        ends=AnswerEnds(views["ends"], views["end_answer"], len(pack.answer_tokens)),
        pairs=_placed(pairs, views, "pairs"),
        length=length,
        cuts=None if cuts is None else PackCuts(cuts.per_answer, views["cuts"]),
    )


def _tensors(value: Any, name: str) -> dict[str, Tensor]:
    """All tensors of a dataclass and of those in it, by their place."""
    if isinstance(value, Tensor):
        return {name: value}
    inner = fields(value) if dataclasses.is_dataclass(value) else ()
    return {k: v for each in inner for k, v in _tensors(getattr(value, each.name), f"{name}.{each.name}").items()}


def _placed[Kind](value: Kind, views: Mapping[str, Tensor], name: str) -> Kind:
    """The same with these tensors in the place of its own."""
    if isinstance(value, Tensor):
        return views[name]  # type: ignore[return-value]
    if not dataclasses.is_dataclass(value):
        return value
    changed = {each.name: _placed(getattr(value, each.name), views, f"{name}.{each.name}") for each in fields(value)}
    return dataclasses.replace(value, **changed)  # type: ignore[type-var]


def _starts(lengths: IntArray) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


#: Pack number -> the ids of its groups, and its length.
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
        # It draws a seed for workers, once a start: from torch's own generator a resumed run's dropout would differ.
        generator=torch.Generator(),
    )
    return iter(loader)


class _Order(torch.utils.data.Sampler[int]):
    def __init__(self, order: Iterator[int]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[int]:
        return self.order
