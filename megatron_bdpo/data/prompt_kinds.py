"""Which prompt a group's answers follow when a model scores them: their own, one that says nothing, or another group's.

The last gives mismatched answers, of which KTO makes its estimate of the KL divergence (arXiv 2402.01306, section 4.1).
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.store import PairStore
from megatron_bdpo.data.tokenized_rows import first_pairs

IntArray = npt.NDArray[np.int64]


class PromptKind(enum.IntEnum):
    """The prompt that answers are scored after."""

    OWN = 0
    EMPTY = 1
    """The unconditional prompt."""
    OTHER = 2
    """That of another group, which says something else: see `other_groups`."""


def other_groups(store: PairStore) -> IntArray | None:
    """[G] of each group in a store the one whose prompt its mismatched answers follow; None: all have one prompt.

    It is the nearest one before it with another prompt. Those that begin the store have none before them: they take the
    nearest one after them. So it hangs on no setting of a run, and stays what it is when the store grows.
    """
    first = first_pairs(store.starts)
    lengths = store.lengths[first, 0]
    begins = np.arange(len(first))  # where the run of groups with one prompt begins that each is in
    for place in np.flatnonzero(lengths[1:] == lengths[:-1]) + 1:
        if np.array_equal(store.pair(int(first[place])).prompt, store.pair(int(first[place - 1])).prompt):
            begins[place] = begins[place - 1]
    if not len(begins) or not begins[-1]:
        return None
    after_the_first_run = int(np.argmax(begins > 0))
    return np.where(begins > 0, begins - 1, after_the_first_run)
