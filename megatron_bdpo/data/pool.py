"""All pairs of a run under one numbering, and which of them are trained on, held out or left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.packs import Group, group_tokens
from megatron_bdpo.data.sources import describe_row
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.errors import UserError

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

#: Safety labels [P, 2] of pairs -> which of them to keep, and which to swap, [P] each.
Choose = Callable[[npt.NDArray[np.int8]], tuple[BoolArray, BoolArray]]


class PairPool:
    """Token stores one after the other: pair ids are [0, P) over all of them.

    Attributes:
        lengths: [P, 3] tokens of prompt, chosen, rejected.
        unsafe: [P, 2] of chosen, rejected: 1 unsafe, 0 safe, -1 unknown.
        swapped: [P] pairs whose chosen and rejected change places, as the loss wants it; applies to everything but
            ``store_ids``.
    """

    def __init__(self, stores: Sequence[PairStore]) -> None:
        self.stores = tuple(stores)
        self.offsets = np.cumsum([0, *(len(store) for store in stores)])
        self.lengths = _joined([store.lengths for store in stores])
        self.unsafe = _joined([store.unsafe for store in stores])
        self._scored = _joined([store.scored for store in stores]) if any(each.has_context for each in stores) else None
        self.swapped = np.zeros(len(self.lengths), bool)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def scored(self) -> npt.NDArray[np.int32]:
        """[P, 2] tokens of chosen and rejected that are scored: all but the turns of others in them."""
        return self.lengths[:, 1:] if self._scored is None else self._scored

    def reference(self) -> npt.NDArray[np.float64]:
        """[P, 2] log-probs of chosen and rejected that the rows bring, in nats; NaN: none."""
        values = np.concatenate(
            [np.full((len(each), 2), np.nan) if each.reference is None else each.reference for each in self.stores]
        )
        values[self.swapped] = values[self.swapped][:, ::-1]
        return values

    def margins(self) -> npt.NDArray[np.float64]:
        """[P] margins of rewards that the rows ask for; NaN: none."""
        return np.concatenate(
            [np.full(len(each), np.nan) if each.margin is None else each.margin for each in self.stores]
        )

    def store_ids(self, index: int) -> IntArray:
        """Pair ids of the store at ``index``, in the store's order."""
        return np.arange(self.offsets[index], self.offsets[index + 1])

    def swap(self, ids: IntArray) -> None:
        """Exchange chosen and rejected of these pairs."""
        if not len(ids):
            return
        if not self.lengths.flags.writeable:
            self.lengths, self.unsafe = self.lengths.copy(), self.unsafe.copy()
        self.swapped[ids] ^= True
        if self._scored is not None:
            self._scored = self._scored if self._scored.flags.writeable else self._scored.copy()
            self._scored[ids] = self._scored[ids][:, ::-1]
        self.lengths[ids] = self.lengths[ids][:, [0, 2, 1]]
        self.unsafe[ids] = self.unsafe[ids][:, ::-1]

    def group(self, pair_id: int, *, unconditional: bool = False) -> Group:
        """Tokens of one pair: its prompt, or with ``unconditional`` the empty one, and its answers, chosen first."""
        store, row = self._locate(pair_id)
        pair = store.pair(row)
        prompt = store.unconditional_prompt(row) if unconditional else pair.prompt
        answers, scored = [pair.chosen, pair.rejected], list(pair.scored)
        if self.swapped[pair_id]:
            answers.reverse()
            scored.reverse()
        return Group(prompt, answers, scored)

    def sizes(self, *, share_prompts: bool) -> IntArray:
        """[P] pack positions each pair takes, with its own prompt or with the empty one, whichever is longer.

        So every pack that holds some pairs also holds them after the empty prompt, which the resident reference needs.
        """
        lengths = self.lengths.copy()
        np.maximum(lengths[:, 0], unconditional_lengths(self), out=lengths[:, 0])
        return group_tokens(lengths, share_prompts=share_prompts)

    def describe(self, pair_id: int) -> str:
        """Where a pair comes from, for messages."""
        store, row = self._locate(pair_id)
        return describe_row(store.sources[store.source[row]], int(store.row[row]))

    def origin(self, pair_id: int) -> tuple[str, int]:
        """The data set that a pair comes from, and its row there, counted from 1."""
        store, row = self._locate(pair_id)
        return store.sources[store.source[row]].path, int(store.row[row])

    def _locate(self, pair_id: int) -> tuple[PairStore, int]:
        index = int(np.searchsorted(self.offsets, pair_id, side="right")) - 1
        return self.stores[index], int(pair_id - self.offsets[index])


