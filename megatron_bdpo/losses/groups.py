"""What goes into a loss of a whole group, a prompt with any number of scored answers, and what comes out.

Groups of a batch may have different numbers of answers: tensors are [G, K], G groups of at most K answers, and
`GroupLogProbs.present` says which places hold one. A pair of a group is two of its answers whose scores differ: those
of equal score are not compared, in no loss and in no metric, and the order of a group's answers never matters.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_bdpo.losses.wins import wins


@dataclass(frozen=True, eq=False)
class GroupLogProbs:
    """Log-probs of the answers of G groups. Every tensor is [G, K]; the floating ones share one dtype.

    Log-probs are sums over the response tokens, in nats. Only the policy's carry a gradient. Where no answer is, values
    are finite, and they do not matter, neither to values nor to gradients. The optional entries are there when the
    loss's `Requirements` ask for them.
    """

    policy: Tensor
    """log pi_theta(y_i|x)"""
    tokens: Tensor
    """|y_i| >= 1, integer; 1 where no answer is"""
    score: Tensor
    """Higher is better; of ranks, 1 the best, their negatives"""
    present: Tensor
    """bool: which places hold an answer; at least two of a group"""
    reference: Tensor | None = None
    """log pi_ref(y_i|x)"""
    unconditional: Tensor | None = None
    """log pi_ref(y_i): the same tokens after the empty prompt"""
    unsafe: Tensor | None = None
    """h_i: 1 or True where the answer is unsafe"""

    def __len__(self) -> int:
        """G."""
        return len(self.policy)

    def __getitem__(self, some: slice | Tensor) -> GroupLogProbs:
        """Some of the groups: views of a slice, or copies of those that a mask [G] names."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: value[some] for name, value in values.items() if value is not None})

    def cleared(self) -> GroupLogProbs:
        """Zeros where no answer is, tokens 1: what follows is finite there, and has no gradient."""

        def kept(value: Tensor | None) -> Tensor | None:
            return None if value is None else torch.where(self.present, value, torch.zeros_like(value))

        return replace(
            self,
            policy=torch.where(self.present, self.policy, 0),
            tokens=torch.where(self.present, self.tokens, 1),
            score=torch.where(self.present, self.score, 0),
            reference=kept(self.reference),
            unconditional=kept(self.unconditional),
            unsafe=kept(self.unsafe),
        )

    def pairs(self) -> Tensor:
        """bool [G, K, K]: whether answer i has a higher score than answer j. Each pair is there once."""
        both = self.present[:, :, None] & self.present[:, None, :]
        return both & (self.score[:, :, None] > self.score[:, None, :])

    def best(self) -> Tensor:
        """bool [G, K]: the answers that none has a higher score than; of equal ones all."""
        return self.present & ~self.pairs().any(1)

    def worst(self) -> Tensor:
        """bool [G, K]: the answers that have no higher score than any; of equal ones all."""
        return self.present & ~self.pairs().any(2)


@dataclass(frozen=True, eq=False)
class GroupLosses:
    """Results of G groups of at most K answers. Averaging is the caller's."""

    loss: Tensor
    """[G], differentiable in the policy's log-probs. 0, with no gradient, where all scores are equal and the loss asks
    only which of two is higher."""
    reward: Tensor
    """[G, K], detached: beta Delta_i; 0 where no answer is"""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached extras of this loss, [G] each, by name."""


class GroupReport(NamedTuple):
    """What a group's rewards say, [G] each, detached: of two answers what a pair's rewards say."""

    accuracy: Tensor
    """The share of the group's pairs whose better answer has the higher reward; a tie counts half. 0 without a pair."""
    margin: Tensor
    """The mean over pairs of the better answer's reward less the other's. 0 without a pair."""
    chosen: Tensor
    """The best answer's reward; of equally scored ones their mean."""
    rejected: Tensor
    """The worst answer's."""
    pairs: Tensor
    """How many there are, in the rewards' dtype: the weight of accuracy and margin is 0 where it is."""


def group_report(groups: GroupLogProbs, losses: GroupLosses) -> GroupReport:
    """Accuracy, margins and rewards of each group."""
    pairs, reward = groups.pairs(), torch.where(groups.present, losses.reward, 0)
    margin = reward[:, :, None] - reward[:, None, :]
    return GroupReport(
        accuracy=pair_mean(wins(margin), pairs),
        margin=pair_mean(margin, pairs),
        chosen=answer_mean(reward, groups.best()),
        rejected=answer_mean(reward, groups.worst()),
        pairs=pairs.sum((1, 2)).to(reward.dtype),
    )


def answer_mean(values: Tensor, which: Tensor) -> Tensor:
    """[G]: the mean of values [G, K] where `which` [G, K] is true. The others are finite. 0 where none is."""
    return torch.where(which, values, 0).sum(1) / which.sum(1).clamp(min=1)


def pair_mean(values: Tensor, pairs: Tensor) -> Tensor:
    """[G]: the mean of values [G, K, K] over the pairs [G, K, K]. The others are finite. 0 where none is."""
    return torch.where(pairs, values, 0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
