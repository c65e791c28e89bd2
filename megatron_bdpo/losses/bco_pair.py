"""BCO on pairs: a binary classifier of each answer by its reward.

    L = -log sigmoid(r_w) - log sigmoid(-r_l),   r_i = beta Delta_i

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected

The paper shifts both rewards by a running mean of them; this form, as TRL's DPOTrainer has it, does not: each pair's
loss is its own.

Source: arXiv 2404.04656.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import LossOptions, beta, nll_weight
from megatron_bdpo.losses.terms import add_nll, log_ratios, rewarded


@dataclass(frozen=True)
class BcoOptions(LossOptions):
    beta: float = beta()
    nll_weight: float = nll_weight()


def bco_pair(pairs: PairLogProbs, options: BcoOptions) -> PairLosses:
    """BCO per pair, [P], in nats; rewards beta Delta_i."""
    delta_w, delta_l = log_ratios(pairs)
    loss = -logsigmoid(options.beta * delta_w) - logsigmoid(-options.beta * delta_l)
    return add_nll(rewarded(loss, options.beta, delta_w, delta_l), pairs, options.nll_weight)


SPEC = LossSpec(
    name="bco_pair",
    function=bco_pair,
    options=BcoOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="Binary Classifier Optimization on pairs, rewards not shifted",
    source="arXiv 2404.04656",
)
