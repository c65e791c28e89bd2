"""The forward step of a loss of labelled answers.

A pair of the data is two labelled answers, and its loss the mean of theirs. So a step's loss is the mean over its
groups, or pairs, as it is with a loss of pairs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bdpo.losses import AnswerLogProbs, AnswerLosses
from megatron_bdpo.losses.answers import answer_report
from megatron_bdpo.training.batches import PackBatch, PackSides
from megatron_bdpo.training.forward import LossInputs, PreferenceStep, Report
from megatron_bdpo.training.reporting.part_means import part_report


def answers_of(batch: PackBatch, policy: Tensor, reference: Tensor | None) -> AnswerLogProbs:
    """What the loss reads of a batch.

    Args:
        policy: [A] log-probs of the batch's answers.
        reference: [P, 2] of its pairs, or None.
    """
    sides = _sides(batch)
    answers = batch.pairs.answers.reshape(-1)[sides.source]
    return AnswerLogProbs(
        policy[answers],
        batch.answer_tokens[answers],
        sides.desirable,
        reference=None if reference is None else reference.reshape(-1)[sides.source],
    )


def _sides(batch: PackBatch) -> PackSides:
    assert batch.pairs.sides is not None, "the pack was made for a loss of pairs"
    return batch.pairs.sides


@dataclass
class AnswerStep(PreferenceStep):
    """``forward_step`` of a run whose loss takes labelled answers."""

    shift: Tensor | None = None
    """[] what the loss has found for the whole step or evaluation: see ``step_shift``."""

    def _inputs(self, batch: PackBatch, scores: Tensor) -> LossInputs:
        policy, entropy, _ = self.scoring.apart(scores)
        answers = answers_of(batch, policy, self.reference.lookup(batch).conditional)
        sides = _sides(batch)
        shifted = dataclasses.replace(answers, shift=self.shift)
        return LossInputs(shifted, sides.weight, batch.pairs.ids[sides.pair], entropy)

    def _rewards(self, batch: PackBatch, losses: AnswerLosses) -> Tensor:
        rewards = losses.reward.new_full((2 * len(batch.pairs),), torch.nan)  # of a labelled answer one is missing
        return rewards.index_copy(0, _sides(batch).source, losses.reward).reshape(-1, 2)

    def _metrics(self, answers: AnswerLogProbs, losses: AnswerLosses) -> dict[str, Tensor]:
        return {"rewards/accuracies": answer_report(answers, losses).accuracy}

    def _side_metrics(self, batch: PackBatch, inputs: LossInputs, losses: AnswerLosses) -> Report:
        """Desirable answers are told of as chosen, undesirable ones as rejected."""
        answers: AnswerLogProbs = inputs.read
        values = {"rewards": losses.reward, "logps": answers.policy}
        if inputs.entropy is not None:
            values["entropy"] = inputs.entropy[batch.pairs.answers.reshape(-1)[_sides(batch).source]] / answers.tokens
        of_label = torch.stack([answers.desirable, ~answers.desirable])
        return part_report(values, of_label, ("chosen", "rejected"), inputs.weight, batch.pairs.count)
