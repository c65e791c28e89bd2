"""Which prompt a group's answers follow when a model scores them: their own, one that says nothing, or another group's.

The last gives mismatched answers, of which KTO makes its estimate of the KL divergence (arXiv 2402.01306, section 4.1).
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.digests import Digests, token_digests
from megatron_bdpo.data.grouping import Grouping
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.data.tokenization import TokenArray
from megatron_bdpo.data.tokenized_rows import first_pairs
from megatron_bdpo.errors import UserError

IntArray = npt.NDArray[np.int64]


class PromptKind(enum.IntEnum):
    """The prompt that answers are scored after."""

    OWN = 0
    EMPTY = 1
    """The unconditional prompt."""
    OTHER = 2
    """That of another group, which says something else: see `other_groups`."""


class Prompts:
    """The prompts that the groups of some stores have, one store after the other: G groups."""

    def __init__(self, stores: Sequence[PairStore], grouping: Grouping) -> None:
        self._stores, self._grouping = stores, grouping
        self._lengths = np.concatenate([store.lengths[first_pairs(store.starts), 0] for store in stores])

    def lengths(self, groups: IntArray, kind: PromptKind) -> npt.NDArray[np.int32]:
        """[n] tokens of the prompt of a kind that each group's answers may follow."""
        if kind == PromptKind.EMPTY:
            empty = np.concatenate([store.unconditional for store in self._stores])
            return empty[self._grouping.first_pair[groups]]
        return self._lengths[self.other_group[groups] if kind == PromptKind.OTHER else groups]

    def tokens(self, group_id: int, kind: PromptKind) -> TokenArray:
        """Token ids of that prompt."""
        of = int(self.other_group[group_id]) if kind == PromptKind.OTHER else group_id
        index = int(np.searchsorted(self._grouping.offsets, of, side="right")) - 1
        store = self._stores[index]
        pair = int(self._grouping.first_pair[of] - self._grouping.first_pair[self._grouping.offsets[index]])
        return store.unconditional_prompt(pair) if kind == PromptKind.EMPTY else store.prompt(pair)

    def digests(self, index: int) -> Digests:
        """[g] of the own prompts of the g groups of the store at ``index``: the tokens that the model sees, as they
        are stored. Reads all of these: some 2 seconds for a million."""
        store = self._stores[index]
        return token_digests(store.prompt(pair) for pair in first_pairs(store.starts).tolist())

    @functools.cached_property
    def other_group(self) -> IntArray:
        """[G] the group whose prompt each group's mismatched answers follow, of the same store.

        Raises:
            UserError: a store has one prompt alone.
        """
        found = []
        for store, offset in zip(self._stores, self._grouping.offsets, strict=False):
            of_store = other_groups(store)
            if of_store is None:
                raise UserError(
                    f"all rows of {', '.join(source.path for source in store.sources)} have one prompt. The loss needs "
                    "answers to other prompts (KTO's estimate of the KL divergence): add rows with other prompts."
                )
            found.append(of_store + offset)
        return np.concatenate(found)


def other_groups(store: PairStore) -> IntArray | None:
    """[G] of each group in a store the one whose prompt its mismatched answers follow; None: all have one prompt.

    It is the nearest one before it with another prompt. Those that begin the store have none before them: they take the
    nearest one after them. So it hangs on no setting of a run, and stays what it is when the store grows.
    """
    first = first_pairs(store.starts)
    lengths = store.lengths[first, 0]
    begins = np.arange(len(first))  # where the run of groups with one prompt begins that each is in
    for place in np.flatnonzero(lengths[1:] == lengths[:-1]) + 1:
        if np.array_equal(store.prompt(int(first[place])), store.prompt(int(first[place - 1]))):
            begins[place] = begins[place - 1]
    if not len(begins) or not begins[-1]:
        return None
    after_the_first_run = int(np.argmax(begins > 0))
    return np.where(begins > 0, begins - 1, after_the_first_run)
