"""APO: anchored preference optimization, which says where both answers shall go, not only which way apart.

    zero    L = sigmoid(-r_w) + sigmoid(r_l)              chosen up, rejected down
    down    L = sigmoid(r_w) + sigmoid(-(r_w - r_l))      both down, rejected further

    r_i     = beta Delta_i
    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected

`apo_zero` where the chosen answers are better than what the model says, `apo_down` where they are worse.

Source: arXiv 2408.06266, eqs. 7 and 8.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import LossOptions, beta, nll_weight
from megatron_bdpo.losses.terms import add_nll, log_ratios, rewarded


@dataclass(frozen=True)
class ApoOptions(LossOptions):
    beta: float = beta()
    nll_weight: float = nll_weight()


def apo_zero(pairs: PairLogProbs, options: ApoOptions) -> PairLosses:
    """APO-zero per pair, [P], between 0 and 2; rewards beta Delta_i."""
    delta_w, delta_l = log_ratios(pairs)
    loss = (-options.beta * delta_w).sigmoid() + (options.beta * delta_l).sigmoid()
    return add_nll(rewarded(loss, options.beta, delta_w, delta_l), pairs, options.nll_weight)


def apo_down(pairs: PairLogProbs, options: ApoOptions) -> PairLosses:
    """APO-down per pair, [P], between 0 and 2; rewards beta Delta_i."""
    delta_w, delta_l = log_ratios(pairs)
    loss = (options.beta * delta_w).sigmoid() + (-options.beta * (delta_w - delta_l)).sigmoid()
    return add_nll(rewarded(loss, options.beta, delta_w, delta_l), pairs, options.nll_weight)


ZERO = LossSpec(
    name="apo_zero",
    function=apo_zero,
    options=ApoOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="Anchored Preference Optimization for chosen answers better than the model's: one up, one down",
    source="arXiv 2408.06266, eq. 7",
)
DOWN = LossSpec(
    name="apo_down",
    function=apo_down,
    options=ApoOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="Anchored Preference Optimization for chosen answers worse than the model's: both down",
    source="arXiv 2408.06266, eq. 8",
)
