"""Scoring what is missing of a store's pairs, by the clock, and writing it to its directory.

Pairs are scored in the order of their use, in blocks of a few packs. How a block is packed depends on its own pairs
alone, and only whole blocks go to disk: a job that was killed goes on with the block where it was, and ends with the
numbers of one that was not. How many blocks one call scores, and when they are written, is by the clock.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_bdpo.data.bin_packing import round_up
from megatron_bdpo.data.pool import PairPool
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.platform import cpu
from megatron_bdpo.platform.versions import installed_versions
from megatron_bdpo.training.batches import IntArray, PackMaker
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, is_rank_zero, say
from megatron_bdpo.training.finite import check_reference
from megatron_bdpo.training.forward import ScoringStep
from megatron_bdpo.training.pack_iterators import context_rank
from megatron_bdpo.training.reference.cache import BEGINNINGS, KINDS, Arrays, ScoreCache, scored_after
from megatron_bdpo.training.reference.passes import FloatArray, Groups, GroupScorer
from megatron_bdpo.training.reward_step import RewardScoringStep
from megatron_bdpo.training.setup import RunSetup
from megatron_bdpo.training.stopping import StopRequested

#: What a killed job loses, at most, beside the call that it was in.
FLUSH_SECONDS = 30.0

#: A call of the model scores as many blocks as it can in this time, at least one: a stop is heard after each.
_CALL_SECONDS = 1.0
_PIPELINED_CALL_SECONDS = 4.0

#: Positions of a pack on a CPU, whose speed does not grow with them. Longer ones would only take longer to stop.
_CPU_PACK = 512


@dataclass
class ScoringLoop:
    """Scores pairs of one store. Every method is collective."""

    setup: RunSetup
    index: int
    """The store's place in the pool."""
    kinds: tuple[str, ...]
    """Of log-probs that are scored: of those of the cache."""
    cache: ScoreCache | None
    """The store's directory; on rank 0 only, which writes it."""
    known: Arrays
    """The store's log-probs by kind, [pairs, 2] in the data's order of chosen and rejected; those scored are added."""
    pause: Callable[[], None]
    """Called after each call of the model, on all ranks; may raise StopRequested to leave."""

    def run(self, make_scorer: Callable[[], GroupScorer], groups: Groups, already: int) -> dict[str, Any]:
        """Score groups in their order. Returns what to put on record.

        Args:
            already: the number of groups that need no scoring, for the progress bar.

        Raises:
            StopRequested: what was scored is on disk.
        """
        with _progress(already + len(groups), already) as bar:
            scorer = make_scorer()
            blocks, clock = scorer.blocks(groups), _Clock(self.setup.settings.layout.pipeline)
            tokens = done = written = 0
            start = time.perf_counter()
            try:
                while turn := list(itertools.islice(blocks, clock.blocks)):
                    some = groups[done : done + sum(len(block.groups) for block in turn)]
                    self._take(some, scorer(turn))
                    done, tokens = done + len(some), tokens + sum(block.tokens for block in turn)
                    bar.update(len(some))
                    if clock.time_to_write():
                        self._write(groups[written:done])
                        written = done
                        bar.set_postfix_str(f"{already + written} on disk")
                    self.pause()
            except StopRequested:
                self._write(groups[written:done])
                raise
            self._write(groups[written:done])
            seconds = time.perf_counter() - start
        return self._record(groups, tokens, seconds)

    def _take(self, groups: Groups, values: FloatArray) -> None:
        """Put values into ``known``, in the data's order of chosen and rejected. Refuses what is not finite."""
        pool = self.setup.job.pool
        pairs, after = self._pairs(groups)
        columns = values.reshape(len(values), -1, 2)  # of whole answers, and of their beginnings if they are scored
        swapped = pool.pairs.swapped[pairs]
        columns[swapped] = columns[swapped][..., ::-1]
        for kind in self.kinds:
            found = columns[:, int(kind == BEGINNINGS)]
            of_kind = after == scored_after(kind)
            ids = pairs[of_kind]
            rows = ids - pool.offsets[self.index]
            answers, names = pool.stores[self.index].starts[rows, 1:], functools.partial(_describe, pool, ids)
            check_reference(found[of_kind], np.ones(len(ids), bool), kind, answers, names)
            self.known[kind][rows] = found[of_kind]

    def _pairs(self, groups: Groups) -> tuple[IntArray, IntArray]:
        """Ids of the groups' pairs, and the kind of prompt that they are scored after."""
        pairs, place = self.setup.job.pool.grouping.pairs_and_places(groups.ids)
        return pairs, groups.after[place]

    def _write(self, groups: Groups) -> None:
        """Put the values of these groups on disk, and no others: a damaged part loses whole blocks."""
        with all_ranks_agree():
            if self.cache is not None and len(groups):
                pool = self.setup.job.pool
                pairs, after = self._pairs(groups)
                store, own = pool.stores[self.index], pairs - pool.offsets[self.index]
                rows, place = np.unique(own, return_inverse=True)
                values = {kind: np.full((len(rows), 2), np.nan) for kind in (*KINDS, *self.kinds)}
                for kind in self.kinds:
                    of_kind = after == scored_after(kind)
                    values[kind][place[of_kind]] = self.known[kind][own[of_kind]]
                self.cache.add(rows, {**values, **pair_columns(store, rows)}, len(store))

    def _record(self, groups: Groups, tokens: int, seconds: float) -> dict[str, Any]:
        """Say how fast it was. Returns who has scored, for the manifest."""
        settings, pool = self.setup.settings, self.setup.job.pool
        pairs = len(pool.grouping.pairs_of(np.unique(groups.ids)))
        say(
            f"reference: {pairs} {pool.pairs.noun}, {len(groups)} groups scored in {seconds:.1f} s: "
            f"{pairs / seconds:,.1f} {pool.pairs.noun}/s, {tokens / seconds:,.0f} tokens/s"
        )
        return {
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "pairs": pairs,
            "groups": len(groups),
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "versions": installed_versions(),
            "precision": str(settings.precision.dtype),
            "device": torch.cuda.get_device_name() if settings.process.backend == "nccl" else "cpu",
            "ranks": settings.layout.ranks,
            "tensor_parallel": settings.layout.tensor,
            "pipeline_parallel": settings.layout.pipeline,
            "context_parallel": settings.layout.context,
            "expert_parallel": settings.layout.expert,
        }


