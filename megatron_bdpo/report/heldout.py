"""What the rewards of single held-out pairs say: margins, calibration, and what answers get for their length.

P pairs that have two finite rewards. A pair's margin is the reward of its chosen answer minus that of the rejected one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_bdpo.training.reporting.heldout_file import HeldOutRewards

FloatArray = npt.NDArray[np.float64]

#: Margins closer to zero are rounding, and such a pair is half right: as in a run's metrics.
_TIE = 1e-5
#: A bin has at least so many values, if there are as many, and there are at most so many bins.
_LEAST, _MOST_BINS = 10, 10


@dataclass(frozen=True)
class Confidence:
    """Pairs for which the model is about equally sure which answer is preferred."""

    predicted: float
    """Mean probability that it gives to the answer that it prefers, in [1/2, 1]."""
    right: float
    """Share of the pairs in which that is the chosen answer."""
    pairs: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of ``right`` (Wilson 1927): it stays within [0, 1] and has a width at 0 and 1."""
        n, p, z = self.pairs, self.right, 1.96
        middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return float((middle - half) / (1 + z * z / n)), float((middle + half) / (1 + z * z / n))


@dataclass(frozen=True)
class OfLength:
    """Answers of about one length."""

    tokens: float
    """Mean."""
    reward: float
    """Mean."""
    quartiles: tuple[float, float]
    """Of the rewards, the lower and the upper one."""
    answers: int


@dataclass(frozen=True, eq=False)
class Evaluated:
    """One evaluation."""

    step: int
    rewards: FloatArray
    """[P, 2] of chosen and rejected."""
    tokens: npt.NDArray[np.integer]
    """[P, 2]"""
    left_out: int
    """Pairs without two finite rewards."""

    @classmethod
    def of(cls, found: HeldOutRewards) -> Evaluated:
        pairs = (found.tokens > 0).all(axis=1)  # of a labelled answer there is no other: see ``heldout_labels``
        finite = pairs & np.isfinite(found.rewards).all(axis=1)
        return cls(found.step, found.rewards[finite], found.tokens[finite], int((pairs & ~finite).sum()))

    @cached_property
    def margins(self) -> FloatArray:
        """[P]"""
        return self.rewards[:, 0] - self.rewards[:, 1]

    @property
    def is_undecided(self) -> bool:
        """No pair is told apart, as where the policy still is its reference."""
        return bool((np.abs(self.margins) <= _TIE).all())

    @cached_property
    def _right(self) -> FloatArray:
        return np.where(np.abs(self.margins) <= _TIE, 0.5, self.margins > 0)

    @property
    def right(self) -> float:
        """Share of the pairs whose chosen answer has the higher reward; a tie is half of one."""
        return float(self._right.mean())

    @cached_property
    def predicted(self) -> FloatArray:
        """[P] probability sigma(|margin|) that the preferred answer is the better one, by Bradley and Terry's model."""
        return 1 / (1 + np.exp(-np.abs(self.margins)))

    def calibration(self) -> list[Confidence]:
        """Bins of equally many pairs, the least sure first."""
        return [
            Confidence(float(self.predicted[some].mean()), float(self._right[some].mean()), len(some))
            for some in _equal_bins(self.predicted)
        ]

    @property
    def calibration_error(self) -> float:
        """Mean over the pairs of how far prediction and share of right pairs are apart in their bin."""
        bins = self.calibration()
        return sum(each.pairs * abs(each.predicted - each.right) for each in bins) / len(self.margins)

    def by_length(self, column: int) -> list[OfLength]:
        """The chosen (0) or rejected (1) answers in bins of equally many, the shortest first."""
        rewards, tokens = self.rewards[:, column], self.tokens[:, column]
        return [
            OfLength(
                float(tokens[some].mean()),
                float(rewards[some].mean()),
                (float(np.quantile(rewards[some], 0.25)), float(np.quantile(rewards[some], 0.75))),
                len(some),
            )
            for some in _equal_bins(tokens.astype(np.float64))
        ]

    def right_by_length(self) -> list[tuple[str, float, int]]:
        """Of pairs whose chosen answer is longer, and shorter, if there are any: which, share that is right, number."""
        difference = self.tokens[:, 0] - self.tokens[:, 1]
        some = (("longer", difference > 0), ("shorter", difference < 0))
        return [(words, float(self._right[of].mean()), int(of.sum())) for words, of in some if of.any()]


@dataclass(frozen=True)
class HeldOutPairs:
    """The first evaluation and the last one; of a single one both are the same."""

    before: Evaluated
    after: Evaluated

    @property
    def several(self) -> bool:
        return self.before.step != self.after.step


def held_out_pairs(found: Sequence[HeldOutRewards]) -> HeldOutPairs | None:
    """None where there is no evaluation, or no pair of the last one has finite rewards."""
    evaluations = [Evaluated.of(each) for each in found]
    if not evaluations or not len(evaluations[-1].rewards):
        return None
    return HeldOutPairs(next(each for each in evaluations if len(each.rewards)), evaluations[-1])


def _equal_bins(values: FloatArray) -> list[npt.NDArray[np.int64]]:
    """Places of the values, cut where they are ordered; equal values stay together."""
    order = np.argsort(values, kind="stable")
    count = min(_MOST_BINS, max(1, len(values) // _LEAST))
    cuts = np.searchsorted(values[order], [values[order[len(values) * n // count]] for n in range(1, count)])
    return [some for some in np.split(order, np.unique(cuts)) if len(some)]
