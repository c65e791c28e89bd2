"""The few expressions that losses of groups share. Groups are `cleared`; symbols as in `groups.GroupLogProbs`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.groups import GroupLogProbs, GroupLosses, answer_mean
from megatron_bdpo.losses.terms import required


def group_log_ratios(groups: GroupLogProbs) -> Tensor:
    """Delta [G, K], Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), in nats."""
    return groups.policy - required(groups.reference, "reference")


def differences(values: Tensor) -> Tensor:
    """[G, K, K]: values_i - values_j of [G, K]."""
    return values[:, :, None] - values[:, None, :]


def plackett_luce(margins: Tensor, pairs: Tensor) -> Tensor:
    """[G]: minus the log-likelihood of the ranking, whose best answer is drawn first, then the best of the rest.

    Each answer stands against all that have a lower score, not against those of the same:
    sum_i log(1 + sum_{j: score_j < score_i} exp(-margin_ij)).

    Args:
        margins: r_i - r_j, [G, K, K].
        pairs: `GroupLogProbs.pairs`, [G, K, K].
    """
    smallest = torch.finfo(margins.dtype).min  # finite: where nobody is lower, no log-sum-exp of nothing
    against = torch.where(pairs, -margins, smallest).logsumexp(2)
    return -logsigmoid(-against).sum(1)


def add_best_nll(losses: GroupLosses, groups: GroupLogProbs, weight: float) -> GroupLosses:
    """loss + weight * NLL, NLL = -log pi_theta(y|x) / |y| of the best answer, in nats per token; also a metric, `nll`.

    The mean over the best where several have the highest score. As `terms.add_nll` of pairs.
    """
    if weight == 0:
        return losses
    nll = answer_mean(-groups.policy / groups.tokens, groups.best())
    return replace(losses, loss=losses.loss + weight * nll, metrics={**losses.metrics, "nll": nll.detach()})
