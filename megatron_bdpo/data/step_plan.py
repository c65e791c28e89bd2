"""Which pairs make up each optimizer step, and in which pack of which rank each pair sits.

A step has *exactly* the number of pairs the user asked for, and every rank has the same number of packs M in all
steps, so that Megatron sees a constant global batch size (in packs). Packs are as long as what they hold: the m-th
packs of all ranks have one length, which each of them knows from the plan, so that shapes need no communication. Where
pipeline stages exchange messages, which Megatron sizes once a step, all packs of a step have one length. Kernels whose
buffers are of one size for all time need packs of one length for all time: then it is --seq-length.

Three deterministic stages, each a pure function of the seed and the pairs' lengths, identical on every rank:

1. *Order*: epochs are shuffled and joined into one endless stream; every pair comes once per epoch (times its
   source's weight).
2. *Steps*: the stream is cut into windows of whole steps. Inside a window each step draws one pair from every length
   stratum and the rest is levelled by swaps, so that steps need nearly the same number of tokens. Which pairs make up
   step k depends neither on the parallel layout nor on how long the run is.
3. *Packs*: the pairs of a step are put into DP x M packs that are as short as can be found (see ``packing``), and M is
   chosen to waste least: positions on padding and, with pipeline stages, time on waiting, which more and shorter packs
   make less. Lengths are rounded up to a 64th of the longest, or to the kernels' multiple where that is more. So a run
   has at most 64 of them, and a GPU's caching allocator finds blocks of the sizes that it asks for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.bin_packing import PackNumbers, per_pack, round_up, shortest
from megatron_bdpo.errors import UserError

IntArray = npt.NDArray[np.int64]

_MAX_WINDOW_STEPS = 256
_PACK_CHOICES = 8  # pack counts tried beyond the smallest that fits
_WORTH_MORE_PACKS = 0.005  # share of the positions that they must save: fewer and longer packs suit the kernels
_LENGTHS = 64  # different lengths of packs, at most
_LONG_ENOUGH = 2048  # positions: packs are not made shorter than this to have more of them in a pipeline


@dataclass(frozen=True)
class StepPlan:
    """Steps x packs. Shapes: B steps, N pairs per step, M packs per rank and step, K = DP x M packs per step."""

    steps: IntArray  # [B, N] pair ids
    pack_of: PackNumbers  # [B, N] in [0, K): which pack of its step holds each pair
    lengths: IntArray  # [B, M] positions of every rank's m-th pack
    data_parallel: int  # DP
    real_tokens: IntArray  # [B] tokens of each step after sharing, before padding

    @property
    def microbatches(self) -> int:
        """M."""
        return self.lengths.shape[1]

    @property
    def packs_per_step(self) -> int:
        """K."""
        return self.microbatches * self.data_parallel

    @property
    def longest(self) -> int:
        """Positions of the longest pack of all steps."""
        return int(self.lengths.max())

    @property
    def positions(self) -> IntArray:
        """[B] positions of all packs of each step, padding included."""
        return self.lengths.sum(axis=1) * self.data_parallel

    @property
    def fill(self) -> float:
        """Share of all pack positions that hold a token."""
        return float(self.real_tokens.sum() / self.positions.sum())

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
    microbatch_multiple: int = 1  # M is a multiple of this (interleaved pipeline stages)
    length_multiple: int = 8  # lengths are multiples of this (sequence parallelism, FP8)
    pipeline_wait: float = 0.0  # packs' worth of time that a pipeline stage stands still in a step: (p - 1) / v
    seed: int = 1234
    pack_pairs: bool = True  # False: one pair per pack, the oracle
    fixed_length: bool = False  # all packs are as long as they may be
    unit: str = "pairs"  # what steps are made of, for messages

    @property
    def one_length(self) -> bool:
        """All packs of a step have one length, because pipeline stages exchange them, or because all packs have."""
        return self.pipeline_wait > 0 or self.fixed_length

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
    sizes: IntArray,
    settings: PlanSettings,
    num_steps: int,
    pools: Sequence[tuple[IntArray, float]] | None = None,
    costs: IntArray | None = None,
) -> StepPlan:
    """Plan the first ``num_steps`` optimizer steps.

    Args:
        sizes: [pairs] pack positions that each pair takes (see ``packs.group_tokens``).
        pools: (pair ids, weight) per data source; weight 2 visits each pair twice an epoch, 0.5 half of them.
            Default: all pairs once.
        costs: [pairs] what a pair costs beside its positions, in any unit, as attention does: of packs of like length
            every rank gets about the same. Default: the positions.

    Raises:
        UserError: no step at all, fewer pairs than one step needs, or a pair longer than a pack.
    """
    if num_steps < 1:
        raise UserError(f"--train-iters must be at least 1, not {num_steps}.")
    pools = [(np.arange(len(sizes)), 1.0)] if pools is None else pools
    longest = max((int(sizes[ids].max(initial=0)) for ids, _ in pools), default=0)
    if longest > settings.max_pack_length:
        raise UserError(
            f"one of the {settings.unit} takes {longest} positions, more than a pack of --seq-length "
            f"{settings.max_pack_length}"
        )
    steps = _draw_steps(sizes, settings, num_steps, pools)
    step_sizes = sizes[steps]
    pack_of, packs = _choose_packs(step_sizes, settings)
    load = per_pack(step_sizes, pack_of, packs)
    cost = load if costs is None else per_pack(costs, pack_of, packs, steps)
    pack_of, lengths = _deal_to_ranks(load, cost, pack_of, settings)
    return StepPlan(steps, pack_of, lengths, settings.data_parallel, step_sizes.sum(axis=1))


def epoch_pairs(pools: Sequence[tuple[IntArray, float]]) -> int:
    """Pairs drawn in one epoch."""
    return sum(_pool_draws(ids, weight) for ids, weight in pools)


# 1. Order ------------------------------------------------------------------------------------------------------------


def _pool_draws(ids: IntArray, weight: float) -> int:
    return max(1, round(len(ids) * weight)) if len(ids) else 0


def _epoch(pools: Sequence[tuple[IntArray, float]], seed: int, epoch: int) -> IntArray:
    """The pairs of one epoch, shuffled. Fractional weights draw another subset each epoch."""
    rng = np.random.default_rng([seed, epoch])
    drawn = []
    for ids, weight in pools:
        repeats, remainder = divmod(_pool_draws(ids, weight), max(1, len(ids)))
        drawn += [ids] * repeats + [rng.permutation(ids)[:remainder].copy()]  # a view would hold all of them
    joined = np.concatenate(drawn)
    rng.shuffle(joined)
    return joined


def _windows(pools: Sequence[tuple[IntArray, float]], seed: int, size: int) -> Iterator[IntArray]:
    """The endless stream of epochs, cut into windows of ``size`` pairs; no more than an epoch of it is in memory."""
    left = np.zeros(0, np.int64)
    for epoch in itertools.count():
        left = np.concatenate([left, _epoch(pools, seed, epoch)])
        whole = len(left) // size * size
        for start in range(0, whole, size):
            yield left[start : start + size]
        left = left[whole:].copy()


# 2. Steps ------------------------------------------------------------------------------------------------------------


def _draw_steps(
    sizes: IntArray, settings: PlanSettings, num_steps: int, pools: Sequence[tuple[IntArray, float]]
) -> IntArray:
    per_step, per_epoch = settings.pairs_per_step, epoch_pairs(pools)
    if not per_epoch:
        raise UserError("there is no pair to train on. Give --pair-data with rows that can be used.")
    if per_epoch < settings.data_parallel:
        raise UserError(
            f"{per_epoch} usable {settings.unit} cannot be split over {settings.data_parallel} data-parallel ranks of "
            "which each needs one. Use fewer ranks, or more data."
        )
    if per_epoch < per_step:
        raise UserError(
            f"--pairs-per-step {per_step} is more than the {per_epoch} usable {settings.unit} of an epoch. "
            f"Use --pairs-per-step {per_epoch} or less, or more data."
        )
    # Windows depend on the data alone, so that a longer run repeats a shorter one's steps.
    window = min(per_epoch // per_step, _MAX_WINDOW_STEPS)
    steps = np.empty((num_steps, per_step), np.int64)
    stream = _windows(pools, settings.seed, window * per_step)
    for k, start in enumerate(range(0, num_steps, window)):
        levelled = _level_window(next(stream), sizes, window, settings.seed, k)
        steps[start : start + window] = levelled[: num_steps - start]
    return steps


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


def _choose_packs(step_sizes: IntArray, settings: PlanSettings) -> tuple[PackNumbers, int]:
    """The pack of each pair [B, N], and the number of packs per step, wasting least; near ties go to fewer packs."""
    pairs, limit = step_sizes.shape[1], settings.max_pack_length
    if not settings.pack_pairs:
        return np.broadcast_to(np.arange(pairs, dtype=np.int32), step_sizes.shape), pairs
    group = settings.data_parallel * settings.microbatch_multiple
    tokens, longest = step_sizes.sum(axis=1), step_sizes.max(axis=1)
    if settings.fixed_length:
        longest = np.full_like(longest, limit)
    grain = _grain(int(longest.max()), settings)
    packs = first = round_up(max(-(-int(tokens.max()) // limit), group), group)
    few = first + _PACK_CHOICES * group
    useful = max(first, tokens.mean() / _LONG_ENOUGH)
    best: tuple[PackNumbers, int] | None = None
    least = 0.0
    while best is None or packs <= (max(few, useful) if settings.one_length else few):
        waiting = 1 + settings.pipeline_wait * settings.data_parallel / min(packs, useful)
        at_least = waiting * np.maximum(tokens, longest * (packs if settings.one_length else 1)).sum()
        if best is None or at_least < least * (1 - _WORTH_MORE_PACKS):  # else it cannot be better, and takes time
            pack_of = shortest(step_sizes, packs, limit, grain, settings.data_parallel)
            load = per_pack(step_sizes, pack_of, packs)
            cost = waiting * _lengths(load, settings).sum() * settings.data_parallel
            if load.max() <= limit and (best is None or cost < least * (1 - _WORTH_MORE_PACKS)):
                best, least = (pack_of, packs), cost
        if packs >= pairs:  # each has its own
            break
        packs += group if best is None or packs < few else round_up(packs // _PACK_CHOICES, group)
    assert best is not None, "with a pack for each pair, every pair fits"
    return best


def _deal_to_ranks(
    load: IntArray, cost: IntArray, pack_of: PackNumbers, settings: PlanSettings
) -> tuple[PackNumbers, IntArray]:
    """Number the packs so that rank r's are [r M, (r+1) M). Returns the packs [B, N] and their lengths [B, M].

    The m-th packs of all ranks are of like length, and the costs of every rank's pairs are about the same.

    Args:
        load: [B, K] positions of each pack; cost: [B, K] of its pairs; pack_of: [B, N].
    """
    ranks, packs = settings.data_parallel, load.shape[1]
    lengths = _lengths(load, settings)
    own = np.full_like(load, lengths[:, :1]) if settings.one_length else _rounded(load, settings)
    order = np.lexsort((-cost, -own), axis=1)  # longest first, of equal lengths the most expensive
    microbatch, place = np.divmod(np.arange(packs), ranks)
    there_and_back = np.where(microbatch % 2, ranks - 1 - place, place)
    renumbered = np.empty_like(order, np.int32)
    np.put_along_axis(renumbered, order, (there_and_back * (packs // ranks) + microbatch)[None, :], axis=1)
    return np.take_along_axis(renumbered, pack_of, axis=1), lengths


def _lengths(load: IntArray, settings: PlanSettings) -> IntArray:
    """[B, M] lengths of packs that hold ``load`` [B, K] positions, those of like length on different ranks."""
    if settings.fixed_length:
        return np.full((len(load), load.shape[1] // settings.data_parallel), settings.max_pack_length, load.dtype)
    longest_first = -np.sort(-_rounded(load, settings), axis=1)
    lengths = longest_first[:, :: settings.data_parallel]
    return np.broadcast_to(lengths[:, :1], lengths.shape) if settings.one_length else lengths


def _rounded(load: IntArray, settings: PlanSettings) -> IntArray:
    longest = round_up(int(load.max()), settings.length_multiple)
    grain = _grain(longest, settings)
    return np.clip(-(-load // grain) * grain, grain, longest)


def _grain(longest: int, settings: PlanSettings) -> int:
    """What lengths up to ``longest`` are multiples of."""
    return round_up(-(-longest // _LENGTHS), settings.length_multiple)
