"""What is trained on what: loss, pairs, step plan."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.context import ContextRank
from megatron_bdpo.data.labels import labelled_sides
from megatron_bdpo.data.pool import PairPool
from megatron_bdpo.data.prompt_kinds import PromptKind
from megatron_bdpo.data.prompts import EvalPrompts
from megatron_bdpo.data.selection import Selection
from megatron_bdpo.data.step_plan import IntArray, StepPlan
from megatron_bdpo.losses import LossFunction
from megatron_bdpo.training.batches import PackMaker


@dataclass(frozen=True)
class PairJob:
    """What is trained on what. The same on every rank.

    Attributes:
        plan: the optimizer steps.
        train, held_out: groups of the pool.
        split: digest of --eval-share's choice; empty where it follows from the number of pairs and --seed.
        eval_packs: packs of the held-out groups, a multiple of the data-parallel ranks; empty without held-out pairs.
        eval_length: the length that all of these have.
        sizes: [G] pack positions of every group of the pool.
        cache_dir: where tokens and reference values are kept.
        max_pack_length: the longest pack that the user allows; those of the plan may all be shorter.
        fixed_length: no pack is, also where the reference is scored.
        over_pairs: a step's loss is the mean over its pairs; otherwise over its groups, of the mean over their pairs.
        padding_token: of a reward model, the token that no answer ends with; see ``data.packs.lay_out``.
        prompts: that the policy answers at every evaluation, if there are any.
    """

    loss: LossFunction
    pool: PairPool
    train: Selection
    held_out: Selection
    split: str
    plan: StepPlan
    eval_packs: list[IntArray]
    eval_length: int
    sizes: IntArray
    cache_dir: Path
    share_prompts: bool
    resident: bool
    context_parallel: int
    max_pack_length: int
    fixed_length: bool
    over_pairs: bool
    padding_token: int | None
    prompts: EvalPrompts | None

    def pack_maker(self, context: ContextRank) -> PackMaker:
        """Makes the packs of training and evaluation, as a context-parallel rank sees them."""
        unconditional = self.resident and self.loss.requirements.comprehension
        return PackMaker(
            self.pool,
            self.max_pack_length,
            self.share_prompts,
            unconditional,
            self.padding_token,
            context,
            self.over_pairs,
            self.loss.spec.takes,
            with_cuts=self.loss.requirements.beginnings,
        )

    @functools.cached_property
    def sizes_after_other(self) -> IntArray:
        """[G] pack positions that each group takes after another group's prompt (``PromptKind.OTHER``)."""
        groups = np.arange(len(self.pool.grouping))
        lengths = self.pool.group_lengths(groups).with_prompts(self.pool.prompts.lengths(groups, PromptKind.OTHER))
        return lengths.positions(share_prompts=self.share_prompts)

    @functools.cached_property
    def fits_after_other(self) -> npt.NDArray[np.bool_]:
        """[G] whether that fits a pack. Groups that do not have no part in what mismatched answers are for."""
        return self.sizes_after_other <= self.max_pack_length

    @functools.cached_property
    def training_pairs(self) -> int:
        """Number of pairs to train on."""
        return len(self.pool.grouping.pairs_of(self.train.ids))

    @property
    def labelled_answers(self) -> tuple[int, int]:
        """Number of desirable and undesirable answers to train on, where pairs are read as such (``data.labels``)."""
        label = self.pool.pairs.label[self.pool.grouping.pairs_of(self.train.ids)]
        desirable, undesirable = labelled_sides(label).sum(axis=0).tolist()
        return desirable, undesirable

    @property
    def compared(self) -> int:
        """Number of losses over all training pairs: one for each of them, or for each group."""
        return len(self.train.ids) if self.loss.spec.takes == "groups" else self.training_pairs

    def groups_of_step(self, iteration: int) -> IntArray:
        """Ids of the groups of a step; steps are counted from 1."""
        return self.plan.steps[iteration - 1]

    def counted_in_step(self, iteration: int) -> int:
        """What the mean of a step is over: its groups, or its pairs."""
        groups = self.groups_of_step(iteration)
        return len(self.pool.grouping.pairs_of(groups)) if self.over_pairs else len(groups)

    def groups_in_use(self, evaluated_after: int | None) -> IntArray:
        """Ids of the groups that steps and evaluations read, in the order in which they come first.

        Args:
            evaluated_after: steps before the first evaluation; None: there is no evaluation.
        """
        steps, held_out = self.plan.steps, self.held_out.ids[: None if evaluated_after is not None else 0]
        return each_once(steps[:evaluated_after].ravel(), held_out, steps[evaluated_after:].ravel())


def each_once(*ids: IntArray) -> IntArray:
    """All ids, none below zero, each where it comes first."""
    every = np.concatenate(ids)
    first = np.zeros(every.max(initial=-1) + 1, np.int64)
    first[every[::-1]] = np.arange(len(every))[::-1]  # of equal indices the last one is kept
    return every[first[every] == np.arange(len(every))]


def unit_of_steps(pool: PairPool) -> str:
    """What steps are made of, in words."""
    return "groups" if len(pool.grouping) < len(pool) else pool.pairs.noun
