"""Which answers the pairs of some groups have between them: each once, and where each pair's two are.

Shapes: p pairs of G groups, A answers of all groups, K answers of the group that has most.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AnswerTable:
    """The answers of groups as a table [G, K]: shorter groups leave places at the end of their row empty."""

    group: IntArray  # [A] of each answer, ascending
    first: IntArray  # [A] where it is named first: place among the 2 p sides of the pairs, [p, 2] in one row
    place: IntArray  # [p, 2] of each pair's answers in the table, [G, K] in one row
    present: npt.NDArray[np.bool_]  # [G, K]

    @functools.cached_property
    def source(self) -> IntArray:
        """[G, K] ``first`` of each answer; 0 where there is none."""
        table = np.zeros(self.present.shape, np.int64)
        table[self.present] = self.first
        return table

    def scores(self, given: FloatArray) -> FloatArray:
        """[G, K] of each answer, the higher the better; 0 where there is none.

        Args:
            given: [p, 2] what the rows say. In a group of which they do not say all, an answer's score is the number of
                pairs that it wins less that of those that it loses.
        """
        scores = np.where(self.present, given.ravel()[self.source], 0.0)
        unknown = np.isnan(scores).any(axis=1)
        if unknown.any():
            wins = np.zeros(scores.size)
            np.add.at(wins, self.place[:, 0], 1)
            np.add.at(wins, self.place[:, 1], -1)
            scores[unknown] = wins.reshape(scores.shape)[unknown]
        return scores


def answer_table(answers: IntArray, group: IntArray, groups: int) -> AnswerTable:
    """
    Args:
        answers: [p, 2] numbers of each pair's chosen and rejected answer; equal ones of one group are one answer.
        group: [p] of each pair, in [0, G), ascending.
        groups: G.
    """
    owner, number = np.repeat(group, 2), answers.ravel()
    order = np.lexsort((number, owner))  # stable: of equal ones the first named is first
    is_new = (np.diff(owner[order], prepend=-1) != 0) | (np.diff(number[order], prepend=-1) != 0)
    each_once = order[is_new]
    index = np.empty(len(order), np.int64)
    index[order] = np.cumsum(is_new) - 1
    of_answer = owner[each_once]
    counts = np.bincount(of_answer, minlength=groups)
    column = np.arange(len(of_answer)) - (np.cumsum(counts) - counts)[of_answer]
    present = np.arange(counts.max(initial=1)) < counts[:, None]
    place = (of_answer * present.shape[1] + column)[index].reshape(-1, 2)
    return AnswerTable(of_answer, each_once, place, present)
