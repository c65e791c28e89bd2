"""All pairs and groups of a run under one numbering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.answer_table import AnswerTable, answer_table
from megatron_bdpo.data.grouping import Grouping
from megatron_bdpo.data.packs import Group, GroupLengths
from megatron_bdpo.data.prompt_kinds import PromptKind, Prompts
from megatron_bdpo.data.sources import describe_row
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.data.tokenization import TokenArray

IntArray = npt.NDArray[np.int64]


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
        lengths: [P, 3] tokens of prompt, chosen, rejected.
        unsafe: [P, 2] of chosen, rejected: 1 unsafe, 0 safe, -1 unknown.
        label: [P] of labelled answers, which are pairs of themselves: 1 desirable, 0 undesirable; -1: a pair.
        swapped: [P] pairs whose chosen and rejected change places, as the loss wants it; applies to everything but
            the stores' own numbers.
        grouping: which pairs are of which group, and take part.
        prompts: that a group's answers may follow: its own, and others.
    """

    def __init__(self, stores: Sequence[PairStore]) -> None:
        self.stores = tuple(stores)
        self.offsets = np.cumsum([0, *(len(store) for store in stores)])
        self.lengths = _joined([store.lengths for store in stores])
        self._starts = _joined([store.starts for store in stores])  # in each store's tokens
        self.unsafe = _joined([store.unsafe for store in stores])
        self.label = _joined([store.label for store in stores])
        self._scored = _joined([store.scored for store in stores]) if any(each.has_context for each in stores) else None
        self.swapped = np.zeros(len(self.lengths), bool)
        self.grouping = Grouping([store.starts for store in stores])
        self.prompts = Prompts(self.stores, self.grouping)

    def __len__(self) -> int:
        """P."""
        return len(self.lengths)

    @property
    def scored(self) -> npt.NDArray[np.int32]:
        """[P, 2] tokens of chosen and rejected that are scored: all but the turns of others in them."""
        return self.lengths[:, 1:] if self._scored is None else self._scored

    @property
    def noun(self) -> str:
        """What the P are, for messages."""
        is_labelled = self.label >= 0
        return "answers" if is_labelled.all() else "rows" if is_labelled.any() else "pairs"

    def reference(self) -> npt.NDArray[np.float64]:
        """[P, 2] log-probs of chosen and rejected that the rows bring, in nats; NaN: none."""
        return self._by_side([store.reference for store in self.stores])

    def _by_side(self, of_stores: Sequence[npt.NDArray[np.float64] | None]) -> npt.NDArray[np.float64]:
        """[P, 2] of chosen and rejected, from what each store has; NaN where it has none."""
        values = np.concatenate(
            [
                np.full((len(store), 2), np.nan) if each is None else each
                for store, each in zip(self.stores, of_stores, strict=True)
            ]
        )
        values[self.swapped] = values[self.swapped][:, ::-1]
        return values

    def margins(self) -> npt.NDArray[np.float64]:
        """[P] margins of rewards that the rows ask for; NaN: none."""
        return np.concatenate(
            [np.full(len(each), np.nan) if each.margin is None else each.margin for each in self.stores]
        )

    def swap(self, ids: IntArray) -> None:
        """Exchange chosen and rejected of these pairs; of a labelled answer there is nothing to exchange."""
        ids = ids[self.label[ids] < 0]
        if not len(ids):
            return
        if not self.lengths.flags.writeable:
            self.lengths, self.unsafe = self.lengths.copy(), self.unsafe.copy()
        self.swapped[ids] ^= True
        if self._scored is not None:
            self._scored = self._scored if self._scored.flags.writeable else self._scored.copy()
            self._scored[ids] = self._scored[ids][:, ::-1]
        self.lengths[ids] = self.lengths[ids][:, [0, 2, 1]]
        self._starts = self._starts if self._starts.flags.writeable else self._starts.copy()
        self._starts[ids] = self._starts[ids][:, [0, 2, 1]]
        self.unsafe[ids] = self.unsafe[ids][:, ::-1]

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
            for side, (start, tokens, scored) in enumerate(reversed(sides) if self.swapped[pair_id] else sides):
                compared[number, side] = places.setdefault(start, len(places))
                answers[start] = tokens, scored
        tokens, scored = zip(*answers.values(), strict=True)
        return ComparedGroup(Group(self.prompts.tokens(group_id, after), tokens, scored), ids, compared)

    def group_lengths(self, groups: IntArray) -> GroupLengths:
        """Of these groups, with the answers of the pairs that take part."""
        if self.grouping.has_single_pairs and (self.label[groups] < 0).all():
            return GroupLengths.of_table(self.lengths[groups])
        pairs, table = self.answers_of(groups)
        tokens = self.lengths[pairs, 1:].ravel().astype(np.int64)
        return GroupLengths.of_answers(self.prompts.lengths(groups, PromptKind.OWN), table.group, tokens[table.first])

    def answers_of(self, groups: IntArray) -> tuple[IntArray, AnswerTable]:
        """The pairs of these groups that take part, and their answers."""
        pairs, place = self.grouping.pairs_and_places(groups)
        return pairs, answer_table(self._starts[pairs, 1:], place, len(groups))

    def scores(self) -> npt.NDArray[np.float64]:
        """[P, 2] a judge's of chosen and rejected, the higher the better; NaN: none."""
        return self._by_side([store.score for store in self.stores])

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


def _joined[Kind: np.generic](arrays: list[npt.NDArray[Kind]]) -> npt.NDArray[Kind]:
    """One after the other; a single one is still the store's memory map, which the ranks of a node share."""
    if len(arrays) > 1:
        return np.concatenate(arrays)
    only = arrays[0].view()
    only.setflags(write=False)
    return only
