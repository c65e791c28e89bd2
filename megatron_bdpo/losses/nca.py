"""NCA: noise contrastive alignment of a group, each answer against its own reference, by its score.

    L   = -sum_i ( p_i log sigmoid(r_i) + 1/k log sigmoid(-r_i) ),   r_i = beta Delta_i
    p_i = softmax(score / alpha)_i

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; k answers in the group
    alpha   = nca_alpha, in the unit of the scores; towards 0 the best answer takes all

Where all scores are equal, p_i = 1/k and L is least at the reference. Of two answers it is p_w times `nca_pair` of the
pair plus p_l times that of the pair swapped: with the scores far apart, `nca_pair`.

Source: arXiv 2402.05369. alpha: see `infonca`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, Requirements
from megatron_bdpo.losses.group_terms import add_best_nll, group_log_ratios
from megatron_bdpo.losses.groups import GroupLogProbs, GroupLosses, answer_mean
from megatron_bdpo.losses.infonca import nca_alpha, targets
from megatron_bdpo.losses.options import LossOptions, beta, nll_weight


@dataclass(frozen=True)
class GroupNcaOptions(LossOptions):
    beta: float = beta()
    nca_alpha: float = nca_alpha()
    nll_weight: float = nll_weight()


def nca(groups: GroupLogProbs, options: GroupNcaOptions) -> GroupLosses:
    """NCA per group, [G], in nats; rewards beta Delta_i."""
    groups = groups.cleared()
    reward = options.beta * group_log_ratios(groups)
    up = (targets(groups, options.nca_alpha) * logsigmoid(reward)).sum(1)
    loss = -up - answer_mean(logsigmoid(-reward), groups.present)
    return add_best_nll(GroupLosses(loss, reward.detach()), groups, options.nll_weight)


SPEC = LossSpec(
    name="nca",
    function=nca,
    options=GroupNcaOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="Noise Contrastive Alignment on scores: each answer against its own reference",
    source="arXiv 2402.05369",
    elsewhere=("NCA",),
    takes="groups",
)
