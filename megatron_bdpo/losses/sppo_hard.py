"""SPPO with hard labels: the log-ratios of both answers regressed to their targets.

    L = (Delta_w - 1 / (2 beta))^2 + (Delta_l + 1 / (2 beta))^2

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected
    beta    = the paper's 1 / eta; the chosen answer's probability of winning is taken as 1, the rejected one's as 0

Source: arXiv 2405.00675, eq. 4.7 with these probabilities; the form of TRL.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import LossOptions, beta, nll_weight
from megatron_bdpo.losses.terms import add_nll, log_ratios, rewarded


@dataclass(frozen=True)
class SppoOptions(LossOptions):
    beta: float = beta()
    nll_weight: float = nll_weight()


def sppo_hard(pairs: PairLogProbs, options: SppoOptions) -> PairLosses:
    """SPPO per pair, [P], in squared nats; rewards beta Delta_i."""
    delta_w, delta_l = log_ratios(pairs)
    target = 1 / (2 * options.beta)
    loss = (delta_w - target).square() + (delta_l + target).square()
    return add_nll(rewarded(loss, options.beta, delta_w, delta_l), pairs, options.nll_weight)


SPEC = LossSpec(
    name="sppo_hard",
    function=sppo_hard,
    options=SppoOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="Self-Play Preference Optimization with hard labels: log-ratios regressed to +-1/(2 beta)",
    source="arXiv 2405.00675, eq. 4.7",
)
