"""A run's reference values: read from the directories of earlier jobs, scored and added where they are missing.

Pairs are scored in the order of their use, in blocks of a few packs. How a block is packed depends on its own pairs
alone, and only whole blocks go to disk: a job that was killed goes on with the block where it was, and ends with the
numbers of one that was not. How many blocks one call scores, and when they are written, is by the clock.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_bdpo.data.bin_packing import round_up
from megatron_bdpo.data.pool import PairPool
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.errors import UserError
from megatron_bdpo.platform import cpu
from megatron_bdpo.platform.versions import installed_versions
from megatron_bdpo.training.batches import IntArray, PackMaker
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, context_rank, is_rank_zero, say
from megatron_bdpo.training.finite import check_reference
from megatron_bdpo.training.reference.cache import KINDS, Arrays, ScoreCache
from megatron_bdpo.training.reference.passes import BoolArray, FloatArray, Groups, GroupScorer, ReferenceTable
from megatron_bdpo.training.setup import RunSetup
from megatron_bdpo.training.stopping import StopRequested

#: Names of the stores, and of their directories below --reference-cache.
STORES = ("train", "heldout")

#: What a killed job loses, at most, beside the call that it was in.
FLUSH_SECONDS = 30.0

#: A call of the model scores as many blocks as it can in this time, at least one: a stop is heard after each.
_CALL_SECONDS = 1.0
_PIPELINED_CALL_SECONDS = 4.0

#: Positions of a pack on a CPU, whose speed does not grow with them. Longer ones would only take longer to stop.
_CPU_PACK = 512


@dataclass
class ReferenceScores:
    """The scores of a run's pairs under one reference. Every method is collective.

    Attributes:
        reference: what the reference is (see ``identity.reference_identity``).
        pairs: ids of the pairs whose values are needed, in the order of their use.
        model: makes the chunks that can score as the reference; called only if something is missing.
        pause: called after each call of the model, on all ranks; may raise StopRequested to leave.
    """

    setup: RunSetup
    reference: Mapping[str, Any]
    pairs: IntArray
    model: Callable[[], list[Any]]
    pause: Callable[[], None]
    _chunks: list[Any] | None = field(default=None, init=False)

    def table(self) -> ReferenceTable:
        """The values of all pairs that are needed; NaN of others, also where the directory knows them.

        Raises:
            UserError: a directory is of something else, cannot be written, or what is missing cannot be scored.
            StopRequested: what was scored is on disk.
        """
        pool = self.setup.job.pool
        parts = [self._store_scores(index) for index in range(len(pool.stores))]
        table = {kind: np.concatenate([part[kind] for part in parts]) for kind in self._kinds}
        for values in table.values():
            values[pool.swapped] = values[pool.swapped][:, ::-1]
        used = [index for index in range(len(pool.stores)) if len(self._rows_in_use(index))]
        directories = {STORES[index]: self.directory(index).resolve() for index in used}
        return ReferenceTable(table["conditional"], table.get("unconditional"), directories)

    def directory(self, index: int) -> Path:
        """Where the scores of a store are kept."""
        if cache := self.setup.settings.reference.reference_cache:
            return Path(cache) / STORES[index]
        reference = f"reference-{self.reference['weights']}-{_digest(self.reference)[:8]}"
        return self.setup.job.cache_dir / reference / _digest(_data_identity(self.setup.job.pool.stores[index]))[:16]

    @property
    def _kinds(self) -> tuple[str, ...]:
        return KINDS if self.setup.job.loss.requirements.comprehension else KINDS[:1]

    def _store_scores(self, index: int) -> Arrays:
        """The values of a store's pairs by kind, [pairs, 2] in the store's order; NaN of those that are not needed."""
        store, directory, rows = self.setup.job.pool.stores[index], self.directory(index), self._rows_in_use(index)
        if not len(rows):
            return {kind: np.full((len(store), 2), np.nan) for kind in self._kinds}
        cache: ScoreCache | None = None
        with all_ranks_agree():
            if is_rank_zero():  # one rank reads and writes: whether to score must be one answer for all of them
                cache = self._open(directory, store)
        known, damaged = self._read(cache, store)
        for problem in damaged:
            say(f"WARNING: {problem}; what it held counts as not scored")
        needed = np.zeros(len(store), bool)
        needed[rows] = True
        missing = {kind: needed & np.isnan(known[kind]).any(axis=1) for kind in self._kinds}
        scored = int(np.logical_or.reduce(list(missing.values())).sum())
        job: dict[str, Any] = {}
        if scored:
            there = f"{len(rows) - scored} are in {directory}"
            say(f"reference: {scored} of {len(rows)} {STORES[index]} pairs to score, {there}")
            job = self._score(index, self._groups(index, missing, rows), cache, known)
            known, _ = self._read(cache, store)  # of two jobs' scores all use the same ones
        with all_ranks_agree():
            if cache is not None:
                cache.finish(len(store), {kind: _count(known[kind]) for kind in self._kinds}, job)
        for kind in self._kinds:
            check_reference(known[kind], needed, kind, store.describe)
            known[kind][~needed] = np.nan
        say(f"reference: {len(rows)} {STORES[index]} pairs, {scored} of them scored now; scores in {directory}")
        return known

    def _open(self, directory: Path, store: PairStore) -> ScoreCache:
        settings = self.setup.settings
        directories = settings.directories
        about = {
            "sources": [source.path for source in store.sources],
            "model": settings.model.hf_model or directories.pretrained_checkpoint or directories.load or "",
        }
        return ScoreCache.open(directory, {**_data_identity(store), **self.reference}, about)

    def _read(self, cache: ScoreCache | None, store: PairStore) -> tuple[Arrays, list[str]]:
        """What the rank with the cache finds there, by kind, and what is damaged. Collective."""
        found: tuple[Arrays, list[str]] | None = None
        with all_ranks_agree():
            if cache is not None:
                arrays, damaged = cache.read(len(store))
                _check_pairs(arrays, store, cache.directory)
                found = {kind: arrays[kind] for kind in self._kinds}, damaged
        result = broadcast(found)
        assert result is not None
        return result

    def _rows_in_use(self, index: int) -> IntArray:
        """Those of ``pairs`` that belong to a store, as its rows."""
        first, stop = self.setup.job.pool.offsets[index : index + 2]
        return self.pairs[(self.pairs >= first) & (self.pairs < stop)] - first

    # Scoring -------------------------------------------------------------------------------------------------------

    def _score(self, index: int, groups: Groups, cache: ScoreCache | None, known: Arrays) -> dict[str, Any]:
        """Score groups in their order, into ``known`` and, on rank 0, into the cache. Returns what to put on record."""
        all_groups = len(self._rows_in_use(index)) * len(self._kinds)
        with _progress(all_groups, all_groups - len(groups)) as bar:
            scorer = self._scorer()
            blocks, clock = scorer.blocks(groups), _Clock(self.setup.settings.layout.pipeline)
            tokens = done = written = 0
            start = time.perf_counter()
            try:
                while turn := list(itertools.islice(blocks, clock.blocks)):
                    some = groups[done : done + sum(len(block.groups) for block in turn)]
                    self._take(index, some, scorer(turn), known)
                    done, tokens = done + len(some), tokens + sum(block.tokens for block in turn)
                    bar.update(len(some))
                    if clock.time_to_write():
                        self._write(index, groups[written:done], cache, known)
                        written = done
                        bar.set_postfix_str(f"{all_groups - len(groups) + written} on disk")
                    self.pause()
            except StopRequested:
                self._write(index, groups[written:done], cache, known)
                raise
            self._write(index, groups[written:done], cache, known)
            seconds = time.perf_counter() - start
        pairs = len(np.unique(groups.pairs))
        say(
            f"reference: {pairs} pairs, {len(groups)} groups scored in {seconds:.1f} s: "
            f"{pairs / seconds:,.1f} pairs/s, {tokens / seconds:,.0f} tokens/s"
        )
        return self._record(pairs, len(groups), tokens, seconds)

    def _scorer(self) -> GroupScorer:
        if self._chunks is None:
            self._chunks = self.model()
        settings, job = self.setup.settings, self.setup.job
        unit = settings.length_unit
        length = job.max_pack_length
        if cpu.is_active() and not job.fixed_length:
            length = min(length, round_up(_CPU_PACK, unit))
            if settings.layout.pipeline > 1:
                length = max(length, round_up(int(job.sizes[self.pairs].max()), unit))
        make = PackMaker(job.pool, job.max_pack_length, job.share_prompts, context=context_rank())
        return GroupScorer(
            self._chunks,
            self.setup.scoring,
            make,
            unit,
            length,
            alone=not settings.steps.pack_pairs,
            fixed_length=job.fixed_length,
        )

    def _groups(self, index: int, missing: dict[str, BoolArray], rows: IntArray) -> Groups:
        """The missing groups of a store's rows, in their order, those of a pair beside each other."""
        is_missing = np.stack([mask[rows] for mask in missing.values()], axis=1)  # [rows, kinds]
        row, kind = np.nonzero(is_missing)
        return Groups(rows[row] + self.setup.job.pool.offsets[index], kind == KINDS.index("unconditional"))

    def _take(self, index: int, groups: Groups, values: FloatArray, known: Arrays) -> None:
        """Put values into ``known``, in the data's order of chosen and rejected. Refuses what is not finite."""
        pool = self.setup.job.pool
        swapped = pool.swapped[groups.pairs]
        values[swapped] = values[swapped][:, ::-1]
        for kind in self._kinds:
            of_kind = groups.unconditional == (kind == "unconditional")
            ids = groups.pairs[of_kind]
            names = functools.partial(_describe, pool, ids)
            check_reference(values[of_kind], np.ones(len(ids), bool), kind, names)
            known[kind][ids - pool.offsets[index]] = values[of_kind]

    def _write(self, index: int, groups: Groups, cache: ScoreCache | None, known: Arrays) -> None:
        """Put the values of these groups on disk, and no others: a damaged part loses whole blocks. Collective."""
        with all_ranks_agree():
            if cache is not None and len(groups):
                store, own = self.setup.job.pool.stores[index], groups.pairs - self.setup.job.pool.offsets[index]
                rows, place = np.unique(own, return_inverse=True)
                values = {kind: np.full((len(rows), 2), np.nan) for kind in KINDS}
                for kind in self._kinds:
                    of_kind = groups.unconditional == (kind == "unconditional")
                    values[kind][place[of_kind]] = known[kind][own[of_kind]]
                cache.add(rows, {**values, **_pair_columns(store, rows)}, len(store))

    def _record(self, pairs: int, groups: int, tokens: int, seconds: float) -> dict[str, Any]:
        """Who has scored, for the manifest."""
        settings = self.setup.settings
        return {
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "pairs": pairs,
            "groups": groups,
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


def _describe(pool: PairPool, ids: IntArray, place: int) -> str:
    return pool.describe(int(ids[place]))


def _data_identity(store: PairStore) -> dict[str, Any]:
    return {**store.info.settings, "empty_prompt": store.info.empty_prompt}


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _pair_columns(store: PairStore, rows: IntArray | slice) -> Arrays:
    return {"tokens": store.lengths[rows, 1:], "source": store.source[rows], "row": store.row[rows]}


def _check_pairs(arrays: Arrays, store: PairStore, directory: Path) -> None:
    """The pairs that the scores tell of are those of the store."""
    known = arrays["row"] > 0
    for name, column in _pair_columns(store, slice(None)).items():
        if not np.array_equal(arrays[name][known], column[known]):
            raise UserError(
                f"the reference scores in {directory} are of other pairs than those of {store.directory}, although "
                "both say that they come from the same data. Delete the scores; they are made again."
            )


def _count(values: FloatArray) -> int:
    return int((~np.isnan(values).any(axis=1)).sum())


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

    Attributes:
        stages: of the pipeline.
        blocks: that the next call shall score.
    """

    stages: int
    blocks: int = 1
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
