"""SimPO: reference-free, on log-probs per token, with a target margin.

    L = -log sigmoid(beta (log pi_theta(y_w|x) / |y_w| - log pi_theta(y_l|x) / |y_l|) - gamma)

    w chosen, l rejected, |y| response tokens
    gamma = simpo_gamma, in the unit of the rewards (not divided by beta)

Source: arXiv 2405.14734, eq. 6. The default gamma of 0.5 is TRL's; of beta the authors took 2.0 or 2.5
(princeton-nlp/SimPO, README).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import NON_NEGATIVE, LossOptions, beta, nll_weight, option
from megatron_bdpo.losses.terms import add_nll, mean_log_probs, rewarded


@dataclass(frozen=True)
class SimpoOptions(LossOptions):
    beta: float = beta(2.0)
    simpo_gamma: float = option(0.5, "SimPO's target reward margin", NON_NEGATIVE)
    nll_weight: float = nll_weight()


def simpo(pairs: PairLogProbs, options: SimpoOptions) -> PairLosses:
    """SimPO per pair, [P], in nats; rewards beta log pi_theta(y_i|x) / |y_i|."""
    mean_w, mean_l = mean_log_probs(pairs)
    loss = -logsigmoid(options.beta * (mean_w - mean_l) - options.simpo_gamma)
    return add_nll(rewarded(loss, options.beta, mean_w, mean_l), pairs, options.nll_weight)


SPEC = LossSpec(
    name="simpo",
    function=simpo,
    options=SimpoOptions,
    requirements=lambda options: Requirements(length_normalised=True),
    summary="Simple Preference Optimization: reference-free, length-normalised, with a margin",
    source="arXiv 2405.14734, eq. 6",
)
