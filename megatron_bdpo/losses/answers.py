"""What goes into a loss of labelled answers, each desirable or not whatever its prompt's others, and what comes out.

An answer is compared with no other of its own prompt. What it is compared with may be one number of the whole step, its
`shift`, which is in the unit of the rewards beta Delta: where a desirable answer's reward is above it, and an
undesirable one's below, the policy is right about the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_bdpo.losses.wins import wins


@dataclass(frozen=True, eq=False)
class AnswerLogProbs:
    """Log-probs of N answers. Every tensor is [N] unless it says otherwise; the floating ones share one dtype.

    Log-probs are sums over the response tokens, in nats. Only the policy's carry a gradient. `reference` is there when
    the loss's `Requirements` ask for it.
    """

    policy: Tensor
    """log pi_theta(y|x)"""
    tokens: Tensor
    """|y| >= 1, integer"""
    desirable: Tensor
    """bool: whether the answer is desirable"""
    reference: Tensor | None = None
    """log pi_ref(y|x)"""
    shift: Tensor | None = None
    """[], detached, in the unit of the rewards: what `LossSpec.step_shift` has found for all answers of the step.
    None where no step is looked at: it counts as 0"""

    def __len__(self) -> int:
        """N."""
        return len(self.policy)

    def __getitem__(self, some: slice | Tensor) -> AnswerLogProbs:
        """Some of the answers, of the same step: views of a slice, or copies of those that a mask [N] names."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "shift"}
        return replace(self, **{name: value[some] for name, value in values.items() if value is not None})


@dataclass(frozen=True, eq=False)
class AnswerLosses:
    """Results of N answers, every tensor [N]. Averaging is the caller's: only it knows the step's number of answers."""

    loss: Tensor
    """Differentiable in the policy's log-probs."""
    reward: Tensor
    """Detached: beta Delta"""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached extras of this loss, by name."""


class AnswerReport(NamedTuple):
    """What the rewards say of the labels, [N] each, detached."""

    accuracy: Tensor
    """1 where the reward is on its label's side of the shift, else 0; a tie counts half."""
    margin: Tensor
    """How far it is on that side: negative on the other."""


def answer_report(answers: AnswerLogProbs, losses: AnswerLosses) -> AnswerReport:
    """Whether the policy is right about each answer, and by how much, in the unit of the rewards."""
    above = losses.reward if answers.shift is None else losses.reward - answers.shift
    margin = torch.where(answers.desirable, above, -above)
    return AnswerReport(wins(margin), margin)
