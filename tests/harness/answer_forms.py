"""Losses of one labelled answer in plain Python floats, with gradients derived by hand, and answers to try them on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch

from megatron_bdpo import losses
from megatron_bdpo.losses import AnswerLogProbs, AnswerLosses, LossSpec
from tests.harness.closed_forms import sigmoid, softplus

Expected = tuple[float, float]
"""Loss, and its gradient in the answer's log pi_theta(y|x)."""


class Answer(NamedTuple):
    """One answer, as Python floats."""

    l: float  # policy  # noqa: E741
    n: int  # tokens
    d: bool  # desirable
    r: float  # reference
    m: float = 0.0  # policy, after another prompt
    q: float = 0.0  # reference, after that prompt


def kto(a: Answer, everyone: list[Answer], beta: float) -> Expected:
    z = max(0.0, sum(other.m - other.q for other in everyone) / len(everyone)) if everyone else 0.0
    v = sigmoid(beta * (a.l - a.r - z)) if a.d else sigmoid(beta * (z - (a.l - a.r)))
    return 1 - v, (-1 if a.d else 1) * beta * v * (1 - v)


def bco(a: Answer, everyone: list[Answer], beta: float) -> Expected:
    delta = beta * sum(other.l - other.r for other in everyone) / len(everyone) if everyone else 0.0
    logit = beta * (a.l - a.r) - delta
    return (softplus(-logit), -beta * sigmoid(-logit)) if a.d else (softplus(logit), beta * sigmoid(logit))


def apo_zero_unpaired(a: Answer, everyone: list[Answer], beta: float) -> Expected:
    r = beta * (a.l - a.r)
    slope = beta * sigmoid(r) * sigmoid(-r)
    return (sigmoid(-r), -slope) if a.d else (sigmoid(r), slope)


ANSWER_FORMS: dict[str, Callable[..., Expected]] = {each.__name__: each for each in (apo_zero_unpaired, bco, kto)}

WEIGHTED = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.25}

ANSWER_CASES: list[tuple[str, dict[str, Any]]] = [
    (name, given) for name in sorted(ANSWER_FORMS) for given in ({}, {"beta": 0.02}, WEIGHTED)
]


def expected(name: str, given: dict[str, Any], answers: list[Answer], step: list[Answer]) -> list[Expected]:
    """Of each answer, where the step's answers are these; none: where no step is looked at."""
    values = asdict(losses.build_options(name, given))
    weights = {True: values.pop("desirable_weight"), False: values.pop("undesirable_weight")}
    found = [(weights[a.d], *ANSWER_FORMS[name](a, step, **values)) for a in answers]
    return [(weight * loss, weight * slope) for weight, loss, slope in found]


def random_answers(count: int, seed: int = 0, drift: float = 1.0) -> list[Answer]:
    """Log-probs on a grid of 1/16, so that fp32 holds them exactly. By the drift answers after other prompts have
    become more likely, in nats per token."""
    rng = random.Random(seed)

    def log_prob(tokens: int) -> float:
        return -round(16 * tokens * rng.uniform(0.05, 5)) / 16 - 1 / 16

    def answer() -> Answer:
        n = rng.choice([1, 2, 7, 60])
        other = log_prob(n)
        return Answer(log_prob(n), n, rng.random() < 0.4, log_prob(n), other + round(16 * n * drift) / 16, other)

    return [answer() for _ in range(count)]


EXTREME = [  # |r| = 1e3 at beta 0.1, and policy = reference, of either label
    *[Answer(-10010.0, 1, label, -10.0, -3.0, -4.0) for label in (True, False)],
    *[Answer(-10.0, 1, label, -10010.0, -3.0, -4.0) for label in (True, False)],
    *[Answer(-3.0, 1, label, -3.0, -3.0, -3.0) for label in (True, False)],
]


def inputs(answers: list[Answer], dtype: torch.dtype, *, mismatched: bool = False) -> AnswerLogProbs:
    """As a loss takes them; or as its ``step_shift`` takes answers after other prompts."""
    policy = torch.tensor([a.m if mismatched else a.l for a in answers], dtype=dtype)
    return AnswerLogProbs(
        policy=policy if mismatched else policy.requires_grad_(),
        tokens=torch.tensor([a.n for a in answers], dtype=torch.int64),
        desirable=torch.tensor([a.d for a in answers], dtype=torch.bool),
        reference=torch.tensor([a.q if mismatched else a.r for a in answers], dtype=dtype),
    )


def shift_of(spec: LossSpec[Any, Any, Any], step: list[Answer], options: Any, dtype: torch.dtype) -> Any:
    """What the loss finds in a step; None where there is none, or it looks at none."""
    if spec.step_shift is None or not step:
        return None
    answers = inputs(step, dtype, mismatched=spec.requirements(options).mismatched)
    return spec.step_shift(replace(answers, policy=answers.policy.detach()), options)


def evaluate(
    spec: LossSpec[Any, Any, Any],
    given: dict[str, Any],
    answers: list[Answer],
    step: list[Answer],
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, AnswerLosses]:
    """Loss [N], its gradient [N] in the policy's log-probs, and all that is told, of some answers of a step."""
    options, rows = spec.options(**given), inputs(answers, dtype)
    out = spec.function(replace(rows, shift=shift_of(spec, step, options, dtype)), options)
    return out.loss, *torch.autograd.grad(out.loss.sum(), rows.policy), out
