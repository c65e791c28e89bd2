"""Passes of a frozen reference: over the groups of a data set before training, or over a step's packs beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_bdpo.data.bin_packing import cut_into_blocks, pack_evenly, round_up
from megatron_bdpo.data.prompt_kinds import PromptKind
from megatron_bdpo.logprobs import TokenScoring
from megatron_bdpo.losses import GroupLogProbs, PairLogProbs, Requirements
from megatron_bdpo.model.lora.attach import adapters_off
from megatron_bdpo.training.batches import IntArray, PackBatch, PackMaker
from megatron_bdpo.training.distributed import sum_over_ranks
from megatron_bdpo.training.forward import ReferenceLogProbs, ScoringStep, forward_only, looking_ahead
from megatron_bdpo.training.job import PairJob

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass
class ReferenceTable:
    """Reference log-probs of the pairs that a run uses, in nats, summed over response tokens. P pairs; NaN of others.

    Attributes:
        conditional: [P, 2] log pi_ref(y|x) of chosen and rejected.
        unconditional: [P, 2] log pi_ref(y) after the empty prompt, or None where the loss does not need it.
        mismatched: [P, 2] log pi_ref(y|x') after another group's prompt, or None; NaN where that does not fit a pack.
        beginnings: [P, 2] the conditional ones of the pairs' common lengths, or None likewise.
        directories: where they are kept, by store.
    """

    conditional: FloatArray
    unconditional: FloatArray | None
    mismatched: FloatArray | None = None
    beginnings: FloatArray | None = None
    directories: Mapping[str, Path] = field(default_factory=dict)

    def training_values(self, job: PairJob) -> PairLogProbs | GroupLogProbs:
        """What the loss reads of all that the run trains on and uses, in float64, with the reference as the policy."""
        return self._groups(job) if job.loss.spec.takes == "groups" else self._pairs(job)

    def _groups(self, job: PairJob) -> GroupLogProbs:
        pairs, place = job.pool.grouping.pairs_and_places(job.train.ids)
        is_known = np.ones(len(job.train.ids), bool)
        is_known[place[np.isnan(self.conditional[pairs]).any(axis=1)]] = False
        pairs, table = job.pool.answers_of(job.train.ids[is_known])

        def of_answers(sides: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(sides[pairs].ravel()[table.source])

        conditional = of_answers(self.conditional)
        return GroupLogProbs(
            conditional,
            of_answers(job.pool.pairs.scored),
            torch.from_numpy(table.scores(job.pool.pairs.scores()[pairs])),
            torch.from_numpy(table.present),
            reference=conditional,
            unconditional=None if self.unconditional is None else of_answers(self.unconditional),
            unsafe=of_answers(job.pool.pairs.unsafe),
        )

    def _pairs(self, job: PairJob) -> PairLogProbs:
        ids = job.pool.grouping.pairs_of(job.train.ids)
        ids = ids[~np.isnan(self.conditional[ids]).any(axis=1)]
        tokens, conditional, unsafe = map(
            torch.from_numpy, (job.pool.pairs.scored[ids], self.conditional[ids], job.pool.pairs.unsafe[ids])
        )
        unconditional = None if self.unconditional is None else torch.from_numpy(self.unconditional[ids])
        return PairLogProbs.of_pairs(tokens, conditional, conditional, unconditional, unsafe)

    def lookup(self, batch: PackBatch) -> ReferenceLogProbs:
        """See ``forward.ReferenceValues``."""
        tables = (self.conditional, self.unconditional, self.beginnings)
        found = [None if each is None else each[batch.pairs.ids] for each in tables]
        # In one piece, pinned: the host does not wait until the device has it.
        sent = torch.from_numpy(np.stack([each for each in found if each is not None])).pin_memory()
        values = iter(sent.cuda(non_blocking=True))
        return ReferenceLogProbs(*(None if each is None else next(values) for each in found))


class NoReference:
    """For losses that read no reference."""

    def lookup(self, batch: PackBatch) -> ReferenceLogProbs:
        """See ``forward.ReferenceValues``."""
        return ReferenceLogProbs()


class ResidentReference:
    """A frozen model beside the policy that scores each step's microbatches just before the policy's own pass."""

    def __init__(self, model: list[Any], requirements: Requirements, scoring: TokenScoring) -> None:
        self.model = model
        self.requirements = requirements
        self.scoring = scoring
        self._values: dict[bytes, ReferenceLogProbs] = {}

    def lookup(self, batch: PackBatch) -> ReferenceLogProbs:
        """See ``forward.ReferenceValues``."""
        return self._values[batch.pairs.key]

    def wrap(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """A schedule that first scores its microbatches with the reference, then runs as before."""

        def look(batches: list[list[PackBatch]]) -> list[Iterator[PackBatch]]:
            self._score(batches)
            return [map(_conditional, chunk) for chunk in batches]

        return looking_ahead(schedule, look)

    def _score(self, batches: list[list[PackBatch]]) -> None:
        """One pass over the step's packs, each followed by its answers after the empty prompt if they are needed."""
        per_batch = 2 if self.requirements.comprehension else 1
        count, length = per_batch * len(batches[0]), batches[0][0].length
        iterators = [_with_unconditional(chunk) for chunk in batches]
        with adapters_off(self.model):
            step = ScoringStep(self.scoring, self.requirements.beginnings)
            scores = forward_only(self.model, step, iterators, count, length)
        # Only the last stage has scores, and only it looks them up; its last chunk's batches are the ones it uses.
        self._values = {
            batch.pairs.key: _log_probs(*values)
            for batch, values in zip(batches[-1], itertools.batched(scores, per_batch), strict=False)
        }


def _log_probs(conditional: Tensor, unconditional: Tensor | None = None) -> ReferenceLogProbs:
    """Of what ``ScoringStep`` has found, [P, 2] each, or [P, 4]."""
    whole, *beginnings = conditional.split(2, dim=1)
    return ReferenceLogProbs(whole, None if unconditional is None else unconditional[:, :2], *beginnings)


def _with_unconditional(batches: list[PackBatch]) -> Iterator[PackBatch]:
    for batch in batches:
        yield _conditional(batch)
        if batch.unconditional is not None:
            yield batch.unconditional


def _conditional(batch: PackBatch) -> PackBatch:
    """It alone, so that the device does not get its answers after the empty prompt with it."""
    return dataclasses.replace(batch, unconditional=None)


@dataclass(frozen=True)
class Groups:
    """What is to be scored: the answers of a group after its prompt, or after another one. n groups.

    All kinds go through the model in one pass, in whichever packs have room for them.
    """

    ids: IntArray  # [n] group ids
    after: IntArray  # [n] ``PromptKind``

    @classmethod
    def of(cls, ids: IntArray, after: PromptKind) -> Groups:
        """All after the same kind of prompt."""
        return cls(ids, np.full_like(ids, after))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, some: slice | IntArray) -> Groups:
        return Groups(self.ids[some], self.after[some])


