"""CPO: DPO with a uniform reference, held in place by the NLL of the chosen response.

    L = -log sigmoid(beta (log pi_theta(y_w|x) - log pi_theta(y_l|x))) + nll_weight NLL_w

    NLL_w = -log pi_theta(y_w|x) / |y_w|; w chosen, l rejected, |y| response tokens

Source: arXiv 2401.08417. The paper's L_NLL has weight 1, our default; its length normalisation is TRL's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import LossOptions, beta, nll_weight
from megatron_bdpo.losses.terms import add_nll, rewarded


@dataclass(frozen=True)
class CpoOptions(LossOptions):
    beta: float = beta()
    nll_weight: float = nll_weight(1.0)


def cpo(pairs: PairLogProbs, options: CpoOptions) -> PairLosses:
    """CPO per pair, [P], in nats; rewards beta log pi_theta(y_i|x)."""
    loss = -logsigmoid(options.beta * (pairs.policy_chosen - pairs.policy_rejected))
    return add_nll(rewarded(loss, options.beta, pairs.policy_chosen, pairs.policy_rejected), pairs, options.nll_weight)


SPEC = LossSpec(
    name="cpo",
    function=cpo,
    options=CpoOptions,
    requirements=lambda options: Requirements(),
    summary="Contrastive Preference Optimization: reference-free, with an NLL term",
    source="arXiv 2401.08417",
)
