"""EXO on pairs: the reverse KL of the policy's preference to a smoothed label.

    z = beta (Delta_w - Delta_l),   q_w = sigmoid(z),   q_l = sigmoid(-z)
    L = q_w log(q_w / (1 - epsilon)) + q_l log(q_l / epsilon)

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected
    epsilon = label_smoothing, above 0: at 0 the divergence is infinite. The loss is least, 0, at q_l = epsilon

Source: arXiv 2402.00856, eq. 16. The default epsilon of 1e-3 is what the paper recommends
(TRL's documentation of `label_smoothing`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import BELOW_HALF_NOT_0, LossOptions, beta, nll_weight, option
from megatron_bdpo.losses.terms import add_nll, log_ratios, rewarded


@dataclass(frozen=True)
class ExoOptions(LossOptions):
    beta: float = beta()
    label_smoothing: float = option(
        1e-3, "assumed share of pairs whose chosen and rejected are swapped", BELOW_HALF_NOT_0
    )
    nll_weight: float = nll_weight()


def exo_pair(pairs: PairLogProbs, options: ExoOptions) -> PairLosses:
    """EXO per pair, [P], in nats; rewards beta Delta_i."""
    delta_w, delta_l = log_ratios(pairs)
    epsilon = options.label_smoothing
    z = options.beta * (delta_w - delta_l)
    chosen = z.sigmoid() * (logsigmoid(z) - math.log1p(-epsilon))
    rejected = (-z).sigmoid() * (logsigmoid(-z) - math.log(epsilon))
    return add_nll(rewarded(chosen + rejected, options.beta, delta_w, delta_l), pairs, options.nll_weight)


SPEC = LossSpec(
    name="exo_pair",
    function=exo_pair,
    options=ExoOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="Efficient Exact Optimization: the reverse KL to smoothed labels",
    source="arXiv 2402.00856, eq. 16",
    of_difference=True,
)
