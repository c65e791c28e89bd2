"""The few expressions that losses of labelled answers share. All tensors are [N]; symbols as in
`answers.AnswerLogProbs`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bdpo.losses.answers import AnswerLogProbs
from megatron_bdpo.losses.options import POSITIVE, LossOptions, beta, option
from megatron_bdpo.losses.terms import required


@dataclass(frozen=True)
class AnswerOptions(LossOptions):
    beta: float = beta()
    desirable_weight: float = option(1.0, "weight of the losses of desirable answers", POSITIVE)
    undesirable_weight: float = option(1.0, "weight of the losses of undesirable answers", POSITIVE)


def answer_log_ratios(answers: AnswerLogProbs) -> Tensor:
    """Delta = log pi_theta(y|x) - log pi_ref(y|x), in nats."""
    return answers.policy - required(answers.reference, "reference")


def mean_log_ratio(answers: AnswerLogProbs) -> Tensor:
    """[]: the mean of Delta, summed in float64: whichever microbatch an answer is of, it is the same."""
    ratios = answer_log_ratios(answers).detach()
    return ratios.mean(dtype=torch.float64).to(ratios.dtype)


def labels(answers: AnswerLogProbs) -> Tensor:
    """1 of desirable answers, -1 of the others, in the policy's dtype."""
    return answers.desirable.to(answers.policy.dtype) * 2 - 1


def weights(answers: AnswerLogProbs, options: AnswerOptions) -> Tensor:
    """lambda_D of desirable answers, lambda_U of the others, in the policy's dtype."""
    desirable, undesirable = (
        torch.full_like(answers.policy, weight) for weight in (options.desirable_weight, options.undesirable_weight)
    )
    return torch.where(answers.desirable, desirable, undesirable)


def balance(desirable: int, undesirable: int, options: AnswerOptions) -> str | None:
    """What to do about labels of unequal number: None where 1 <= lambda_D n_D / (lambda_U n_U) <= 4/3.

    Within half a percent, so that some answers more or less make no difference. Source: KTO, arXiv 2402.01306, eq. 8,
    as TRL warns of it.

    Args:
        desirable: the number of desirable answers that are trained on, n_D.
        undesirable: n_U.
    """
    if not (desirable and undesirable):
        label, other = ("desirable", "undesirable") if desirable else ("undesirable", "desirable")
        return f"all answers are {label}: this loss tells them from {other} ones. Add some."
    upper, lower = options.desirable_weight * desirable, options.undesirable_weight * undesirable
    if 1 <= round(upper / lower, 2) <= 1.33:
        return None
    found = (
        f"desirable answers weigh {upper / lower:.3g} times what undesirable ones do ({desirable} x "
        f"{options.desirable_weight:g}, {undesirable} x {options.undesirable_weight:g}); "
        "from 1 to 4/3 times is advised"
    )
    if upper < lower:
        return f"{found}. Set --desirable-weight between {lower / desirable:.3g} and {lower / desirable * 4 / 3:.3g}."
    highest = upper / undesirable
    return f"{found}. Set --undesirable-weight between {highest * 3 / 4:.3g} and {highest:.3g}."
