"""Which groups ``--eval-share`` holds out: those of whole prompts, so that no held-out prompt is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.digests import Digests
from megatron_bdpo.errors import UserError

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Split:
    """Groups to train on and groups held out, each in the order in which they were given.

    Attributes:
        wanted: how many the share is.
        prompts_repeat: some prompt has several groups. If none has, ``wanted`` and the seed decide the split alone.
    """

    train: IntArray
    held_out: IntArray
    wanted: int
    prompts_repeat: bool

    @property
    def notes(self) -> list[str]:
        """What to say of a share that whole prompts do not make."""
        if len(self.held_out) == self.wanted:
            return []
        return [f"--eval-share is {self.wanted} rows, and {len(self.held_out)} is the nearest with whole prompts"]

    @property
    def digest(self) -> str:
        """What tells this split from others of the same numbers."""
        return blake2b(self.held_out.tobytes(), digest_size=8).hexdigest()


def hold_out(groups: IntArray, prompts: Digests, share: float, seed: int) -> Split:
    """Split off a random share of the groups, with all groups of a prompt on one side.

    The smaller side is drawn, prompt after prompt in random order, each with the same chance whatever the number of its
    groups. One whose groups do not fit any more is passed over, so the share is exact where prompts of one group are
    left to fill the last gap. Where it is not, the smallest of those passed over is taken, too, if that is nearer. Each
    side has one prompt at least. Where no prompt repeats, a permutation of the groups is cut in two.

    Args:
        groups: ids.
        prompts: [groups] the digest of each one's prompt.
        share: of the groups, between 0 and 1, without these.

    Raises:
        UserError: the share is none, is less than one group, or there is one prompt only.
    """
    if not 0 < share < 1:
        raise UserError(f"--eval-share must be at least 0 and below 1, not {share}.")
    wanted = round(len(groups) * share)
    if not wanted:
        raise UserError(
            f"--eval-share {share} of {len(groups)} usable rows is not even one. Raise it, or leave it out."
        )
    _, first, prompt_of, sizes = np.unique(prompts, return_index=True, return_inverse=True, return_counts=True)
    if len(first) == 1:
        raise UserError(
            f"--eval-share {share}: all {len(groups)} usable rows have one prompt, and rows of one prompt are on one "
            "side. Add rows with other prompts, name held-out rows with --eval-pair-data, or leave it out."
        )
    place = np.empty(len(groups), np.int64)
    place[np.random.default_rng([seed, 2]).permutation(len(groups))] = np.arange(len(groups))
    order = np.argsort(place[first])
    drawn = np.zeros(len(first), bool)
    is_smaller = 2 * wanted <= len(groups)
    order = order if is_smaller else order[::-1]
    drawn[order] = _draw(sizes[order], wanted if is_smaller else len(groups) - wanted)
    held_out = drawn[prompt_of] == is_smaller
    return Split(groups[~held_out], groups[held_out], wanted, len(first) < len(groups))


def _draw(sizes: IntArray, wanted: int) -> BoolArray:
    """[K] which of K prompts, in this order, make up ``wanted`` groups, or nearly so: some, and not all of them."""
    drawn = np.zeros(len(sizes), bool)
    missing, candidates = wanted, np.arange(len(sizes))
    while len(candidates := candidates[sizes[candidates] <= missing]):  # no more often than there are sizes
        fitting = int(np.searchsorted(np.cumsum(sizes[candidates]), missing, side="right"))
        drawn[candidates[:fitting]] = True
        missing -= int(sizes[candidates[:fitting]].sum())
        candidates = candidates[fitting:]
    left = np.flatnonzero(~drawn)
    smallest = left[np.argmin(sizes[left])]
    if len(left) > 1 and (not drawn.any() or sizes[smallest] - missing < missing):
        drawn[smallest] = True
    return drawn
