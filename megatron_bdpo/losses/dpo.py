"""DPO, and with label smoothing cDPO.

    z = beta (Delta_w - Delta_l)
    L = -(1 - epsilon) log sigmoid(z) - epsilon log sigmoid(-z)

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected
    epsilon = label_smoothing, the assumed share of swapped pairs; 0 is DPO

Source: DPO, arXiv 2305.18290, eq. 7; cDPO, ericmitchell.ai/cdpo.pdf, eq. 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import LossOptions, beta, label_smoothing, nll_weight
from megatron_bdpo.losses.terms import add_nll, log_ratios, rewarded


@dataclass(frozen=True)
class DpoOptions(LossOptions):
    beta: float = beta()
    label_smoothing: float = label_smoothing()
    nll_weight: float = nll_weight()


def dpo(pairs: PairLogProbs, options: DpoOptions) -> PairLosses:
    """DPO per pair, [P], in nats; rewards beta Delta_i."""
    delta_w, delta_l = log_ratios(pairs)
    epsilon = options.label_smoothing
    z = options.beta * (delta_w - delta_l)
    loss = -(1 - epsilon) * logsigmoid(z) - epsilon * logsigmoid(-z)
    return add_nll(rewarded(loss, options.beta, delta_w, delta_l), pairs, options.nll_weight)


SPEC = LossSpec(
    name="dpo",
    function=dpo,
    options=DpoOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="Direct Preference Optimization; with label smoothing, cDPO",
    source="arXiv 2305.18290, eq. 7",
    elsewhere=("sigmoid", "cdpo"),
    of_difference=True,
)
