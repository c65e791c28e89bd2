"""AlphaPO: SimPO whose reward is a power of the length-normalised likelihood in the place of its logarithm.

    L   = -log sigmoid(r_w - r_l - gamma)
    r_i = beta (1 - p_i^-alpha) / alpha,   p_i = exp(log pi_theta(y_i|x) / |y_i|);   alpha = 0: beta log p_i, SimPO

    w chosen, l rejected, |y| response tokens
    gamma = simpo_gamma, in the unit of the rewards (not divided by beta)

p^-alpha overflows where the likelihood is tiny and alpha large: such a loss is not finite, which ends the run.

Source: arXiv 2501.03884, in the form of TRL's CPOTrainer. The default alpha of 0.25 is the paper's of
Mistral-Instruct, with beta 2.5, gamma 0.1 and a learning rate of 7e-7 (table 3, as TRL's page `paper_index`
has it); the other defaults are SimPO's. TRL's alpha is 0, SimPO.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import BOUNDED, NON_NEGATIVE, LossOptions, beta, nll_weight, option
from megatron_bdpo.losses.terms import add_nll, mean_log_probs, rewarded


@dataclass(frozen=True)
class AlphapoOptions(LossOptions):
    beta: float = beta(2.0)
    simpo_gamma: float = option(0.5, "SimPO's target reward margin", NON_NEGATIVE)
    alphapo_alpha: float = option(0.25, "AlphaPO's power of the likelihood; 0 is SimPO", BOUNDED)
    nll_weight: float = nll_weight()


def alphapo(pairs: PairLogProbs, options: AlphapoOptions) -> PairLosses:
    """AlphaPO per pair, [P], in nats; rewards r_i."""
    alpha = options.alphapo_alpha
    chosen, rejected = mean_log_probs(pairs)
    if alpha != 0:
        chosen, rejected = (-(-alpha * each).expm1() / alpha for each in (chosen, rejected))
    loss = -logsigmoid(options.beta * (chosen - rejected) - options.simpo_gamma)
    return add_nll(rewarded(loss, options.beta, chosen, rejected), pairs, options.nll_weight)


SPEC = LossSpec(
    name="alphapo",
    function=alphapo,
    options=AlphapoOptions,
    requirements=lambda options: Requirements(length_normalised=True),
    summary="AlphaPO: SimPO with a power of the likelihood as reward",
    source="arXiv 2501.03884",
)
