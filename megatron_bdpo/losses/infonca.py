"""InfoNCA: the softmax of a group's rewards drawn to the softmax of its scores.

    L   = -sum_i p_i log softmax(r)_i,   r_i = beta Delta_i
    p_i = softmax(score / alpha)_i

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response
    alpha   = nca_alpha, in the unit of the scores; towards 0 the best answer takes all

Of two answers it is DPO with label smoothing sigmoid(-(score_w - score_l) / alpha). Scores count by their size, not
only by their order: ranks are scores that fall by one each.

Source: arXiv 2402.05369. The authors' code has alpha 1e-4 (theirs is `temperature_alpha`); our default of 1 suits
scores of 1 to 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_bdpo.losses.base import LossSpec, Requirements
from megatron_bdpo.losses.group_terms import add_best_nll, group_log_ratios
from megatron_bdpo.losses.groups import GroupLogProbs, GroupLosses
from megatron_bdpo.losses.options import TEMPERATURE, LossOptions, beta, nll_weight, option


def nca_alpha() -> Any:
    """The temperature of the scores of `infonca` and `nca`."""
    return option(1.0, "temperature of the answers' scores: targets are softmax(score / alpha)", TEMPERATURE)


@dataclass(frozen=True)
class InfoNcaOptions(LossOptions):
    beta: float = beta()
    nca_alpha: float = nca_alpha()
    nll_weight: float = nll_weight()


def targets(groups: GroupLogProbs, alpha: float) -> Tensor:
    """p [G, K] in the policy's dtype, 0 where no answer is. Of cleared groups."""
    score, smallest = groups.score.to(groups.policy.dtype), torch.finfo(groups.policy.dtype).min
    highest = torch.where(groups.present, score, smallest).amax(1, keepdim=True)
    below = (score - highest) / alpha  # 0 of the best: never inf - inf
    return torch.where(groups.present, below, smallest).softmax(1)


def infonca(groups: GroupLogProbs, options: InfoNcaOptions) -> GroupLosses:
    """InfoNCA per group, [G], in nats; rewards beta Delta_i."""
    groups = groups.cleared()
    reward = options.beta * group_log_ratios(groups)
    smallest = torch.finfo(reward.dtype).min
    log_share = torch.where(groups.present, reward, smallest).log_softmax(1)
    loss = -(targets(groups, options.nca_alpha) * torch.where(groups.present, log_share, 0)).sum(1)
    return add_best_nll(GroupLosses(loss, reward.detach()), groups, options.nll_weight)


SPEC = LossSpec(
    name="infonca",
    function=infonca,
    options=InfoNcaOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="InfoNCA: the softmax of rewards drawn to the softmax of scores",
    source="arXiv 2402.05369",
    elsewhere=("InfoNCA",),
    takes="groups",
)
