"""Where the answers of a pack are cut, so that a pair's two answers can be compared over their common length.

An answer of several pairs has a cut for each shorter opponent. Cuts make it a row of *segments*, and their sums are all
that is needed: the whole answer is the sum of its segments, the beginning that a pair compares that of the first ones.
So each token is scored once, whatever the number of cuts.

Shapes: N scored positions of a whole pack, A answers, P pairs, C segments of each answer, the last ones empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bdpo.data.packs import IntArray


@dataclass(frozen=True)
class Cuts:
    """The segments of a pack's answers: those of answer a are numbers a C to a C + C - 1."""

    per_answer: int  # C
    segment: IntArray  # [N] which segment each scored position is of
    last: IntArray  # [P, 2] the number, in its answer, of the last segment of the beginning that a pair compares


def common_lengths(answer_tokens: IntArray, pairs: IntArray) -> Cuts:
    """Cuts at the length of the shorter answer of each pair.

    Args:
        answer_tokens: [A] scored tokens of each answer.
        pairs: [P, 2] numbers of two answers.
    """
    row = int(answer_tokens.max(initial=0)) + 1  # an answer and a length in it are one number
    answers = np.arange(len(answer_tokens))
    ends = answers * row + answer_tokens
    cuts = pairs * row + answer_tokens[pairs].min(axis=1, keepdims=True)
    stops = np.unique(np.concatenate([ends, cuts.ravel()]))  # where a segment stops, answer after answer
    first = np.searchsorted(stops, answers * row, side="right")
    answer = np.repeat(answers, answer_tokens)
    offset = np.arange(len(answer)) - np.repeat(np.cumsum(answer_tokens) - answer_tokens, answer_tokens)
    number = np.searchsorted(stops, answer * row + offset, side="right") - first[answer]
    per_answer = int(number.max(initial=0)) + 1
    return Cuts(per_answer, answer * per_answer + number, np.searchsorted(stops, cuts) - first[pairs])
