"""The answers that pairs name: each once, in whatever order, and every pair finds its own."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bdpo.data.answer_table import answer_table


@st.composite
def named_pairs(draw):
    """Of each group its pairs, of answers with any numbers; numbers of two groups may be equal."""
    numbers = st.lists(st.integers(0, 50), min_size=2, max_size=5, unique=True)
    groups = []
    for answers in draw(st.lists(numbers, min_size=1, max_size=5)):
        every = list(itertools.permutations(answers, 2))
        groups.append(draw(st.lists(st.sampled_from(every), min_size=1, max_size=6)))
    return groups


@given(named_pairs())
@settings(max_examples=100, deadline=None)
def test_every_pair_finds_its_answers(groups):
    answers = np.array([pair for pairs in groups for pair in pairs])
    owner = np.repeat(np.arange(len(groups)), [len(pairs) for pairs in groups])
    table = answer_table(answers, owner, len(groups))
    expected = [sorted({number for pair in pairs for number in pair}) for pairs in groups]
    numbers = answers.ravel()[table.source]
    assert [row[is_there].tolist() for row, is_there in zip(numbers, table.present, strict=True)] == expected
    assert table.present.shape == (len(groups), max(map(len, expected)))
    assert np.array_equal(numbers.ravel()[table.place], answers)
    assert np.array_equal(table.place // table.present.shape[1], np.stack([owner, owner], axis=1))
    assert table.group.tolist() == [group for group, each in enumerate(expected) for _ in each]
    assert all(
        int(place) == answers.ravel().tolist().index(number, 2 * owner.tolist().index(group))
        for place, number, group in zip(table.first, answers.ravel()[table.first], table.group, strict=True)
    ), "named first"


def test_scores():
    """Those that the rows give; where a group has an answer without one, pairs won less pairs lost."""
    answers, owner = np.array([[7, 5], [7, 9], [5, 9], [1, 2]]), np.array([0, 0, 0, 1])
    table = answer_table(answers, owner, 2)
    given = np.array([[0.5, 0.25], [0.5, 0.125], [0.25, 0.125], [np.nan, np.nan]])
    assert table.scores(given).tolist() == [[0.25, 0.5, 0.125], [1, -1, 0]]
    given[2, 1] = given[1, 1] = np.nan
    assert table.scores(given).tolist() == [[0, 2, -2], [1, -1, 0]]


def test_no_pairs():
    table = answer_table(np.zeros((0, 2), np.int64), np.zeros(0, np.int64), 0)
    assert table.source.shape == (0, 1) and table.place.shape == (0, 2) and table.scores(np.zeros((0, 2))).size == 0
