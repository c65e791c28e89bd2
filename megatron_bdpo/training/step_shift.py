"""Losses of labelled answers that look at whole steps: what all of a step's losses share, found just before it.

It is a number, as KTO's estimate of the KL divergence, from a pass of the policy, forward only, over the step's answers
after their own prompts, or after other ones. An evaluation has one of its own, over all that is held out. The same on
every rank, and in every layout, up to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_bdpo.data.labels import labelled_sides
from megatron_bdpo.data.prompt_kinds import PromptKind
from megatron_bdpo.losses import AnswerLogProbs, LossFunction
from megatron_bdpo.training.answer_step import AnswerStep
from megatron_bdpo.training.batches import IntArray
from megatron_bdpo.training.finite import check_shift
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.reference.passes import FloatArray, Groups, GroupScorer, ReferenceTable

Pause = Callable[[], None]
"""Called between passes; what it raises ends them."""

Score = Callable[[Groups, Pause], FloatArray]
"""Log-probs [p, 2] of the pairs of some groups."""

#: Blocks of packs that a pass goes through: many enough to keep stages of a pipeline busy.
_BLOCKS = 4


class StepShift:
    """Asks ``LossSpec.step_shift`` once a step, and once an evaluation.

    Attributes:
        kind: the prompt that answers are scored after.
    """

    def __init__(self, job: PairJob, loss: LossFunction, policy: Score, reference: Score) -> None:
        self._job, self._loss, self._policy, self._reference = job, loss, policy, reference
        self.kind = PromptKind.OTHER if loss.requirements.mismatched else PromptKind.OWN

    def __call__(self, groups: IntArray, pause: Pause, step: AnswerStep | None = None) -> Tensor:
        """[] float64 on the device; 0 where nothing can be scored. Collective.

        Args:
            groups: of the step or evaluation, on all data-parallel ranks.
            step: the forward step that it is for, if that refuses numbers that are not finite.

        Raises:
            NotFiniteError, DivergedError: on every rank, with the answers that are to blame.
        """
        if self.kind == PromptKind.OTHER:
            groups = groups[self._job.fits_after_other[groups]]
        if not len(groups):
            return torch.zeros((), dtype=torch.float64).cuda()
        to_score, pool = Groups.of(groups, self.kind), self._job.pool
        pairs = pool.grouping.pairs_of(groups)
        sides = labelled_sides(pool.pairs.label[pairs])
        scores = {"policy": self._policy(to_score, pause), "reference": self._reference(to_score, pause)}
        policy, reference = (torch.from_numpy(values[sides]) for values in scores.values())
        tokens = torch.from_numpy(pool.pairs.scored[pairs][sides])
        desirable = torch.from_numpy(np.flatnonzero(sides) % 2 == 0)
        assert self._loss.spec.step_shift is not None
        answers = AnswerLogProbs(policy, tokens, desirable, reference=reference)
        found = self._loss.spec.step_shift(answers, self._loss.options)
        if step is not None and not bool(torch.isfinite(found)):
            self._refuse(scores, groups, step)
        return found.cuda()

    def _refuse(self, scores: Mapping[str, FloatArray], groups: IntArray, step: AnswerStep) -> None:
        """Name the answers of these groups that are to blame; see ``finite.check_shift``."""
        pool = self._job.pool
        pairs, place = pool.grouping.pairs_and_places(groups)

        def name(index: int) -> str:
            return step.describe(int(pairs[index]))

        def after(index: int) -> str:
            if self.kind == PromptKind.OWN:
                return ""
            other = int(pool.prompts.other_group[groups[place[index]]])
            return f", after the prompt of {pool.describe_group(other)}"

        counted, answers = labelled_sides(pool.pairs.label[pairs]), pool.answers_of(groups)[1].place
        check_shift(scores, counted, answers, name, after, step.place, step.suspect)

    def wrap(
        self, schedule: Callable[..., Any], step: AnswerStep, done: Callable[[], int], pause: Pause
    ) -> Callable[..., Any]:
        """A schedule before which the forward ``step`` gets its shift. An evaluation in portions gets it once.

        Args:
            done: says how many steps are done.
            pause: of an evaluation.
        """
        latest: list[tuple[bool, int]] = []

        def run(*args: Any, forward_only: bool = False, **kwargs: Any) -> Any:
            place = (forward_only, done())
            if [place] != latest or not forward_only:
                refuses = step if step.check_nan else None
                if forward_only:
                    step.shift = self(self._job.held_out.ids, pause, refuses)
                else:
                    step.shift = self(self._job.groups_of_step(done() + 1), lambda: None, refuses)
                latest[:] = [place]
            return schedule(*args, forward_only=forward_only, **kwargs)

        return run


def values_of(table: ReferenceTable, job: PairJob) -> Score:
    """What a table of log-probs says of groups."""

    def look_up(groups: Groups, pause: Pause) -> FloatArray:
        kinds = {PromptKind.OWN: table.conditional, PromptKind.OTHER: table.mismatched}
        values = kinds[PromptKind(int(groups.after[0]))]
        assert values is not None, "the loss requires it"
        return values[job.pool.grouping.pairs_of(groups.ids)]

    return look_up


def passes_of(scorer: GroupScorer) -> Score:
    """What a model says of groups, as it is now."""

    def score(groups: Groups, pause: Pause) -> FloatArray:
        found = []
        for blocks in itertools.batched(scorer.blocks(groups), _BLOCKS):
            pause()
            found.append(scorer(blocks))
        return np.concatenate(found)

    return score
