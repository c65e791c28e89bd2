"""NCA on pairs: noise contrastive alignment, which holds the chosen answer's own likelihood up.

    L = -log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l),   r_i = beta Delta_i

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected

Source: arXiv 2402.05369, the loss for K = 2 answers, hard labels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import LossOptions, beta, nll_weight
from megatron_bdpo.losses.terms import add_nll, log_ratios, rewarded


@dataclass(frozen=True)
class NcaOptions(LossOptions):
    beta: float = beta()
    nll_weight: float = nll_weight()


def nca_pair(pairs: PairLogProbs, options: NcaOptions) -> PairLosses:
    """NCA per pair, [P], in nats; rewards beta Delta_i."""
    delta_w, delta_l = log_ratios(pairs)
    r_w, r_l = options.beta * delta_w, options.beta * delta_l
    loss = -logsigmoid(r_w) - 0.5 * logsigmoid(-r_w) - 0.5 * logsigmoid(-r_l)
    return add_nll(rewarded(loss, options.beta, delta_w, delta_l), pairs, options.nll_weight)


SPEC = LossSpec(
    name="nca_pair",
    function=nca_pair,
    options=NcaOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="Noise Contrastive Alignment: each answer against its own reference, the chosen one held up",
    source="arXiv 2402.05369",
)
