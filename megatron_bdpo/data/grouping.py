"""Which pairs are of which group: ids of groups [0, G) and of pairs [0, P) over all stores, and how they belong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.tokenized_rows import first_pairs

IntArray = npt.NDArray[np.int64]


class Grouping:
    """Numbers of pairs and of groups. G of them: most rows give one pair, which is a group of its own.

    Attributes:
        first_pair: [G + 1] the first pair of each group, and P.
        offsets: the first group of each store, and G.
        kept: [P] pairs that take part; the others of a group do not, nor do answers that none of its pairs is left of.
    """

    def __init__(self, starts: Sequence[npt.NDArray[np.int64]]) -> None:
        """
        Args:
            starts: of each store, as ``PairStore.starts``.
        """
        before = np.cumsum([0, *map(len, starts)])
        firsts = [first_pairs(each) + offset for each, offset in zip(starts, before, strict=False)]
        self.first_pair: IntArray = np.concatenate([*firsts, before[-1:]])
        self.offsets = np.cumsum([0, *map(len, firsts)])
        self.kept = np.ones(int(before[-1]), bool)

    def __len__(self) -> int:
        """G."""
        return len(self.first_pair) - 1

    @property
    def has_single_pairs(self) -> bool:
        """Every group is a pair: a group's id is its pair's."""
        return len(self) == len(self.kept)

    def of_store(self, index: int) -> IntArray:
        """Ids of the groups of the store at ``index``, in the store's order."""
        return np.arange(self.offsets[index], self.offsets[index + 1])

    def groups_of(self, pairs: IntArray) -> IntArray:
        """The group of each pair."""
        return np.searchsorted(self.first_pair, pairs, side="right").astype(np.int64) - 1

    def pairs_of(self, groups: IntArray) -> IntArray:
        """Ids of the pairs of these groups that take part, group after group."""
        return self.pairs_and_places(groups)[0]

    def pairs_and_places(self, groups: IntArray) -> tuple[IntArray, IntArray]:
        """:meth:`pairs_of`, and for each pair the place of its group in ``groups``."""
        if self.has_single_pairs:
            kept = self.kept[groups]
            return groups[kept], np.flatnonzero(kept)
        counts = self.first_pair[groups + 1] - self.first_pair[groups]
        place = np.repeat(np.arange(len(groups)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        pairs = self.first_pair[groups][place] + within
        kept = self.kept[pairs]
        return pairs[kept], place[kept]
