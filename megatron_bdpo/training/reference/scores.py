"""A run's reference values: read from the directories of earlier jobs, scored and added where they are missing.

Work is cut into shards of a fixed number of pairs. What is scored of a shard goes to disk before the next one begins,
and how its groups are packed depends on nothing outside of it: a job that was killed goes on where it was, and ends
with the numbers of one that was not.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
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

from megatron_bdpo.data.scores import KINDS, Arrays, ScoreCache
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.errors import UserError
from megatron_bdpo.logprobs import TokenScoring
from megatron_bdpo.platform.versions import installed_versions
from megatron_bdpo.training.batches import PackMaker
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, context_rank, is_rank_zero, say
from megatron_bdpo.training.finite import check_reference
from megatron_bdpo.training.job import PairJob, length_unit
from megatron_bdpo.training.reference.scoring import BoolArray, FloatArray, Groups, GroupScorer, ReferenceTable

#: Names of the stores, and of their directories below --reference-cache.
STORES = ("train", "heldout")


@dataclass
class ReferenceScores:
    """The scores of a run's pairs under one reference. Every method is collective.

    Attributes:
        reference: what the reference is (see ``identity.reference_identity``).
        model: makes the chunks that can score as the reference; called only if something is missing.
        pause: called after each shard, on all ranks; may raise to leave.
    """

    args: argparse.Namespace
    job: PairJob
    scoring: TokenScoring
    reference: Mapping[str, Any]
    model: Callable[[], list[Any]]
    pause: Callable[[], None]
    _chunks: list[Any] | None = field(default=None, init=False)

    def table(self) -> ReferenceTable:
        """The values of all pairs that are trained on or held out; NaN of others.

        Raises:
            UserError: a directory is of something else, cannot be written, or what is missing cannot be scored.
        """
        pool = self.job.pool
        parts = [self._store_scores(index) for index in range(len(pool.stores))]
        table = {kind: np.concatenate([part[kind] for part in parts]) for kind in self._kinds}
        for values in table.values():
            values[pool.swapped] = values[pool.swapped][:, ::-1]
        directories = {STORES[index]: self.directory(index).resolve() for index in range(len(pool.stores))}
        return ReferenceTable(table["conditional"], table.get("unconditional"), directories)

    def directory(self, index: int) -> Path:
        """Where the scores of a store are kept."""
        if self.args.reference_cache:
            return Path(self.args.reference_cache) / STORES[index]
        reference = f"reference-{self.reference['weights']}-{_digest(self.reference)[:8]}"
        return self.job.cache_dir / reference / _digest(_data_identity(self.job.pool.stores[index]))[:16]

    @property
    def _kinds(self) -> tuple[str, ...]:
        return KINDS if self.job.loss.requirements.comprehension else KINDS[:1]

    def _store_scores(self, index: int) -> Arrays:
        """The arrays of one store's pairs, in the store's order, complete as far as this run needs them."""
        pool = self.job.pool
        store, directory = pool.stores[index], self.directory(index)
        cache: ScoreCache | None = None
        arrays: Arrays | None = None
        with all_ranks_agree():
            # Read by one rank: whether to score must be one answer for all of them.
            if is_rank_zero():
                cache = self._open(directory, store)
                arrays, damaged = cache.read(len(store))
                _check_pairs(arrays, store, directory)
                for problem in damaged:
                    say(f"WARNING: {problem}; its pairs are scored again")
        shard_pairs: int = broadcast(cache.shard_pairs if cache else None)
        known: Arrays = broadcast({kind: arrays[kind] for kind in self._kinds} if arrays else None)
        needed = self._needed(index)
        missing = {kind: needed & np.isnan(known[kind]).any(axis=1) for kind in self._kinds}
        job = self._score_missing(index, cache, known, missing, shard_pairs)
        with all_ranks_agree():
            if cache is not None:
                cache.finish(len(store), {kind: _count(known[kind]) for kind in self._kinds}, job)
        for kind in self._kinds:
            check_reference(known[kind], needed, kind, store.describe)
        scored = int(np.logical_or.reduce(list(missing.values())).sum())
        say(f"reference: {int(needed.sum())} {STORES[index]} pairs, {scored} of them scored now; scores in {directory}")
        return known

    def _open(self, directory: Path, store: PairStore) -> ScoreCache:
        about = {
            "sources": [source.path for source in store.sources],
            "model": self.args.hf_model or self.args.pretrained_checkpoint or self.args.load or "",
        }
        identity = {**_data_identity(store), **self.reference}
        return ScoreCache.open(directory, identity, about, self.args.score_shard_pairs)

    def _needed(self, index: int) -> BoolArray:
        """[pairs of the store]: those that are trained on or held out."""
        needed = np.zeros(len(self.job.pool), bool)
        needed[self.job.train.ids] = needed[self.job.held_out.ids] = True
        first, stop = self.job.pool.offsets[index : index + 2]
        return needed[first:stop]

    # Scoring -------------------------------------------------------------------------------------------------------

    def _score_missing(
        self, index: int, cache: ScoreCache | None, known: Arrays, missing: dict[str, BoolArray], shard_pairs: int
    ) -> dict[str, Any]:
        """Score shard by shard, into ``known`` and, on rank 0, into the cache. Returns what to put on record."""
        pairs, store = np.logical_or.reduce(list(missing.values())), self.job.pool.stores[index]
        if not pairs.any():
            return {}
        groups_total = sum(int(mask.sum()) for mask in missing.values())
        tokens, start = 0, time.perf_counter()
        with _progress(groups_total) as bar:
            scorer = self._scorer(bar.update)
            start = time.perf_counter()
            for shard in np.unique(np.flatnonzero(pairs) // shard_pairs):
                rows = slice(shard * shard_pairs, (shard + 1) * shard_pairs)
                groups = self._groups(index, missing, rows)
                values = self._in_store_order(groups, scorer(groups))
                fresh = {kind: values[groups.unconditional == (kind == KINDS[1])] for kind in missing}
                for kind, mask in missing.items():
                    known[kind][rows][mask[rows]] = fresh[kind]
                    in_shard = np.zeros_like(mask)
                    in_shard[rows] = mask[rows]
                    check_reference(known[kind], in_shard, kind, store.describe)  # before it is kept
                with all_ranks_agree():
                    if cache is not None:
                        kept = cache.add(int(shard), self._shard(index, known, rows))
                        for kind in missing:
                            known[kind][rows] = kept[kind]
                for kind in missing:  # another job may have scored them first
                    known[kind][rows] = broadcast(known[kind][rows])
                tokens += int(scorer.sizes(groups).sum())
                self.pause()
        seconds = time.perf_counter() - start
        count = int(pairs.sum())
        say(
            f"reference: {count} pairs, {groups_total} groups scored in {seconds:.1f} s: "
            f"{count / seconds:,.1f} pairs/s, {tokens / seconds:,.0f} tokens/s"
        )
        return self._record(count, groups_total, tokens, seconds)

    def _scorer(self, seen: Callable[[int], object]) -> GroupScorer:
        if self._chunks is None:
            self._chunks = self.model()
        make = PackMaker(self.job.pool, self.job.max_pack_length, self.job.share_prompts, context=context_rank())
        alone, fixed_length = not self.args.pack_pairs, self.job.fixed_length
        return GroupScorer(self._chunks, self.scoring, make, length_unit(self.args), alone, fixed_length, seen)

    def _groups(self, index: int, missing: dict[str, BoolArray], rows: slice) -> Groups:
        """The missing groups of some rows, those of the first kind first."""
        offset = self.job.pool.offsets[index] + rows.start
        found = [np.flatnonzero(mask[rows]) + offset for mask in missing.values()]
        unconditional = [np.full(len(ids), kind == KINDS[1]) for kind, ids in zip(missing, found, strict=True)]
        return Groups(np.concatenate(found), np.concatenate(unconditional))

    def _in_store_order(self, groups: Groups, values: FloatArray) -> FloatArray:
        swapped = self.job.pool.swapped[groups.pairs]
        values[swapped] = values[swapped][:, ::-1]
        return values

    def _shard(self, index: int, known: Arrays, rows: slice) -> Arrays:
        columns = _pair_columns(self.job.pool.stores[index], rows)
        unknown = np.full(columns["tokens"].shape, np.nan)
        return {**{kind: known[kind][rows] if kind in known else unknown for kind in KINDS}, **columns}

    def _record(self, pairs: int, groups: int, tokens: int, seconds: float) -> dict[str, Any]:
        """Who has scored, for the manifest."""
        args = self.args
        return {
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "pairs": pairs,
            "groups": groups,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "versions": installed_versions(),
            "precision": str(args.params_dtype),
            "device": torch.cuda.get_device_name() if args.distributed_backend == "nccl" else "cpu",
            "ranks": args.world_size,
            "tensor_parallel": args.tensor_model_parallel_size,
            "pipeline_parallel": args.pipeline_model_parallel_size,
            "context_parallel": args.context_parallel_size,
            "expert_parallel": args.expert_model_parallel_size,
        }


def _data_identity(store: PairStore) -> dict[str, Any]:
    return {**store.info.settings, "empty_prompt": store.info.empty_prompt}


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _pair_columns(store: PairStore, rows: slice) -> Arrays:
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


def _progress(groups: int) -> Any:
    interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file needs no animation
    return tqdm(
        total=groups,
        desc="scoring the reference",
        unit=" groups",
        disable=not is_rank_zero(),
        mininterval=interval,
        maxinterval=interval,
    )