def unconditional_lengths(pool: PairPool) -> npt.NDArray[np.int32]:
    """[P] tokens of each pair's unconditional prompt."""
    return np.concatenate([store.unconditional for store in pool.stores])


def by_source(pool: PairPool, index: int, ids: IntArray) -> list[tuple[IntArray, float]]:
    """Those of ``ids`` that belong to the store at ``index``, by data source, with the source's weight."""
    store = pool.stores[index]
    if len(store.sources) == 1:
        return [(ids, store.sources[0].weight)]
    source = store.source[ids - pool.offsets[index]]
    return [(ids[source == number], spec.weight) for number, spec in enumerate(store.sources)]


def _joined[Kind: np.generic](arrays: list[npt.NDArray[Kind]]) -> npt.NDArray[Kind]:
    """One after the other; a single one is still the store's memory map, which the ranks of a node share."""
    if len(arrays) > 1:
        return np.concatenate(arrays)
    only = arrays[0].view()
    only.setflags(write=False)
    return only


@dataclass
class Selection:
    """Pairs that remain after everything that depends on this run's settings, and what was done to the others."""

    ids: IntArray
    notes: list[str] = field(default_factory=list)


def drop_long(pool: PairPool, selection: Selection, sizes: IntArray, limit: int, *, drop: bool) -> None:
    """Keep the pairs that fit a pack of ``limit`` positions.

    Raises:
        UserError: if one does not fit and ``drop`` is off.
    """
    fits = sizes[selection.ids] <= limit
    if fits.all():
        return
    longest = int(selection.ids[np.argmax(sizes[selection.ids])])
    count = int((~fits).sum())
    if not drop:
        raise UserError(
            f"{count} of {len(selection.ids)} pairs do not fit a pack of --seq-length {limit}; the longest "
            f"({pool.describe(longest)}) takes {sizes[longest]} positions. Raise --seq-length, truncate with "
            "--max-prompt-length / --max-response-length, or leave them out with --long-pairs drop."
        )
    selection.ids = selection.ids[fits]
    selection.notes.append(f"{count} pairs longer than --seq-length {limit} dropped")


def select(pool: PairPool, selection: Selection, choose: Choose, *, labelled: bool) -> None:
    """Keep the pairs that a loss trains on, and swap the answers of those that it wants the other way round.

    Args:
        choose: the loss's choice, by the pairs' safety labels (see ``losses.LossSpec.select``).
        labelled: the loss reads the labels, so every pair must have them.

    Raises:
        UserError: if a pair has none.
    """
    labels = pool.unsafe[selection.ids]
    if labelled and (unlabelled := (labels < 0).any(axis=1)).any():
        example = int(selection.ids[np.argmax(unlabelled)])
        raise UserError(
            f"the loss needs safety labels, but {int(unlabelled.sum())} of {len(labels)} pairs have none "
            f"({pool.describe(example)}). Add boolean columns chosen_safe and rejected_safe, or choose another loss."
        )
    keep, swap = choose(labels)
    pool.swap(selection.ids[swap])
    selection.ids = selection.ids[keep]
    if len(labels) and (labelled or swap.any() or not keep.all()):
        dropped = int((~keep).sum())
        selection.notes.append(f"{int(swap.sum())} pairs swapped by their safety labels, {dropped} dropped")


def hold_out(ids: IntArray, share: float, seed: int) -> tuple[IntArray, IntArray]:
    """Split off a random share of the pairs. Returns (train, held out), each in the original order."""
    if not 0 <= share < 1:
        raise UserError(f"--eval-share must be at least 0 and below 1, not {share}.")
    count = round(len(ids) * share)
    if share and not count:
        raise UserError(f"--eval-share {share} of {len(ids)} pairs is not even one. Raise it, or leave it out.")
    chosen = np.random.default_rng([seed, 2]).permutation(len(ids))[:count]
    mask = np.zeros(len(ids), bool)
    mask[chosen] = True
    return ids[~mask], ids[mask]
