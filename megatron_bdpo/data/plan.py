"""Which pairs make up each optimizer step, and in which pack of which rank each pair sits.

A step has *exactly* the number of pairs the user asked for. The packs of all steps have one length T and one number
per rank M, so that Megatron sees a constant global batch size (in packs) and pipeline messages of one shape.

Three deterministic stages, each a pure function of the seed and the pairs' lengths, identical on every rank:

1. *Order*: epochs are shuffled and joined into one endless stream; every pair comes once per epoch (times its
   source's weight).
2. *Steps*: the stream is cut into windows of whole steps. Inside a window each step draws one pair from every length
   stratum and the rest is levelled by swaps, so that steps need nearly the same number of tokens. Which pairs make up
   step k depends neither on the parallel layout nor on how long the run is.
3. *Packs*: the pairs of a step are spread over DP x M packs, longest first into the emptiest pack, and T and M are
   chosen to waste least.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_bdpo.errors import UserError

IntArray = npt.NDArray[np.int64]

_MAX_WINDOW_STEPS = 256
_PACK_CHOICES = 8  # pack counts tried beyond the smallest that fits


@dataclass(frozen=True)
class StepPlan:
    """Steps x packs. Shapes: B steps, N pairs per step, K = DP x M packs per step."""

    steps: IntArray  # [B, N] pair ids
    pack_of: IntArray  # [B, N] in [0, K): which pack of its step holds each pair
    pack_length: int  # T
    microbatches: int  # M
    data_parallel: int  # DP
    real_tokens: IntArray  # [B] tokens of each step after sharing, before padding

    @property
    def packs_per_step(self) -> int:
        return self.microbatches * self.data_parallel

    @property
    def fill(self) -> float:
        """Share of all pack positions that hold a token."""
        return float(self.real_tokens.sum()) / (len(self.steps) * self.packs_per_step * self.pack_length)

    def packs(self, step: int, rank: int) -> list[IntArray]:
        """Pair ids of each of the M packs that data-parallel ``rank`` works on in ``step``."""
        first = rank * self.microbatches
        return [self.steps[step][self.pack_of[step] == pack] for pack in range(first, first + self.microbatches)]


@dataclass(frozen=True)
class PlanSettings:
    """What the plan depends on, besides the pairs."""

    pairs_per_step: int
    data_parallel: int
    max_pack_length: int  # --seq-length
    min_pack_length: int = 0  # longest pair that has to fit besides those drawn (held out, or beyond the last step)
    microbatch_multiple: int = 1  # M is a multiple of this (interleaved pipeline stages)
    length_multiple: int = 8  # T is a multiple of this (sequence parallelism, FP8)
    seed: int = 1234
    pack_pairs: bool = True  # False: one pair per pack, the oracle

    def __post_init__(self) -> None:
        if self.pairs_per_step < 1:
            raise UserError(f"--pairs-per-step must be at least 1, not {self.pairs_per_step}.")
        if self.pairs_per_step < self.data_parallel:
            raise UserError(
                f"--pairs-per-step {self.pairs_per_step} cannot be split over {self.data_parallel} data-parallel ranks "
                f"of which each needs one. Use --pairs-per-step {self.data_parallel} or more, or fewer ranks."
            )
        if self.max_pack_length % self.length_multiple:
            raise UserError(
                f"--seq-length {self.max_pack_length} must be a multiple of {self.length_multiple} "
                "(8, times the context-parallel ranks, times the tensor-parallel ranks under --sequence-parallel)."
            )
        group = self.data_parallel * self.microbatch_multiple
        if not self.pack_pairs and self.pairs_per_step % group:
            raise UserError(
                f"--no-pack-pairs gives every pair its own pack, and {self.pairs_per_step} packs cannot be split "
                f"evenly over {self.data_parallel} data-parallel ranks in groups of {self.microbatch_multiple}. "
                f"Use a multiple of {group}."
            )


def plan_steps(
    sizes: IntArray, settings: PlanSettings, num_steps: int, pools: Sequence[tuple[IntArray, float]] | None = None
) -> StepPlan:
    """Plan the first ``num_steps`` optimizer steps.

    Args:
        sizes: [pairs] pack positions that each pair takes (see ``layout.group_tokens``).
        pools: (pair ids, weight) per data source; weight 2 visits each pair twice an epoch, 0.5 half of them.
            Default: all pairs once.

    Raises:
        UserError: no step at all, fewer pairs than one step needs, or a pair longer than a pack.
    """
    if num_steps < 1:
        raise UserError(f"--train-iters must be at least 1, not {num_steps}.")
    pools = [(np.arange(len(sizes)), 1.0)] if pools is None else pools
    used = np.unique(np.concatenate([ids for ids, _ in pools]))
    longest = int(sizes[used].max(initial=0))
    if longest > settings.max_pack_length:
        raise UserError(
            f"a pair takes {longest} positions, more than a pack of --seq-length {settings.max_pack_length}"
        )
    steps = _draw_steps(sizes, settings, num_steps, pools)
    step_sizes = sizes[steps]
    length, packs, pack_of = _choose_packs(step_sizes, settings)
    pack_of = _deal_to_ranks(step_sizes, pack_of, packs, settings.data_parallel)
    return StepPlan(
        steps, pack_of, length, packs // settings.data_parallel, settings.data_parallel, step_sizes.sum(axis=1)
    )


def epoch_pairs(pools: Sequence[tuple[IntArray, float]]) -> int:
    """Pairs drawn in one epoch."""
    return sum(_pool_draws(ids, weight) for ids, weight in pools)


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
        return [np.array(pack, np.int64) for pack in even], _round_up(fullest, unit)
    return tight, limit


# 1. Order ------------------------------------------------------------------------------------------------------------


def _pool_draws(ids: IntArray, weight: float) -> int:
    return max(1, round(len(ids) * weight)) if len(ids) else 0


def _epoch(pools: Sequence[tuple[IntArray, float]], seed: int, epoch: int) -> IntArray:
    """The pairs of one epoch, shuffled. Fractional weights draw another subset each epoch."""
    rng = np.random.default_rng([seed, epoch])
    drawn = []
    for ids, weight in pools:
        repeats, remainder = divmod(_pool_draws(ids, weight), max(1, len(ids)))
        drawn += [ids] * repeats + [rng.permutation(ids)[:remainder]]
    return rng.permutation(np.concatenate(drawn))


# 2. Steps ------------------------------------------------------------------------------------------------------------


def _draw_steps(
    sizes: IntArray, settings: PlanSettings, num_steps: int, pools: Sequence[tuple[IntArray, float]]
) -> IntArray:
    per_step, per_epoch = settings.pairs_per_step, epoch_pairs(pools)
    if per_epoch < per_step:
        raise UserError(
            f"--pairs-per-step {per_step} is more than the {per_epoch} usable pairs of an epoch. "
            f"Use --pairs-per-step {per_epoch} or less, or more data."
        )
    # Windows depend on the data alone, so that a longer run repeats a shorter one's steps.
    window = min(per_epoch // per_step, _MAX_WINDOW_STEPS)
    windows = -(-num_steps // window)
    epochs = -(-windows * window * per_step // per_epoch)
    stream = np.concatenate([_epoch(pools, settings.seed, epoch) for epoch in range(epochs)])
    steps = [
        _level_window(stream[k * window * per_step : (k + 1) * window * per_step], sizes, window, settings.seed, k)
        for k in range(windows)
    ]
    return np.concatenate(steps)[:num_steps]


def _level_window(ids: IntArray, sizes: IntArray, window: int, seed: int, index: int) -> IntArray:
    """Split a window's pairs into ``window`` steps of nearly equal size. Returns [window, N] pair ids."""
    rng = np.random.default_rng([seed, index, 1])
    by_size = ids[np.argsort(sizes[ids], kind="stable")]
    strata = rng.permuted(by_size.reshape(-1, window), axis=1)  # [N, window]: row = stratum, column = step
    size = sizes[strata]
    total = size.sum(axis=0)
    for _ in range(8 * window):
        high, low = int(total.argmax()), int(total.argmin())
        difference = size[:, high] - size[:, low]
        gap = total[high] - total[low]
        stratum = int(np.abs(2 * difference - gap).argmin())
        moved = difference[stratum]
        if not 0 < moved < gap:
            break
        for array in (strata, size):
            array[stratum, [high, low]] = array[stratum, [low, high]]
        total[high] -= moved
        total[low] += moved
    return strata.T


