"""Putting pairs into packs: bin packing, for the steps of a plan all at once, or for many pairs without steps."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
PackNumbers = npt.NDArray[np.int32]

_BLOCK = 2**18  # loads, or pairs, of the steps that are packed at once: they fit a cache
_TRIES = 3  # lengths tried below that of the packs which the quick way finds


def shortest(step_sizes: IntArray, packs: int, limit: int, grain: int, ranks: int = 1) -> PackNumbers:
    """The pack of each pair [B, N], for B steps of N pairs: in every step the longest pack is as short as is found.

    Longest pair first into the emptiest pack is quick and near the least length there can be, where packs hold many
    pairs. The steps in which it is not there are tried again by best fit, at that length, a little more, and the limit.

    Args:
        step_sizes: [B, N] positions that each pair takes.
        limit: that packs should not exceed. They may: then as many packs do not hold the pairs, as far as is found.
        grain: what the lengths are told apart by.
        ranks: as many packs of a step are not empty, if it has as many pairs.
    """
    pack_of = np.empty(step_sizes.shape, np.int32)
    for block in _blocks(step_sizes, packs):
        pack_of[block] = _shortest(step_sizes[block], packs, limit, grain, ranks)
    return pack_of


def _blocks(step_sizes: npt.NDArray[Any], packs: int) -> Iterator[slice]:
    """The steps, a few thousand at a time."""
    steps, pairs = step_sizes.shape
    few = max(1, _BLOCK // max(packs, pairs))
    return (slice(start, start + few) for start in range(0, steps, few))


def _shortest(step_sizes: IntArray, packs: int, limit: int, grain: int, ranks: int) -> IntArray:
    pack_of = emptiest_first(step_sizes, packs)
    longest = per_pack(step_sizes, pack_of, packs).max(axis=1)
    ideal = np.maximum(-(-step_sizes.sum(axis=1) // packs), step_sizes.max(axis=1))
    ideal = -(-ideal // grain) * grain
    for more in (*range(0, _TRIES * grain, grain), limit):
        length = np.minimum(ideal + more, limit)
        left = np.flatnonzero(longest > length)
        if len(left):
            tried, fits = best_fit(step_sizes[left], packs, length[left], ranks)
            pack_of[left[fits]] = tried[fits]
            longest[left[fits]] = length[left[fits]]
    return pack_of


def emptiest_first(step_sizes: IntArray, packs: int) -> IntArray:
    """The pack of each pair [B, N]: in every step the longest pair first, each into the emptiest pack."""
    rows = np.arange(len(step_sizes))
    load = np.zeros((len(step_sizes), packs), np.int64)
    pack_of = np.empty_like(step_sizes)
    for pair in np.argsort(-step_sizes, axis=1, kind="stable").T:
        emptiest = load.argmin(axis=1)
        pack_of[rows, pair] = emptiest
        load[rows, emptiest] += step_sizes[rows, pair]
    return pack_of


def best_fit(
    step_sizes: IntArray, packs: int, length: IntArray, ranks: int = 1
) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """The same with each pair in the fullest pack that has room for it, of ``length`` [B] in each step.

    Returns:
        The pack of each pair [B, N], and in which steps [B] all have found room, in ``ranks`` packs or more.
    """
    rows = np.arange(len(step_sizes))
    load = np.zeros((len(step_sizes), packs), np.int64)
    pack_of = np.empty_like(step_sizes)
    fits = np.ones(len(step_sizes), bool)
    for pair in np.argsort(-step_sizes, axis=1, kind="stable").T:
        size = step_sizes[rows, pair]
        has_room = load + size[:, None] <= length[:, None]
        fullest = np.where(has_room, load, -1).argmax(axis=1)
        fits &= has_room[rows, fullest]
        pack_of[rows, pair] = fullest
        load[rows, fullest] += size
    return pack_of, fits & (np.count_nonzero(load, axis=1) >= ranks)


def per_pack(values: IntArray, pack_of: npt.NDArray[np.integer], packs: int, pairs: IntArray | None = None) -> IntArray:
    """[B, packs] sums over the pairs of each pack.

    Args:
        values: [B, N], or with ``pairs`` [P] of all pairs.
        pack_of: [B, N].
        pairs: [B, N] which pair is where.
    """
    sums = np.empty((len(pack_of), packs), np.int64)
    for block in _blocks(pack_of, packs):
        place = np.arange(len(pack_of[block]))[:, None] * packs + pack_of[block]
        weights = values[block] if pairs is None else values[pairs[block]]
        counted = np.bincount(place.ravel(), weights=weights.ravel(), minlength=len(place) * packs)  # exact below 2^53
        sums[block] = counted.reshape(-1, packs)
    return sums


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below ``value``."""
    return -(-value // multiple) * multiple


def pack_all(ids: IntArray, sizes: IntArray, length: int, multiple: int) -> list[IntArray]:
    """Put every pair into as few packs of ``length`` as best-fit decreasing finds; the number of packs is a multiple.

    Used where each pair is visited once and there are no steps: evaluation and reference scoring.

    Args:
        ids: [n] pair ids; sizes: [n] their sizes, none above ``length``.
        multiple: pad the list with empty packs to a multiple of this (data-parallel ranks).
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free positions, pack), sorted
    for index in np.argsort(-sizes, kind="stable"):
        size = int(sizes[index])
        slot = bisect.bisect_left(room, (size, -1))
        if slot == len(room):
            free, pack = length, len(packs)
            packs.append([])
        else:
            free, pack = room.pop(slot)
        packs[pack].append(int(ids[index]))
        bisect.insort(room, (free - size, pack))
    packs += [[]] * (-len(packs) % multiple)
    return [np.array(pack, np.int64) for pack in packs]


def pack_evenly(ids: IntArray, sizes: IntArray, limit: int, multiple: int, unit: int) -> tuple[list[IntArray], int]:
    """Put every pair into one of as many packs as :func:`pack_all` needs, and make these as short as they can be.

    Args:
        ids: [n] pair ids; sizes: [n] their sizes, none above ``limit``.
        limit: greatest length of a pack, a multiple of ``unit``.
        multiple: the number of packs is a multiple of this.
        unit: the packs' length is a multiple of this.

    Returns:
        The packs, and the length they all have.
    """
    tight = pack_all(ids, sizes, limit, multiple)
    even: list[list[int]] = [[] for _ in tight]
    loads = [(0, pack) for pack in range(len(tight))]  # a heap
    for index in np.argsort(-sizes, kind="stable"):
        load, pack = loads[0]
        even[pack].append(int(ids[index]))
        heapq.heapreplace(loads, (load + int(sizes[index]), pack))
    fullest = max((load for load, _ in loads), default=0)
    if fullest <= limit:
        return [np.array(pack, np.int64) for pack in even], round_up(fullest, unit)
    return tight, limit


def cut_into_blocks(sizes: IntArray, length: int, packs: int) -> Iterator[slice]:
    """Cut pairs, in the order that they have, into blocks of as many as ``packs`` packs of ``length`` hold by best fit.

    A block depends on its own pairs and on the first one after it. A longer pair begins a block, whose packs are as
    long as it is.

    Args:
        sizes: [n] positions that each pair takes.
    """
    ends = np.concatenate([[0], np.cumsum(sizes)])
    start = 0
    while start < len(sizes):
        limit = max(length, int(sizes[start]))
        stop = int(np.searchsorted(ends, ends[start] + packs * limit, side="right")) - 1
        longer = np.flatnonzero(sizes[start:stop] > limit)
        stop = start + int(longer[0]) if len(longer) else stop
        while excess := sum(
            int(sizes[pack].sum()) for pack in pack_all(np.arange(start, stop), sizes[start:stop], limit, 1)[packs:]
        ):
            stop = int(np.searchsorted(ends, ends[stop] - excess, side="right")) - 1
        yield slice(start, stop)
        start = stop
