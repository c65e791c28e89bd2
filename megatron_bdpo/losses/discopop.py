"""DiscoPOP, which a language model found: logistic where the margin is negative, exponential where it is positive.

    z = beta (Delta_w - Delta_l),   m = sigmoid(z / tau)
    L = -(1 - m) log sigmoid(z) + m e^-z

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected
    tau     = discopop_tau, at most 1: above it L grows without bound where the margin is negative

Source: arXiv 2406.08414, eq. 5; tau 0.05 is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import UP_TO_1, LossOptions, beta, nll_weight, option
from megatron_bdpo.losses.terms import add_nll, log_ratios, rewarded


@dataclass(frozen=True)
class DiscopopOptions(LossOptions):
    beta: float = beta()
    discopop_tau: float = option(0.05, "temperature at which DiscoPOP blends its two losses", UP_TO_1)
    nll_weight: float = nll_weight()


def discopop(pairs: PairLogProbs, options: DiscopopOptions) -> PairLosses:
    """DiscoPOP per pair, [P]; rewards beta Delta_i."""
    delta_w, delta_l = log_ratios(pairs)
    z = options.beta * (delta_w - delta_l)
    blend = z / options.discopop_tau
    exponential = (logsigmoid(blend) - z).exp()  # m e^-z, where e^-z alone may overflow
    loss = -(-blend).sigmoid() * logsigmoid(z) + exponential
    return add_nll(rewarded(loss, options.beta, delta_w, delta_l), pairs, options.nll_weight)


SPEC = LossSpec(
    name="discopop",
    function=discopop,
    options=DiscopopOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="DiscoPOP: logistic and exponential loss blended by the margin",
    source="arXiv 2406.08414, eq. 5",
    of_difference=True,
)
