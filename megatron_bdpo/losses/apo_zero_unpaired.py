"""APO-zero of labelled answers: desirable ones up, undesirable ones down, each from where the reference has it.

    L = lambda_D (1 - sigmoid(r))     of a desirable answer,   r = beta Delta
    L = lambda_U sigmoid(r)           of an undesirable one

    Delta = log pi_theta(y|x) - log pi_ref(y|x), summed over the response
    lambda_D, lambda_U = desirable_weight, undesirable_weight

`kto` with z = 0, so that no step is looked at. The two terms are those of `apo_zero`: of a pair as two labelled answers
they add up to its loss.

Source: arXiv 2408.06266, eq. 7, in the unpaired form of TRL's KTOTrainer.
"""

from __future__ import annotations

import torch

from megatron_bdpo.losses.answer_terms import AnswerOptions, answer_log_ratios, balance, labels, weights
from megatron_bdpo.losses.answers import AnswerLogProbs, AnswerLosses
from megatron_bdpo.losses.base import LossSpec, Requirements


def apo_zero_unpaired(answers: AnswerLogProbs, options: AnswerOptions) -> AnswerLosses:
    """APO-zero per answer, [N], between 0 and its weight; rewards beta Delta."""
    reward = options.beta * answer_log_ratios(answers)
    loss = weights(answers, options) * torch.sigmoid(-labels(answers) * reward)
    return AnswerLosses(loss, reward.detach())


SPEC = LossSpec(
    name="apo_zero_unpaired",
    function=apo_zero_unpaired,
    options=AnswerOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="Anchored Preference Optimization on labelled answers: desirable up, undesirable down",
    source="arXiv 2408.06266, eq. 7",
    takes="answers",
    advise=balance,
)
