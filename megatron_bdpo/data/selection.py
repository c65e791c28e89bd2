"""Which groups of a pool are trained on or held out, as settings and loss want it, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.pool import IntArray, PairPool
from megatron_bdpo.errors import UserError

BoolArray = npt.NDArray[np.bool_]

#: Safety labels [P, 2] of pairs -> which of them to keep, and which to swap, [P] each.
Choose = Callable[[npt.NDArray[np.int8]], tuple[BoolArray, BoolArray]]


@dataclass
class Selection:
    """Groups that remain after everything that depends on this run's settings, and what was done to the others."""

    ids: IntArray
    notes: list[str] = field(default_factory=list)


def drop_long(pool: PairPool, selection: Selection, sizes: IntArray, limit: int, *, drop: bool) -> None:
    """Keep the groups that fit a pack of ``limit`` positions.

    Raises:
        UserError: if one does not fit and ``drop`` is off.
    """
    fits = sizes[selection.ids] <= limit
    if fits.all():
        return
    longest = int(selection.ids[np.argmax(sizes[selection.ids])])
    dropped, of = (len(pool.grouping.pairs_of(groups)) for groups in (selection.ids[~fits], selection.ids))
    if not drop:
        raise UserError(
            f"{dropped} of {of} {pool.pairs.noun} do not fit a pack of --seq-length {limit}; the longest "
            f"({pool.describe_group(longest)}) takes {sizes[longest]} positions. Raise --seq-length, truncate with "
            "--max-prompt-length / --max-response-length, or leave them out with --long-pairs drop."
        )
    selection.ids = selection.ids[fits]
    selection.notes.append(f"{dropped} {pool.pairs.noun} longer than --seq-length {limit} dropped")


def refuse_labelled_answers(pool: PairPool, selection: Selection, loss: str, readers: Sequence[str]) -> None:
    """For a loss that compares the answers of pairs, or of groups.

    Args:
        loss: its name.
        readers: names of the losses that read labels of answers.

    Raises:
        UserError: one of the groups is a labelled answer.
    """
    pairs = pool.grouping.pairs_of(selection.ids)
    is_labelled = pool.pairs.label[pairs] >= 0
    if is_labelled.any():
        example = pool.describe(int(pairs[np.argmax(is_labelled)]))
        instead = f", or take a loss that reads labels: {', '.join(readers)}" if readers else ""
        raise UserError(
            f"{loss} compares the answers of a pair, but {int(is_labelled.sum())} of {len(pairs)} rows hold one answer "
            f"with a label ({example}). Leave these rows out{instead}."
        )


def select(pool: PairPool, selection: Selection, choose: Choose, *, labelled: bool) -> None:
    """Keep the pairs that a loss trains on, and swap the answers of those that it wants the other way round.

    Args:
        choose: the loss's choice, by the pairs' safety labels (see ``losses.LossSpec.select``).
        labelled: the loss reads the safety labels, so every pair must have them.

    Raises:
        UserError: if a pair has none.
    """
    pairs = pool.grouping.pairs_of(selection.ids)
    labels = pool.pairs.unsafe[pairs]
    if labelled and (unlabelled := (labels < 0).any(axis=1)).any():
        example = int(pairs[np.argmax(unlabelled)])
        raise UserError(
            f"the loss needs safety labels, but {int(unlabelled.sum())} of {len(labels)} pairs have none "
            f"({pool.describe(example)}). Add boolean columns chosen_safe and rejected_safe, or choose another loss."
        )
    keep, swap = choose(labels)
    swap = swap & (pool.pairs.label[pairs] < 0)
    pool.pairs.swap(pairs[swap])
    pool.grouping.kept[pairs[~keep]] = False
    has_pairs = np.zeros(len(pool.grouping), bool)
    has_pairs[pool.grouping.groups_of(pairs[keep])] = True
    selection.ids = selection.ids[has_pairs[selection.ids]]
    if len(labels) and (labelled or swap.any() or not keep.all()):
        dropped = int((~keep).sum())
        selection.notes.append(f"{int(swap.sum())} pairs swapped by their safety labels, {dropped} dropped")
