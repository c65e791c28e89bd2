"""The forward step of a loss of whole groups, in the shape that ``forward.PreferenceStep`` has.

A step's loss is the mean over its groups. What is told of pairs beside it, as rewards and entropies, is told of the
pairs that --pairs-from makes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bdpo.losses import GroupLogProbs, GroupLosses
from megatron_bdpo.losses.groups import answer_mean, group_report
from megatron_bdpo.training.batches import PackBatch, PackTable
from megatron_bdpo.training.finite import check_losses
from megatron_bdpo.training.forward import PreferenceStep, Report, counted_here, entropy_report, report_of
from megatron_bdpo.training.reporting.quartiles import IMBALANCE, quartile_report


def groups_of(
    batch: PackBatch, policy: Tensor, reference: Tensor | None, unconditional: Tensor | None
) -> GroupLogProbs:
    """What the loss reads of a batch.

    Args:
        policy: [A] log-probs of the batch's answers.
        reference, unconditional: [P, 2] of its pairs, or None.
    """
    pairs, table = batch.pairs, _table(batch)

    def of_answers(sides: Tensor | None) -> Tensor | None:
        return None if sides is None else sides.reshape(-1)[table.source]

    answers = pairs.answers.reshape(-1)[table.source]
    return GroupLogProbs(
        policy[answers],
        batch.answer_tokens[answers],
        table.score,
        table.present,
        reference=of_answers(reference),
        unconditional=of_answers(unconditional),
        unsafe=of_answers(pairs.unsafe),
    )


def _table(batch: PackBatch) -> PackTable:
    assert batch.pairs.table is not None, "the pack was made for a loss of pairs"
    return batch.pairs.table


@dataclass
class GroupStep(PreferenceStep):
    """``forward_step`` of a run whose loss takes groups."""

    def _loss_func(self, batch: PackBatch, scores: Tensor) -> tuple[Tensor, Tensor, Report]:
        policy, entropy, _ = self.scoring.apart(scores)
        reference = self.reference.lookup(batch)
        groups = groups_of(batch, policy, reference.conditional, reference.unconditional)
        losses: GroupLosses = self.loss.spec.function(groups, self.loss.options)
        loss_sum = losses.loss.sum().float()
        if self.check_nan:
            one_of_each = batch.pairs.ids[batch.pairs.first]
            check_losses(losses.loss, groups, one_of_each, self.describe, self.place, self.suspect)
        if self.gate is not None:
            self.gate.observe_groups(groups, self.loss)
        if self.observe is not None and self.evaluates:
            self.observe(batch.pairs.ids, losses.reward.reshape(-1)[_table(batch).place])
        report = self._report(groups, losses)
        if entropy is not None:
            report |= entropy_report(entropy[batch.pairs.answers], batch.answer_tokens[batch.pairs.answers])
        return loss_sum, counted_here(batch, loss_sum.device), report

    def _report(self, groups: GroupLogProbs, losses: GroupLosses) -> Report:
        """The metrics of a batch, by the names of those of pairs."""
        found, weight = group_report(groups, losses), torch.ones(len(groups), device=losses.loss.device).double()
        main = {"loss": losses.loss, "rewards/accuracies": found.accuracy, "rewards/margins": found.margin}
        rewards = {"rewards/chosen": found.chosen, "rewards/rejected": found.rejected}
        policy = groups.policy.detach()
        log_probs = {
            "logps/chosen": answer_mean(policy, groups.best()),
            "logps/rejected": answer_mean(policy, groups.worst()),
        }
        report = report_of({**main, **rewards, **log_probs, **losses.metrics}, weight, len(groups))
        if self.imbalance_edges is not None:
            report |= quartile_report(main, losses.metrics[IMBALANCE], self.imbalance_edges, weight, len(groups))
        return report
