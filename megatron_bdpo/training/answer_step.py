"""The forward step of a loss of labelled answers, in the shape that ``forward.PreferenceStep`` has.

A pair of the data is two labelled answers, and its loss the mean of theirs. So a step's loss is the mean over its
groups, or pairs, as it is with a loss of pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bdpo.losses import AnswerLogProbs, AnswerLosses
from megatron_bdpo.losses.answers import answer_report
from megatron_bdpo.training.batches import PackBatch, PackSides
from megatron_bdpo.training.finite import check_losses
from megatron_bdpo.training.forward import PreferenceStep, Report, counted_here, report_of
from megatron_bdpo.training.reporting.part_means import part_report


def answers_of(batch: PackBatch, policy: Tensor, reference: Tensor | None) -> AnswerLogProbs:
    """What the loss reads of a batch.

    Args:
        policy: [A] log-probs of the batch's answers.
        reference: [P, 2] of its pairs, or None.
    """
    sides = sides_of(batch)
    answers = batch.pairs.answers.reshape(-1)[sides.source]
    return AnswerLogProbs(
        policy[answers],
        batch.answer_tokens[answers],
        sides.desirable,
        reference=None if reference is None else reference.reshape(-1)[sides.source],
    )


def sides_of(batch: PackBatch) -> PackSides:
    """Which sides of the batch's pairs the answers are."""
    assert batch.pairs.sides is not None, "the pack was made for a loss of pairs"
    return batch.pairs.sides


@dataclass
class AnswerStep(PreferenceStep):
    """``forward_step`` of a run whose loss takes labelled answers."""

    shift: Tensor | None = None
    """[] what the loss has found for the whole step or evaluation: see ``step_shift``."""

    def _loss_func(self, batch: PackBatch, scores: Tensor) -> tuple[Tensor, Tensor, Report]:
        policy, entropy, _ = self.scoring.apart(scores)
        answers = answers_of(batch, policy, self.reference.lookup(batch).conditional)
        answers = dataclasses.replace(answers, shift=self.shift)
        losses: AnswerLosses = self.loss.spec.function(answers, self.loss.options)
        sides = sides_of(batch)
        loss_sum = (losses.loss * sides.weight.to(losses.loss.dtype)).sum().float()
        if self.check_nan:
            check_losses(losses.loss, answers, batch.pairs.ids[sides.pair], self.describe, self.place, self.suspect)
        if self.gate is not None:
            self.gate.observe_answers(answers, self.loss)
        if self.observe is not None and self.evaluates:
            rewards = losses.reward.new_full((2 * len(batch.pairs),), torch.nan)  # of a labelled answer one is missing
            self.observe(batch.pairs.ids, rewards.index_copy(0, sides.source, losses.reward).reshape(-1, 2))
        beside = {}
        if entropy is not None:
            of_answers = entropy[batch.pairs.answers.reshape(-1)[sides.source]]
            beside["entropy"] = of_answers / answers.tokens
        report = _report(answers, losses, sides, batch.pairs.count, beside)
        return loss_sum, counted_here(batch, loss_sum.device), report


def _report(
    answers: AnswerLogProbs, losses: AnswerLosses, sides: PackSides, count: int, beside: Mapping[str, Tensor]
) -> Report:
    """The metrics of a batch: of all answers, and of the desirable (chosen) and undesirable (rejected) ones.

    Args:
        beside: more of the latter, [N] each.
    """
    of_all = {"loss": losses.loss, "rewards/accuracies": answer_report(answers, losses).accuracy, **losses.metrics}
    report = report_of(of_all, sides.weight, count)
    of_label = torch.stack([answers.desirable, ~answers.desirable])
    parts = {"rewards": losses.reward, "logps": answers.policy, **beside}
    return report | part_report(parts, of_label, ("chosen", "rejected"), sides.weight, count)