def make_scorer(setup: RunSetup, model: list[Any], groups: IntArray) -> GroupScorer:
    """What scores these groups with a frozen model, in packs as the job's settings allow them."""
    settings, job = setup.settings, setup.job
    unit = settings.length_unit
    length = job.max_pack_length
    if cpu.is_active() and not job.fixed_length:
        length = min(length, round_up(_CPU_PACK, unit))
        if settings.layout.pipeline > 1:
            sizes = job.sizes[groups]
            if job.loss.requirements.mismatched:
                after_other = job.sizes_after_other[groups]
                sizes = np.concatenate([sizes, after_other[job.fits_after_other[groups]]])
            length = max(length, round_up(int(sizes.max()), unit))
    with_beginnings = job.loss.requirements.beginnings
    make = PackMaker(
        job.pool,
        job.max_pack_length,
        job.share_prompts,
        padding_token=job.padding_token,
        context=context_rank(),
        with_cuts=with_beginnings,
    )
    return GroupScorer(
        model,
        RewardScoringStep() if settings.objective.is_reward else ScoringStep(setup.scoring, with_beginnings),
        make,
        unit,
        length,
        alone=not settings.steps.pack_pairs,
        fixed_length=job.fixed_length,
        columns=4 if with_beginnings else 2,
    )


def pair_columns(store: PairStore, rows: IntArray | slice) -> Arrays:
    """What a directory of log-probs says about the pairs themselves."""
    return {"tokens": store.scored[rows], "source": store.source[rows], "row": store.row[rows]}


def _describe(pool: PairPool, ids: IntArray, place: int) -> str:
    return pool.describe(int(ids[place]))


def _progress(groups: int, known: int) -> Any:
    interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file needs no animation
    return tqdm(
        total=groups,
        initial=known,
        desc="scoring the reference",
        unit=" groups",
        disable=not is_rank_zero(),
        mininterval=interval,
        maxinterval=interval,
    )


@dataclass
class _Clock:
    """Rank 0's, for all: how many blocks a call scores, after which a stop is heard, and when to write.

    With p pipeline stages a call of k blocks keeps them busy for k of k + 1 - 1/p parts of its time. So there calls may
    take longer.
    """

    stages: int
    """Of the pipeline."""
    blocks: int = 1
    """That the next call shall score."""
    _call_began: float = field(default_factory=time.monotonic)
    _written: float = field(default_factory=time.monotonic)

    def time_to_write(self) -> bool:
        """To be asked after each call: whether what was scored must go to disk before the next one. Collective."""
        now, most = time.monotonic(), _PIPELINED_CALL_SECONDS if self.stages > 1 else _CALL_SECONDS
        seconds = now - self._call_began
        fitting = int(self.blocks * most / max(seconds, 1e-6))
        blocks = max(1, min(fitting, 2 * self.blocks))
        next_seconds = seconds * blocks / self.blocks
        self.blocks, is_time = broadcast((blocks, now + next_seconds - self._written > FLUSH_SECONDS))
        self._call_began = now
        if is_time:
            self._written = now
        return is_time
