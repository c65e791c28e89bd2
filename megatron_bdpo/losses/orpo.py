"""ORPO: supervised fine-tuning on the chosen response plus an odds-ratio penalty, reference-free.

    L = -m_w - orpo_weight log sigmoid(theta),   theta = logit(m_w) - logit(m_l)

    m_i      = log pi_theta(y_i|x) / |y_i|, the log-prob per token; w chosen, l rejected
    logit(m) = log(p / (1 - p)) = m - log(1 - e^m), p = e^m

Source: arXiv 2403.07691, eqs. 4, 6 and 7; orpo_weight is the paper's lambda (TRL calls it beta). TRL's
first term is over the tokens of prompt and answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import NON_NEGATIVE, LossOptions, option
from megatron_bdpo.losses.terms import add_nll, mean_log_probs, rewarded


@dataclass(frozen=True)
class OrpoOptions(LossOptions):
    orpo_weight: float = option(
        0.1, "weight of ORPO's odds-ratio term; 0 leaves fine-tuning on the chosen responses", NON_NEGATIVE
    )


def log_odds(m: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^m, [P].

    A log-prob closer to 0 than the dtype's epsilon is rounding: it counts as -epsilon, with gradient 0, where the odds
    would be infinite.
    """
    m = m.clamp(max=-torch.finfo(m.dtype).eps)
    # expm1 keeps the digits of 1 - e^m near 0. Far below, where log1p(-e^m) would keep more, m itself rounds coarser.
    return m - torch.log(-torch.expm1(m))


def orpo(pairs: PairLogProbs, options: OrpoOptions) -> PairLosses:
    """ORPO per pair, [P], in nats per token; rewards orpo_weight m_i, as TRL logs them."""
    m_w, m_l = mean_log_probs(pairs)
    odds_ratio = -options.orpo_weight * logsigmoid(log_odds(m_w) - log_odds(m_l))
    return add_nll(rewarded(odds_ratio, options.orpo_weight, m_w, m_l), pairs, weight=1.0)


SPEC = LossSpec(
    name="orpo",
    function=orpo,
    options=OrpoOptions,
    requirements=lambda options: Requirements(length_normalised=True),
    summary="Odds Ratio Preference Optimization: SFT with an odds-ratio penalty, reference-free",
    source="arXiv 2403.07691, eqs. 4, 6 and 7",
)
