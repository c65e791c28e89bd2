"""TPO: the second best answer against the worst, reference-free, held in place by the NLL of the best, the gold one.

    L = -log sigmoid(beta (s_w - s_l) - gamma) + nll_weight NLL_gold

    s_i      = log pi_theta(y_i|x), summed over the response; of TPO-L (tpo_length_normalized) divided by |y_i|
    NLL_gold = -log pi_theta(y_gold|x) / |y_gold|
    gold the answer of highest score, w the second, l the lowest; nll_weight is the paper's alpha
    gamma    = tpo_gamma, of TPO-L, in the unit of the rewards (not divided by beta)

Where several answers could be w or l, having equal scores, the preference term is its mean over them; NLL likewise.
Where the second score is the lowest, as of two answers, there is none to be w beside gold: gold is w, and the loss is
`cpo`, TPO-L with its margin `simpo` and the NLL. So the order of a group's answers does not matter, and pairs are not
left without a preference.

Source: arXiv 2405.16681, in the form of its code. alpha 1 and beta 0.01 are the script's in sahsaeedi/TPO; its table
has alpha 0.05 for instruct models, and TPO-L with beta 0.01 to 10 and gamma 0.3 to 10. Of UltraFeedback's scores the
authors take ``argmax`` as gold, ``argsort()[-2]`` as w and ``argmin`` as l (`utils/dataset.py` in
sahsaeedi/triple-preference-optimization), so that of two best ones w may be gold, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, Requirements
from megatron_bdpo.losses.group_terms import add_best_nll, differences
from megatron_bdpo.losses.groups import GroupLogProbs, GroupLosses, pair_mean
from megatron_bdpo.losses.options import NON_NEGATIVE, LossOptions, beta, nll_weight, option


@dataclass(frozen=True)
class TpoOptions(LossOptions):
    beta: float = beta(0.01)
    tpo_length_normalized: bool = option(False, "TPO-L: compare log-probs per token")
    tpo_gamma: float = option(
        0.0, "TPO-L's target reward margin", NON_NEGATIVE, only_with=("tpo_length_normalized", True)
    )
    nll_weight: float = nll_weight(1.0)


def compared(groups: GroupLogProbs) -> Tensor:
    """bool [G, K, K]: whether answer i may be w and answer j l."""
    pairs, worst = groups.pairs(), groups.worst()
    second = (pairs.sum(1) == 1) & ~worst
    chosen = torch.where(second.any(1, keepdim=True), second, groups.best())
    return pairs & chosen[:, :, None] & worst[:, None, :]


def tpo(groups: GroupLogProbs, options: TpoOptions) -> GroupLosses:
    """TPO per group, [G], in nats; rewards beta s_i."""
    groups = groups.cleared()
    score = groups.policy / groups.tokens if options.tpo_length_normalized else groups.policy
    margins = options.beta * differences(score) - options.tpo_gamma
    loss = pair_mean(-logsigmoid(margins), compared(groups))
    return add_best_nll(GroupLosses(loss, options.beta * score.detach()), groups, options.nll_weight)


SPEC = LossSpec(
    name="tpo",
    function=tpo,
    options=TpoOptions,
    requirements=lambda options: Requirements(length_normalised=options.tpo_length_normalized),
    summary="Triple Preference Optimization: the second best answer against the worst, with the best one's NLL",
    source="arXiv 2405.16681",
    elsewhere=("tpo-l",),
    takes="groups",
)
