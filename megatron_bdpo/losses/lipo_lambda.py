"""LiPO-lambda: DPO on all pairs of a group, weighted by what swapping the two would change of the ranking's DCG.

    L         = -sum_{psi_i > psi_j} lambda_ij log sigmoid(r_i - r_j),   r_i = beta Delta_i
    lambda_ij = |2^psi_i - 2^psi_j| |1 / log2(1 + rank_i) - 1 / log2(1 + rank_j)|

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response
    rank_i  = 1 for the highest reward r, as they are now; lambda carries no gradient
    psi_i   = the label of answer i, by lipo_labels:
              win-rate  its share of won comparisons with the others of the group, equal scores won by half
              score     its score as it is

Win rates are in [0, 1], as the paper's labels, which are how often a model prefers an answer. Of scores as they are,
ten points are a gain of 1024, and above 127 it overflows: such a loss is not finite, which ends the run. log2 is DCG's;
the paper writes log, which is a factor. A sum over pairs, not their mean.

Answers of equal reward could have any order among themselves: lambda is its mean over these. So it is where all are
equal, as at policy = reference, where a run begins; and so the order of a group's answers does not matter. For ranks,
rewards are rounded to 1e-4: at the first step they are rounding and nothing else, and would rank answers otherwise in
every layout. Of two answers L is DPO's times |2^psi_w - 2^psi_l| (1 - 1 / log2(3)).

Source: LiPO, arXiv 2402.01878, eq. 8. We know it from published re-implementations, which agree on the sum, the gain
2^psi - 1, the discount log(1 + rank) and ranks by the rewards; of the paper's text we have none. (Some take the mean
over pairs.) Win rates of scores, and the mean over the orders of equal rewards, are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, Requirements
from megatron_bdpo.losses.group_terms import add_best_nll, differences, group_log_ratios
from megatron_bdpo.losses.groups import GroupLogProbs, GroupLosses
from megatron_bdpo.losses.options import LossOptions, beta, nll_weight, option


@dataclass(frozen=True)
class LipoOptions(LossOptions):
    beta: float = beta()
    lipo_labels: Literal["win-rate", "score"] = option(
        "win-rate", "what the gain 2^label of an answer is of: the share of the others that it beats, or its score"
    )
    nll_weight: float = nll_weight()


def gains(groups: GroupLogProbs, labels: str) -> Tensor:
    """2^psi [G, K] in the policy's dtype. Of cleared groups."""
    if labels == "score":
        return torch.exp2(groups.score.to(groups.policy.dtype))
    pairs, others = groups.pairs(), groups.present.sum(1, keepdim=True) - 1
    won, lost = pairs.sum(2).to(groups.policy.dtype), pairs.sum(1)
    return torch.exp2((others + won - lost) / (2 * others.clamp(min=1)))


@torch.no_grad()
def discount_gaps(reward: Tensor, present: Tensor) -> Tensor:
    """[G, K, K]: |1 / log2(1 + rank_i) - 1 / log2(1 + rank_j)|, the mean over the orders of equal rewards.

    Answers of one reward hold a block of ranks. Of two blocks one is above the other, so that the mean of the gaps is
    the gap of the means; within one, it is the mean over its pairs of ranks.

    Args:
        reward: [G, K].
        present: bool, [G, K].
    """
    there = present[:, None, :]
    above = (there & (reward[:, None, :] > reward[:, :, None])).sum(2)
    size = (there & (reward[:, None, :] == reward[:, :, None])).sum(2).clamp(min=1)

    place = torch.arange(reward.shape[1], device=reward.device)
    discount = 1 / torch.log2(place.to(reward.dtype) + 2)
    nth = place - above[:, :, None]  # [G, K, ranks]: how far into the block of answer i
    block = torch.where((nth >= 0) & (nth < size[:, :, None]), discount, 0)
    within = (block * (size[:, :, None] - 1 - 2 * nth)).sum(2) / (size * (size - 1) / 2).clamp(min=1)

    same = reward[:, :, None] == reward[:, None, :]
    return torch.where(same, within[:, :, None], differences(block.sum(2) / size).abs())


#: Rewards closer than this are equal where answers are ranked by them.
_SAME = 1e-4


def lipo_lambda(groups: GroupLogProbs, options: LipoOptions) -> GroupLosses:
    """LiPO-lambda per group, [G], in nats; rewards beta Delta_i. Metric: `lambda`, the sum of a group's weights."""
    groups = groups.cleared()
    reward = options.beta * group_log_ratios(groups)
    gain = differences(gains(groups, options.lipo_labels)).abs()
    ranked = torch.round(reward / _SAME)
    weight = torch.where(groups.pairs(), gain * discount_gaps(ranked, groups.present), 0)
    loss = -(weight * logsigmoid(differences(reward))).sum((1, 2))
    metrics = {"lambda": weight.sum((1, 2))}
    return add_best_nll(GroupLosses(loss, reward.detach(), metrics), groups, options.nll_weight)


SPEC = LossSpec(
    name="lipo_lambda",
    function=lipo_lambda,
    options=LipoOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="LiPO-lambda: all pairs of a group, weighted by their effect on the ranking's DCG",
    source="arXiv 2402.01878, eq. 8",
    elsewhere=("lipo",),
    jumps=True,
    takes="groups",
)
