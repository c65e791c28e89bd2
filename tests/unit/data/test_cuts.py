"""Answers cut at the common lengths of their pairs: sums over segments are sums over answers and over beginnings."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bdpo.data.context import ContextRank, context_part
from megatron_bdpo.data.cuts import common_lengths
from tests.unit.data.test_context import shared_pack
from tests.unit.data.test_packs import group_lists

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=7)


@st.composite
def compared_answers(draw) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of answers, and pairs of them: an answer may be in several, in none, or in one with itself."""
    tokens = np.array(draw(LENGTHS))
    numbers = st.integers(0, len(tokens) - 1)
    pairs = draw(st.lists(st.tuples(numbers, numbers), max_size=12))
    return tokens, np.array(pairs, np.int64).reshape(-1, 2)


@given(compared_answers())
@settings(max_examples=300, deadline=None)
def test_sums_over_segments_are_those_of_answers_and_beginnings(compared):
    tokens, pairs = compared
    cuts = common_lengths(tokens, pairs)
    values = 2.0 ** np.arange(tokens.sum())  # each sum says of what it is
    segments = np.bincount(cuts.segment, values, minlength=len(tokens) * cuts.per_answer).reshape(len(tokens), -1)
    answers = np.split(values, np.cumsum(tokens)[:-1])
    assert segments.sum(axis=1).tolist() == [answer.sum() for answer in answers]
    assert (np.diff(cuts.segment) >= 0).all(), "answer after answer, and in each from its beginning"
    for (chosen, rejected), last in zip(pairs.tolist(), cuts.last.tolist(), strict=True):
        common = min(tokens[chosen], tokens[rejected])
        for answer, segment in zip((chosen, rejected), last, strict=True):
            assert segments[answer, : segment + 1].sum() == answers[answer][:common].sum()


def test_no_more_segments_than_the_pairs_need():
    tokens = np.array([3, 5, 9, 9])
    assert common_lengths(tokens, np.array([[0, 1]])).per_answer == 2
    assert common_lengths(tokens, np.array([[2, 3]])).per_answer == 1, "of one length"
    every = np.array([(a, b) for a in range(4) for b in range(a)])
    assert common_lengths(tokens, every).per_answer == 3, "the longest: cut at 3 and at 5"
    assert common_lengths(np.zeros(0, np.int64), np.zeros((0, 2), np.int64)).per_answer == 1


@given(group_lists(), st.booleans(), st.integers(2, 4), st.data())
@settings(max_examples=100, deadline=None)
def test_a_part_counts_segments_by_the_whole_answer(groups, share, ranks, data):
    """Over all context-parallel ranks each segment has as many scored positions as in the pack."""
    pack = shared_pack(groups, share, ranks, 2)
    numbers = st.integers(0, max(len(pack.answer_tokens) - 1, 0))
    pairs = data.draw(st.lists(st.tuples(numbers, numbers), max_size=6 if len(pack.answer_tokens) else 0))
    cuts = common_lengths(pack.answer_tokens, np.array(pairs, np.int64).reshape(-1, 2))
    whole = dataclasses.replace(pack, scored_answer=cuts.segment)
    parts = [context_part(whole, ContextRank(ranks, rank)) for rank in range(ranks)]
    counted = sum(
        np.bincount(part.scored_answer, minlength=pack.answer_tokens.size * cuts.per_answer) for part in parts
    )
    assert counted.tolist() == np.bincount(cuts.segment, minlength=len(counted)).tolist()