# 3. Packs ------------------------------------------------------------------------------------------------------------


def _choose_packs(step_sizes: IntArray, settings: PlanSettings) -> tuple[int, int, IntArray]:
    """Pack length, packs per step and the pack of each pair [B, N], wasting least; ties go to fewer packs."""
    unit, limit = settings.length_multiple, settings.max_pack_length
    group = settings.data_parallel * settings.microbatch_multiple

    def length_for(fullest: int) -> int:
        return _round_up(max(fullest, settings.min_pack_length), unit)

    if not settings.pack_pairs:
        own = np.broadcast_to(np.arange(step_sizes.shape[1]), step_sizes.shape)
        return length_for(int(step_sizes.max())), step_sizes.shape[1], own
    largest_step, longest_pair = int(step_sizes.sum(axis=1).max()), int(step_sizes.max())
    fewest = -(-largest_step // limit)
    first = _round_up(max(fewest, group), group)
    best: tuple[int, int, IntArray] | None = None
    for packs in range(first, step_sizes.shape[1] + group, group):
        shortest = length_for(max(longest_pair, -(-largest_step // packs)))
        if best is None or shortest * packs < best[0] * best[1]:  # else it cannot be better, and spreading takes time
            pack_of, fullest = _spread(step_sizes, packs)
            length = length_for(fullest)
            if length <= limit and (best is None or length * packs < best[0] * best[1]):
                best = (length, packs, pack_of)
        if best is not None and packs >= first + _PACK_CHOICES * group:
            break
    assert best is not None, "with a pack for each pair, every pair fits"
    return best


def _spread(step_sizes: IntArray, packs: int) -> tuple[IntArray, int]:
    """Longest pair first into the emptiest pack, for all steps at once. Returns packs [B, N] and the fullest size."""
    rows = np.arange(len(step_sizes))
    load = np.zeros((len(step_sizes), packs), np.int64)
    pack_of = np.empty_like(step_sizes)
    order = np.argsort(-step_sizes, axis=1, kind="stable")
    for column in range(step_sizes.shape[1]):
        pair = order[:, column]
        emptiest = load.argmin(axis=1)
        pack_of[rows, pair] = emptiest
        load[rows, emptiest] += step_sizes[rows, pair]
    return pack_of, int(load.max(initial=0))


def _deal_to_ranks(step_sizes: IntArray, pack_of: IntArray, packs: int, ranks: int) -> IntArray:
    """Renumber packs so that rank r's are [r M, (r+1) M) and every rank's attention cost is about the same.

    All packs have the same length, hence the same matrix multiplications; attention grows with the square of a pair.
    """
    steps = len(step_sizes)
    cost = np.zeros((steps, packs), np.int64)
    np.add.at(cost, (np.arange(steps)[:, None], pack_of), step_sizes.astype(np.int64) ** 2)
    there_and_back = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])
    rank = np.resize(there_and_back, packs)
    place = np.argsort(rank, kind="stable").argsort()  # k-th most expensive pack -> its new number
    renumbered = np.empty((steps, packs), np.int64)
    np.put_along_axis(renumbered, np.argsort(-cost, axis=1, kind="stable"), place[None, :], axis=1)
    return np.take_along_axis(renumbered, pack_of, axis=1)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
