"""Robust DPO (rDPO): an unbiased estimate of the DPO loss under randomly swapped labels.

    z = beta (Delta_w - Delta_l)
    L = [-(1 - epsilon) log sigmoid(z) + epsilon log sigmoid(-z)] / (1 - 2 epsilon)

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected
    epsilon = label_smoothing, the assumed share of swapped pairs, below 1/2. Unlike cDPO's it may make L negative.

Source: arXiv 2403.00409. The default epsilon of 0.1 is what the paper recommends (TRL's documentation of
`label_smoothing`); at 0 rDPO is DPO.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import LossOptions, beta, label_smoothing, nll_weight
from megatron_bdpo.losses.terms import add_nll, log_ratios, rewarded


@dataclass(frozen=True)
class RobustOptions(LossOptions):
    beta: float = beta()
    label_smoothing: float = label_smoothing(0.1)
    nll_weight: float = nll_weight()


def robust(pairs: PairLogProbs, options: RobustOptions) -> PairLosses:
    """rDPO per pair, [P], in nats; rewards beta Delta_i."""
    delta_w, delta_l = log_ratios(pairs)
    epsilon = options.label_smoothing
    z = options.beta * (delta_w - delta_l)
    loss = (-(1 - epsilon) * logsigmoid(z) + epsilon * logsigmoid(-z)) / (1 - 2 * epsilon)
    return add_nll(rewarded(loss, options.beta, delta_w, delta_l), pairs, options.nll_weight)


SPEC = LossSpec(
    name="robust",
    function=robust,
    options=RobustOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="rDPO: DPO made unbiased under a known rate of swapped labels",
    source="arXiv 2403.00409",
    elsewhere=("rdpo", "robust_dpo"),
    of_difference=True,
)
