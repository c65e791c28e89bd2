"""Hinge loss on the log-ratios: SLiC's margin with DPO's reward.

    L = max(0, 1 - beta (Delta_w - Delta_l))

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected

Source: SLiC-HF, arXiv 2305.10425; in this normalised form RSO, arXiv 2309.06657.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import LossOptions, beta, nll_weight
from megatron_bdpo.losses.terms import add_nll, log_ratios, rewarded


@dataclass(frozen=True)
class HingeOptions(LossOptions):
    beta: float = beta()
    nll_weight: float = nll_weight()


def hinge(pairs: PairLogProbs, options: HingeOptions) -> PairLosses:
    """Hinge loss per pair, [P]; rewards beta Delta_i. No gradient once the margin is reached."""
    delta_w, delta_l = log_ratios(pairs)
    loss = torch.relu(1 - options.beta * (delta_w - delta_l))
    return add_nll(rewarded(loss, options.beta, delta_w, delta_l), pairs, options.nll_weight)


SPEC = LossSpec(
    name="hinge",
    function=hinge,
    options=HingeOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="SLiC's hinge loss on DPO's log-ratios",
    source="arXiv 2305.10425, arXiv 2309.06657",
    elsewhere=("slic", "slic_hf"),
    of_difference=True,
)
