"""What the rows of all stores say of their pairs, column by column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.store import PairStore

IntArray = npt.NDArray[np.int64]


class PairColumns:
    """The columns of stores' pairs, one store after the other, as far as the run reads them.

    Attributes:
        lengths: [P, 3] tokens of prompt, chosen, rejected.
        starts: [P, 3] where these begin in their store's tokens.
        scored: [P, 2] tokens of chosen and rejected that are scored: all but the turns of others in them.
        unsafe: [P, 2] of chosen, rejected: 1 unsafe, 0 safe, -1 unknown.
        label: [P] of labelled answers, which are pairs of themselves: see ``labels``; -1: a pair.
        swapped: [P] pairs whose chosen and rejected change place, as the loss wants it; applies to everything but
            the stores' own numbers.
    """

    def __init__(self, stores: Sequence[PairStore]) -> None:
        self._stores = stores
        self.lengths = _joined([store.lengths for store in stores])
        self.starts = _joined([store.starts for store in stores])
        self.unsafe = _joined([store.unsafe for store in stores])
        self.label = _joined([store.label for store in stores])
        self._scored = _joined([store.scored for store in stores]) if any(each.has_context for each in stores) else None
        self.swapped = np.zeros(len(self.lengths), bool)

    def __len__(self) -> int:
        """P."""
        return len(self.lengths)

    @property
    def scored(self) -> npt.NDArray[np.int32]:
        return self.lengths[:, 1:] if self._scored is None else self._scored

    @property
    def noun(self) -> str:
        """What the P are, for messages."""
        is_labelled = self.label >= 0
        return "answers" if is_labelled.all() else "rows" if is_labelled.any() else "pairs"

    def reference(self) -> npt.NDArray[np.float64]:
        """[P, 2] log-probs of chosen and rejected that the rows bring, in nats; NaN: none."""
        return self._by_side([store.reference for store in self._stores])

    def scores(self) -> npt.NDArray[np.float64]:
        """[P, 2] a judge's of chosen and rejected, the higher the better; NaN: none."""
        return self._by_side([store.score for store in self._stores])

    def margins(self) -> npt.NDArray[np.float64]:
        """[P] margins of rewards that the rows ask for; NaN: none."""
        return self._or_nan([store.margin for store in self._stores])

    def _by_side(self, of_stores: Sequence[npt.NDArray[np.float64] | None]) -> npt.NDArray[np.float64]:
        values = self._or_nan(of_stores, 2)
        values[self.swapped] = values[self.swapped][:, ::-1]
        return values

    def _or_nan(self, of_stores: Sequence[npt.NDArray[np.float64] | None], *sides: int) -> npt.NDArray[np.float64]:
        """What each store has, [P, *sides]; NaN where it has none."""
        both = zip(self._stores, of_stores, strict=True)
        return np.concatenate([np.full((len(store), *sides), np.nan) if each is None else each for store, each in both])

    def swap(self, ids: IntArray) -> None:
        """Exchange chosen and rejected of these pairs; of a labelled answer there is nothing to exchange."""
        ids = ids[self.label[ids] < 0]
        if not len(ids):
            return
        self.swapped[ids] ^= True
        self.lengths = _with(self.lengths, ids, [0, 2, 1])
        self.starts = _with(self.starts, ids, [0, 2, 1])
        self.unsafe = _with(self.unsafe, ids, [1, 0])
        if self._scored is not None:
            self._scored = _with(self._scored, ids, [1, 0])


def _joined[Kind: np.generic](arrays: list[npt.NDArray[Kind]]) -> npt.NDArray[Kind]:
    """One after the other; a single one is still the store's memory map, which the ranks of a node share."""
    if len(arrays) > 1:
        return np.concatenate(arrays)
    only = arrays[0].view()
    only.setflags(write=False)
    return only


def _with[Kind: np.generic](table: npt.NDArray[Kind], ids: IntArray, order: list[int]) -> npt.NDArray[Kind]:
    """The table with some rows in another order; a store's is copied first."""
    table = table if table.flags.writeable else table.copy()
    table[ids] = table[ids][:, order]
    return table
