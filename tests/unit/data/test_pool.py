"""What a loss may do to the pairs of a run: leave some out, and swap the answers of others."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_bdpo.data.pool import PairPool
from megatron_bdpo.data.prompt_kinds import PromptKind
from megatron_bdpo.data.selection import Selection, select
from megatron_bdpo.data.tokenization import PairTokens, TokenArray
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses.base import keep_all
from megatron_bdpo.losses.safedpo import SPEC as SAFEDPO

#: Labels of chosen and rejected of a store's pairs.
LABELS = [(0, 1), (1, 0), (0, 0), (1, 1)]


class Store:
    """Pair i has a prompt of one token, a chosen answer of 2 + i and a rejected one of 6 + i."""

    has_context = False
    margin = score = None

    def __init__(self, labels: list[tuple[int, int]]) -> None:
        self.unsafe = np.array(labels, np.int8).reshape(-1, 2)
        self.label = np.full(len(self.unsafe), -1, np.int8)
        self.lengths = np.array([[1, 2 + i, 6 + i] for i in range(len(labels))], np.int32).reshape(-1, 3)
        self.starts = np.cumsum([0, *self.lengths.ravel()])[:-1].reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def unconditional(self) -> np.ndarray:
        return np.ones(len(self), np.int32)

    def prompt(self, row: int) -> TokenArray:
        return self.pair(row).prompt

    def unconditional_prompt(self, row: int) -> TokenArray:
        return np.array([99], np.int32)

    def pair(self, row: int) -> PairTokens:
        return PairTokens(*(np.full(n, 10 * row + part, np.int32) for part, n in enumerate(self.lengths[row])))


def pool_of(*labels: list[tuple[int, int]]) -> PairPool:
    pool = PairPool([Store(each) for each in labels])
    pool.describe = "pair {}".format  # type: ignore[method-assign]
    return pool


def test_pairs_are_dropped_and_swapped_whole():
    """Tokens, lengths and labels change places together; pairs of another selection stay as they are."""
    pool, held_out = pool_of(LABELS, LABELS), np.arange(4, 8)
    selection = Selection(np.arange(4))
    select(pool, selection, SAFEDPO.select, labelled=True)
    assert selection.ids.tolist() == [0, 1, 2]
    assert selection.notes == ["1 pairs swapped by their safety labels, 1 dropped"]
    assert pool.pairs.unsafe[selection.ids].tolist() == [[0, 1], [0, 1], [0, 0]]
    assert pool.pairs.lengths[:3].tolist() == [[1, 2, 6], [1, 7, 3], [1, 4, 8]]
    for pair in range(3):
        group = pool.group(pair).group
        assert [len(group.prompt), *map(len, group.answers)] == pool.pairs.lengths[pair].tolist()
    assert [int(answer[0]) for answer in pool.group(1).group.answers] == [12, 11], "rejected first"
    assert [int(answer[0]) for answer in pool.group(1, PromptKind.EMPTY).group.answers] == [12, 11]
    assert pool.pairs.unsafe[held_out].tolist() == [list(each) for each in LABELS]


def test_a_loss_that_selects_nothing_leaves_no_trace():
    pool, selection = pool_of([(-1, 0), *LABELS]), Selection(np.arange(5))
    select(pool, selection, keep_all, labelled=False)
    assert selection.ids.tolist() == [0, 1, 2, 3, 4] and not selection.notes
    assert not pool.pairs.swapped.any()


def test_labels_that_a_loss_reads_must_be_there():
    pool, selection = pool_of([(0, 1), (0, -1), (-1, -1)]), Selection(np.arange(3))
    with pytest.raises(UserError, match=r"needs safety labels, but 2 of 3 pairs have none \(pair 1\)"):
        select(pool, selection, SAFEDPO.select, labelled=True)


def test_no_pairs_no_note():
    selection = Selection(np.arange(0))
    select(pool_of(LABELS), selection, SAFEDPO.select, labelled=True)
    assert len(selection.ids) == 0 and not selection.notes


def test_a_single_store_is_not_copied_until_pairs_are_swapped():
    """Ranks of a node share its maps; what is swapped is the pool's, never the store's."""
    store = Store(LABELS)
    pool = PairPool([store])
    assert np.shares_memory(pool.pairs.lengths, store.lengths) and np.shares_memory(pool.pairs.unsafe, store.unsafe)
    pool.pairs.swap(np.array([], np.int64))
    assert np.shares_memory(pool.pairs.lengths, store.lengths)
    pool.pairs.swap(np.array([1]))
    assert pool.pairs.lengths[1].tolist() == [1, 7, 3] and store.lengths[1].tolist() == [1, 3, 7]
    assert pool.pairs.unsafe[1].tolist() == [0, 1] and store.unsafe[1].tolist() == [1, 0]


class RankedStore(Store):
    """A row with four answers of 2, 3, 4, 5 tokens after a prompt of 10, all of its pairs; then a plain pair."""

    PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))

    def __init__(self) -> None:
        super().__init__([(0, 1)] * 3 + [(1, 1)] + [(0, 0)] * 2 + [(0, 1)])
        tokens, first = (2, 3, 4, 5), (10, 12, 15, 19)
        self.lengths = np.array([[10, tokens[a], tokens[b]] for a, b in self.PAIRS] + [[7, 1, 6]], np.int32)
        self.starts = np.array([[0, first[a], first[b]] for a, b in self.PAIRS] + [[24, 31, 32]], np.int64)

    def pair(self, row: int) -> PairTokens:
        return PairTokens(
            *(np.arange(a, a + n, dtype=np.int32) for a, n in zip(self.starts[row], self.lengths[row], strict=True))
        )


def test_pairs_of_a_row_are_one_group():
    """Its answers come once, its pairs name them; sizes and attention are those of four answers."""
    pool = PairPool([RankedStore(), Store(LABELS)])
    assert len(pool) == 11 and len(pool.grouping) == 6 and pool.grouping.first_pair.tolist() == [0, 6, 7, 8, 9, 10, 11]
    found = pool.group(0)
    assert [answer.tolist()[0] for answer in found.group.answers] == [10, 12, 15, 19] and len(found.group.prompt) == 10
    assert found.answers.tolist() == [list(each) for each in RankedStore.PAIRS] and found.pairs.tolist() == [*range(6)]
    assert pool.sizes(share_prompts=True).tolist()[:3] == [10 + 2 + 3 + 4 + 5, 7 + 1 + 6, 1 + 2 + 6]
    assert pool.sizes(share_prompts=False).tolist()[0] == 4 * 10 + 14
    assert pool.grouping.pairs_of(np.array([1, 0])).tolist() == [6, 0, 1, 2, 3, 4, 5]
    assert pool.grouping.pairs_and_places(np.array([1, 0, 1]))[1].tolist() == [0, *[1] * 6, 2]
    assert pool.grouping.groups_of(np.array([0, 5, 6, 10])).tolist() == [0, 0, 1, 5]
    twice = pool.group_lengths(np.array([0, 0]))
    assert twice.positions(share_prompts=True).tolist() == [24, 24], "a group may come twice"


def test_a_group_keeps_what_its_pairs_need():
    """A pair that a loss leaves out takes with it the answers that no other pair has; the rest stays."""
    pool, selection = PairPool([RankedStore()]), Selection(np.arange(2))
    pool.describe = "pair {}".format  # type: ignore[method-assign]
    select(pool, selection, lambda labels: (np.arange(len(labels)) >= 4, np.arange(len(labels)) == 5), labelled=False)
    assert selection.ids.tolist() == [0, 1] and selection.notes == ["1 pairs swapped by their safety labels, 4 dropped"]
    found = pool.group(0)
    assert found.pairs.tolist() == [4, 5] and found.answers.tolist() == [[0, 1], [1, 2]]
    assert [len(answer) for answer in found.group.answers] == [3, 5, 4], "1, 3 and, exchanged, 3, 2"
    assert pool.sizes(share_prompts=True).tolist() == [10 + 12, 7 + 7]
    select(pool, selection, lambda labels: (np.arange(len(labels)) == 2, np.zeros(3, bool)), labelled=False)
    assert selection.ids.tolist() == [1], "a group without pairs"


class LabelledStore(Store):
    """Of whose four rows the second and the fourth are labelled answers."""

    def __init__(self) -> None:
        super().__init__(LABELS)
        self.label[[1, 3]] = 1, 0
        for each in (self.lengths, self.starts):
            each[[1, 3], 2] = each[[1, 3], 1]

    def pair(self, row: int) -> PairTokens:
        found = super().pair(row)
        return found if self.label[row] < 0 else PairTokens(found.prompt, found.chosen, found.chosen)


def test_a_labelled_answer_is_there_once_and_has_nothing_to_swap():
    pool = PairPool([LabelledStore()])
    assert pool.pairs.noun == "rows"
    assert [len(pool.group(group).group.answers) for group in range(4)] == [2, 1, 2, 1]
    assert pool.group(1).answers.tolist() == [[0, 0]]
    assert pool.sizes(share_prompts=True).tolist() == [1 + 2 + 6, 1 + 3, 1 + 4 + 8, 1 + 5]
    assert pool.sizes(share_prompts=False).tolist() == [2 + 2 + 6, 1 + 3, 2 + 4 + 8, 1 + 5]
    selection = Selection(np.arange(4))
    select(pool, selection, lambda labels: (np.ones(4, bool), np.ones(4, bool)), labelled=False)
    assert pool.pairs.swapped.tolist() == [True, False, True, False]
    assert selection.notes == ["2 pairs swapped by their safety labels, 0 dropped"]
    pool.pairs.swap(np.arange(4))
    assert not pool.pairs.swapped.any()
