"""The forward step of a loss of whole groups.

A step's loss is the mean over its groups. What is told of pairs beside it, as rewards and entropies, is told of the
pairs that --pairs-from makes.
"""

from __future__ import annotations

from torch import Tensor

from megatron_bdpo.losses import GroupLogProbs, GroupLosses
from megatron_bdpo.losses.groups import answer_mean, group_report
from megatron_bdpo.training.batches import PackBatch, PackTable
from megatron_bdpo.training.forward import LossInputs, PreferenceStep


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


class GroupStep(PreferenceStep):
    """``forward_step`` of a run whose loss takes groups."""

    def _inputs(self, batch: PackBatch, scores: Tensor) -> LossInputs:
        policy, entropy, _ = self.scoring.apart(scores)
        pairs, reference = batch.pairs, self.reference.lookup(batch)
        groups = groups_of(batch, policy, reference.conditional, reference.unconditional)
        return LossInputs(groups, pairs.group_weight, pairs.ids[pairs.first], entropy)

    def _rewards(self, batch: PackBatch, losses: GroupLosses) -> Tensor:
        return losses.reward.reshape(-1)[_table(batch).place]

    def _metrics(self, groups: GroupLogProbs, losses: GroupLosses) -> dict[str, Tensor]:
        """By the names of what is told of pairs."""
        found, policy = group_report(groups, losses), groups.policy.detach()
        return {
            "rewards/accuracies": found.accuracy,
            "rewards/margins": found.margin,
            "rewards/chosen": found.chosen,
            "rewards/rejected": found.rejected,
            "logps/chosen": answer_mean(policy, groups.best()),
            "logps/rejected": answer_mean(policy, groups.worst()),
        }
