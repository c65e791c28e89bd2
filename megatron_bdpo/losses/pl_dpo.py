"""Plackett-Luce DPO: DPO on a whole ranking of answers.

    L = -sum_i log( e^{r_i} / (e^{r_i} + sum_{j: score_j < score_i} e^{r_j}) ),   r_i = beta Delta_i

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response

Of two answers it is DPO. Answers of equal score are not compared: each stands against those below both, so that their
order does not matter, and a group whose scores are all equal has no loss. A sum over the ranking, as in the paper: of k
answers k - 1 comparisons.

Source: DPO, arXiv 2305.18290, appendix A.3. It has no ties; how they are read is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bdpo.losses.base import LossSpec, Requirements
from megatron_bdpo.losses.group_terms import add_best_nll, differences, group_log_ratios, plackett_luce
from megatron_bdpo.losses.groups import GroupLogProbs, GroupLosses
from megatron_bdpo.losses.options import LossOptions, beta, nll_weight


@dataclass(frozen=True)
class PlackettLuceOptions(LossOptions):
    beta: float = beta()
    nll_weight: float = nll_weight()


def pl_dpo(groups: GroupLogProbs, options: PlackettLuceOptions) -> GroupLosses:
    """Plackett-Luce DPO per group, [G], in nats; rewards beta Delta_i."""
    groups = groups.cleared()
    delta = group_log_ratios(groups)
    loss = plackett_luce(options.beta * differences(delta), groups.pairs())
    return add_best_nll(GroupLosses(loss, options.beta * delta.detach()), groups, options.nll_weight)


SPEC = LossSpec(
    name="pl_dpo",
    function=pl_dpo,
    options=PlackettLuceOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="Plackett-Luce DPO: DPO on a ranking of any number of answers",
    source="arXiv 2305.18290, appendix A.3",
    takes="groups",
)
