"""KTO: each answer's reward against what the policy's drift from the reference would give any answer.

    L = lambda_D (1 - sigmoid(beta (Delta - z)))     of a desirable answer
    L = lambda_U (1 - sigmoid(beta (z - Delta)))     of an undesirable one
    z = max(0, mean over the step of log pi_theta(y'|x) - log pi_ref(y'|x))

    Delta = log pi_theta(y|x) - log pi_ref(y|x), summed over the response
    y'    = the step's answers, each after another row's prompt: an estimate of KL(pi_theta || pi_ref), without gradient
    lambda_D, lambda_U = desirable_weight, undesirable_weight

The paper's loss is lambda - v(x, y): so is this, as TRL has it. Its `reward` is beta Delta, and `shift` is beta z; the
metric `kl` is z, in nats.

The step, not the microbatch, is what z is a mean over: all microbatches of all data-parallel ranks, so that a step does
not hang on the layout. What the policy makes of the other answers has to be known before the first gradient: a step has
one more forward pass of it. TRL's z is one of the answers of one microbatch of each process, each put after the prompt
before it. Ours is after the prompt of the nearest row before it in the data that has another one. An evaluation has a z
of its own, over all that is held out.

Source: arXiv 2402.01306, eq. 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_bdpo.losses.answer_terms import (
    AnswerOptions,
    answer_log_ratios,
    balance,
    labels,
    mean_log_ratio,
    weights,
)
from megatron_bdpo.losses.answers import AnswerLogProbs, AnswerLosses
from megatron_bdpo.losses.base import LossSpec, Requirements


def divergence(mismatched: AnswerLogProbs, options: AnswerOptions) -> Tensor:
    """[]: beta z, of the step's answers after other prompts."""
    return options.beta * mean_log_ratio(mismatched).clamp(min=0)


def kto(answers: AnswerLogProbs, options: AnswerOptions) -> AnswerLosses:
    """KTO per answer, [N], between 0 and its weight; rewards beta Delta. Metric: `kl`, where a step is looked at."""
    reward = options.beta * answer_log_ratios(answers)
    above = reward if answers.shift is None else reward - answers.shift
    loss = weights(answers, options) * torch.sigmoid(-labels(answers) * above)
    kl = {} if answers.shift is None else {"kl": (answers.shift / options.beta).expand_as(reward)}
    return AnswerLosses(loss, reward.detach(), kl)


SPEC = LossSpec(
    name="kto",
    function=kto,
    options=AnswerOptions,
    requirements=lambda options: Requirements(reference=True, mismatched=True),
    summary="Kahneman-Tversky Optimization: labelled answers, each against the policy's drift",
    source="arXiv 2402.01306, eq. 7",
    elsewhere=("kto_pair",),
    takes="answers",
    step_shift=divergence,
    advise=balance,
)