@dataclass(frozen=True)
class Block:
    """Groups that are scored together, whatever is scored before or after them: their packs are theirs alone."""

    groups: Groups
    packs: list[IntArray]  # places among the groups; equally many for every data-parallel rank
    length: int  # positions of every pack
    tokens: int


@dataclass(frozen=True)
class GroupScorer:
    """Scores groups with a model that stays as it is meanwhile, each once, packed as tightly as they go.

    Attributes:
        step: a forward step that collects [P, ``columns``] of each pack's pairs.
        make: makes packs of the pool's groups; its limit is a multiple of ``unit``.
        unit: the packs' lengths are multiples of this.
        length: of packs, a multiple of ``unit``. With pipeline stages or ``fixed_length`` no group may be longer.
        alone: every group has a pack of its own.
        fixed_length: all packs are ``length`` long.
        with_adapters: of a model that has some; a reference is without them.
        columns: of a pair, chosen and rejected in turns.
    """

    model: list[Any]
    step: Callable[..., Any]
    make: PackMaker
    unit: int
    length: int
    alone: bool
    fixed_length: bool
    with_adapters: bool = False
    columns: int = 2

    def blocks(self, groups: Groups) -> Iterator[Block]:
        """The groups in their order, block by block. A block has a pack for every pipeline stage of every replica.

        How a block is packed depends on its groups, ``length`` and the number of data-parallel ranks and pipeline
        stages, and on nothing else: what is scored in several goes has the bits of what is scored in one.
        """
        sizes = self._sizes(groups)
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        packs = parallel_state.get_data_parallel_world_size() * stages  # interleaved stages take them in groups
        singly = (slice(first, first + packs) for first in range(0, len(groups), packs))
        for cut in singly if self.alone else cut_into_blocks(sizes, self.length, packs):
            yield self._block(groups[cut], sizes[cut], packs, same_length=self.fixed_length or stages > 1)

    def _block(self, groups: Groups, sizes: IntArray, packs: int, *, same_length: bool) -> Block:
        ids = np.arange(len(groups))
        limit = max(self.length, round_up(int(sizes.max()), self.unit))
        if self.alone:
            packed, length = [*ids[:, None], *[ids[:0]] * (packs - len(ids))], round_up(int(sizes.max()), self.unit)
        else:
            packed, length = pack_evenly(ids, sizes, limit, packs, self.unit)
        # Pipeline stages exchange packs in messages of one size, and one call has those of several blocks.
        return Block(groups, packed, self.length if same_length else length, int(sizes.sum()))

    def __call__(self, blocks: Sequence[Block]) -> FloatArray:
        """[p, 2] of chosen and rejected of the pairs of all blocks' groups, in their order, on every rank: log-probs in
        nats. Collective."""
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        starts = np.cumsum([0, *(len(block.groups) for block in blocks)])
        own = [
            (block, pack, start + pack)
            for block, start in zip(blocks, starts, strict=False)
            for pack in block.packs[rank::ranks]
        ]
        made = (self._pack(block.groups[pack], block.length) for block, pack, _ in own)
        made_once = list(itertools.tee(made, len(self.model)))
        with contextlib.nullcontext() if self.with_adapters else adapters_off(self.model):
            scores = forward_only(self.model, self.step, made_once, len(own), blocks[0].length)
        ids = np.concatenate([block.groups.ids for block in blocks])
        first = np.searchsorted(self.make.pool.grouping.pairs_and_places(ids)[1], np.arange(len(ids) + 1))
        result = np.zeros((int(first[-1]), self.columns))
        if is_one_of_each_replica():
            pairs = [np.arange(first[place], first[place + 1]) for _, _, places in own for place in places]
            if pairs:  # in one piece: the host waits once
                result[np.concatenate(pairs)] = torch.cat(scores).cpu().numpy()
        return sum_over_ranks(torch.from_numpy(result)).numpy()

    def _sizes(self, groups: Groups) -> IntArray:
        """[n] pack positions that each group takes."""
        pool = self.make.pool
        prompts = np.zeros(len(groups), np.int64)
        for kind in PromptKind:
            of_kind = groups.after == kind
            if of_kind.any():
                prompts[of_kind] = pool.prompts.lengths(groups.ids[of_kind], kind)
        lengths = pool.group_lengths(groups.ids).with_prompts(prompts)
        return lengths.positions(share_prompts=self.make.share_prompts)

    def _pack(self, groups: Groups, length: int) -> PackBatch:
        return self.make.mixed(groups.ids, groups.after, length)


def is_one_of_each_replica() -> bool:
    """Of the ranks that hold the same scores, exactly one counts them."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )
