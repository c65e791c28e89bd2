"""All pairs and groups of a run under one numbering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.answer_table import AnswerTable, answer_table
from megatron_bdpo.data.grouping import Grouping
from megatron_bdpo.data.packs import Group, GroupLengths
from megatron_bdpo.data.pair_columns import IntArray, PairColumns
from megatron_bdpo.data.prompt_kinds import PromptKind, Prompts
from megatron_bdpo.data.sources import describe_row
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.data.tokenization import TokenArray


class ComparedGroup(NamedTuple):
    """A group with its p pairs."""

    group: Group
    pairs: IntArray  # [p] ids
    answers: IntArray  # [p, 2] which of its answers are chosen and rejected


class PairPool:
    """Token stores one after the other: pair ids are [0, P) over all of them, group ids [0, G).

    A group is the pairs of one row with the same prompt (see ``store``). Groups are what is drawn, packed and scored;
    pairs are what losses compare. Most rows give one pair, which is a group of its own.

    Attributes:
        pairs: what the rows say of them.
        grouping: which pairs are of which group, and take part.
        prompts: that a group's answers may follow: its own, and others.
    """

    def __init__(self, stores: Sequence[PairStore]) -> None:
        self.stores = tuple(stores)
        self.offsets = np.cumsum([0, *(len(store) for store in stores)])
        self.pairs = PairColumns(self.stores)
        self.grouping = Grouping([store.starts for store in stores])
        self.prompts = Prompts(self.stores, self.grouping)

    def __len__(self) -> int:
        """P."""
        return len(self.pairs)

    def group(self, group_id: int, after: PromptKind = PromptKind.OWN) -> ComparedGroup:
        """Tokens of a group: the prompt that its answers are to follow, the answers of the pairs that take part, in the
        order in which they name them, chosen first; and the pairs."""
        ids = self.grouping.pairs_of(np.array([group_id]))
        store, first = self._locate(int(self.grouping.first_pair[group_id]))
        before = int(self.grouping.first_pair[group_id]) - first  # pairs of the stores before
        answers: dict[int, tuple[TokenArray, npt.NDArray[np.bool_] | None]] = {}
        compared = np.zeros((len(ids), 2), np.int64)
        places: dict[int, int] = {}
        for number, pair_id in enumerate(ids.tolist()):
            pair, (_, *starts) = store.pair(pair_id - before), store.starts[pair_id - before].tolist()
            sides = list(zip(starts, pair.parts[1:], pair.scored, strict=True))
            for side, (start, tokens, scored) in enumerate(reversed(sides) if self.pairs.swapped[pair_id] else sides):
                compared[number, side] = places.setdefault(start, len(places))
                answers[start] = tokens, scored
        tokens, scored = zip(*answers.values(), strict=True)
        return ComparedGroup(Group(self.prompts.tokens(group_id, after), tokens, scored), ids, compared)

    def group_lengths(self, groups: IntArray) -> GroupLengths:
        """Of these groups, with the answers of the pairs that take part."""
        if self.grouping.has_single_pairs and (self.pairs.label[groups] < 0).all():
            return GroupLengths.of_table(self.pairs.lengths[groups])
        pairs, table = self.answers_of(groups)
        tokens = self.pairs.lengths[pairs, 1:].ravel().astype(np.int64)
        return GroupLengths.of_answers(self.prompts.lengths(groups, PromptKind.OWN), table.group, tokens[table.first])

    def answers_of(self, groups: IntArray) -> tuple[IntArray, AnswerTable]:
        """The pairs of these groups that take part, and their answers."""
        pairs, place = self.grouping.pairs_and_places(groups)
        return pairs, answer_table(self.pairs.starts[pairs, 1:], place, len(groups))

    def sizes(self, *, share_prompts: bool) -> IntArray:
        """[G] pack positions each group takes, with its own prompt or with the empty one, whichever is longer.

        So every pack that holds some groups also holds them after the empty prompt, which the resident reference needs.
        """
        groups = np.arange(len(self.grouping))
        lengths = self.group_lengths(groups)
        longer = np.maximum(lengths.prompt, self.prompts.lengths(groups, PromptKind.EMPTY))
        return lengths.with_prompts(longer).positions(share_prompts=share_prompts)

    def attention(self, *, share_prompts: bool) -> IntArray:
        """[G] what the attention of each group costs after its own prompt: see ``GroupLengths.squares``."""
        return self.group_lengths(np.arange(len(self.grouping))).squares(share_prompts=share_prompts)

    def describe(self, pair_id: int) -> str:
        """Where a pair comes from, for messages."""
        store, row = self._locate(pair_id)
        return describe_row(store.sources[store.source[row]], int(store.row[row]))

    def describe_group(self, group_id: int) -> str:
        """Where a group comes from, for messages."""
        return self.describe(int(self.grouping.first_pair[group_id]))

    def origin(self, pair_id: int) -> tuple[str, int]:
        """The data set that a pair comes from, and its row there, counted from 1."""
        store, row = self._locate(pair_id)
        return store.sources[store.source[row]].path, int(store.row[row])

    def _locate(self, pair_id: int) -> tuple[PairStore, int]:
        index = int(np.searchsorted(self.offsets, pair_id, side="right")) - 1
        return self.stores[index], int(pair_id - self.offsets[index])


def by_source(pool: PairPool, index: int, groups: IntArray) -> list[tuple[IntArray, float]]:
    """Those of ``groups`` that belong to the store at ``index``, by data source, with the source's weight."""
    store = pool.stores[index]
    if len(store.sources) == 1:
        return [(groups, store.sources[0].weight)]
    source = store.source[pool.grouping.first_pair[groups] - pool.offsets[index]]
    return [(groups[source == number], spec.weight) for number, spec in enumerate(store.sources)]
