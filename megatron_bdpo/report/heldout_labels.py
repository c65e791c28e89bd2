"""What the rewards of single held-out answers with labels say: how far the labels lie apart.

An answer is of its label alone: no other answer to its prompt is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_bdpo.training.reporting.heldout_file import HeldOutRewards

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LabelledRewards:
    """Finite rewards of one evaluation."""

    step: int
    desirable: FloatArray
    """[D]"""
    undesirable: FloatArray
    """[U]"""

    @classmethod
    def of(cls, found: HeldOutRewards) -> LabelledRewards:
        """Those of rows with one answer: of the other one the file knows no tokens."""
        single = (found.tokens > 0).sum(axis=1) == 1
        of_label = (found.rewards[single & (found.tokens[:, side] > 0), side] for side in (0, 1))
        desirable, undesirable = (rewards[np.isfinite(rewards)] for rewards in of_label)
        return cls(found.step, desirable, undesirable)

    def __len__(self) -> int:
        return len(self.desirable) + len(self.undesirable)

    @property
    def apart(self) -> float:
        """Of all couples of a desirable and an undesirable answer, the share in which the desirable one has the higher
        reward, a tie counted half: the area under the ROC curve. NaN with one label alone."""
        if not (len(self.desirable) and len(self.undesirable)):
            return np.nan
        others = np.sort(self.undesirable)
        below = np.searchsorted(others, self.desirable, "left") + np.searchsorted(others, self.desirable, "right")
        return float(below.mean() / 2 / len(others))


@dataclass(frozen=True)
class HeldOutLabels:
    """The first evaluation and the last one; of a single one both are the same."""

    before: LabelledRewards
    after: LabelledRewards

    def rows(self) -> list[list[str]]:
        """Of each evaluation: which, the share of couples in the right order, and of each label mean reward and number
        of answers."""
        evaluations = [self.before, self.after] if self.before.step != self.after.step else [self.after]
        return [
            [f"step {each.step}", f"{each.apart:.3f}", *map(_mean, (each.desirable, each.undesirable)), f"{len(each)}"]
            for each in evaluations
        ]


#: Of :meth:`HeldOutLabels.rows`.
TITLES = ("", "apart", "desirable", "undesirable", "answers")


def _mean(rewards: FloatArray) -> str:
    return f"{round(float(rewards.mean()), 3) + 0.0:+.3f}" if len(rewards) else "-"


def held_out_labels(found: Sequence[HeldOutRewards]) -> HeldOutLabels | None:
    """None where there is no evaluation, or no labelled answer of the last one has a finite reward."""
    evaluations = [LabelledRewards.of(each) for each in found]
    if not evaluations or not len(evaluations[-1]):
        return None
    return HeldOutLabels(next(each for each in evaluations if len(each)), evaluations[-1])
