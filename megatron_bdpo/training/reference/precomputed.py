"""A run's reference log-probs: those that earlier jobs have left on disk, and what is missing, scored and added."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bdpo.data.prompt_kinds import PromptKind
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.errors import UserError
from megatron_bdpo.training.batches import IntArray
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, broadcast_arrays, is_rank_zero, say
from megatron_bdpo.training.finite import check_reference
from megatron_bdpo.training.reference.cache import BEGINNINGS, KINDS, Arrays, ScoreCache, scored_after
from megatron_bdpo.training.reference.passes import BoolArray, FloatArray, Groups, GroupScorer, ReferenceTable
from megatron_bdpo.training.reference.scoring_loop import ScoringLoop, make_scorer, pair_columns
from megatron_bdpo.training.setup import RunSetup

#: Names of the stores, and of their directories below --reference-cache.
STORES = ("train", "heldout")


@dataclass
class PrecomputedReference:
    """The log-probs of a run's pairs under one reference. Every method is collective."""

    setup: RunSetup
    identity: Mapping[str, Any]
    """What the reference is (see ``fingerprint.reference_identity``)."""
    groups: IntArray
    """Ids of the groups whose values are needed, in the order of their use."""
    model: Callable[[], list[Any]]
    """Makes the chunks that can score as the reference; called only if something is missing."""
    pause: Callable[[], None]
    """Called after each call of the model, on all ranks; may raise StopRequested to leave."""
    _scorer: GroupScorer | None = field(default=None, init=False)

    def table(self) -> ReferenceTable:
        """The values of all pairs that are needed; NaN of others, also where the directory knows them.

        Raises:
            UserError: a directory is of something else, cannot be written, or what is missing cannot be scored.
            StopRequested: what was scored is on disk.
        """
        pool = self.setup.job.pool
        parts = [self._of_store(index) for index in range(len(pool.stores))]
        table = {kind: np.concatenate([part[kind] for part in parts]) for kind in self._kinds}
        for values in table.values():
            values[pool.pairs.swapped] = values[pool.pairs.swapped][:, ::-1]
        used = [index for index in range(len(pool.stores)) if len(self._groups_in_use(index))]
        directories = {STORES[index]: self.directory(index).resolve() for index in used}
        return ReferenceTable(
            table["conditional"],
            table.get("unconditional"),
            table.get("mismatched"),
            table.get(BEGINNINGS),
            directories,
        )

    def directory(self, index: int) -> Path:
        """Where the log-probs of a store are kept."""
        if cache := self.setup.settings.reference.reference_cache:
            return Path(cache) / STORES[index]
        reference = f"reference-{self.identity['weights']}-{_digest(self.identity)[:8]}"
        return self.setup.job.cache_dir / reference / _digest(_data_identity(self.setup.job.pool.stores[index]))[:16]

    @property
    def _kinds(self) -> tuple[str, ...]:
        needs = self.setup.job.loss.requirements
        wanted = {PromptKind.OWN: True, PromptKind.EMPTY: needs.comprehension, PromptKind.OTHER: needs.mismatched}
        kinds = (KINDS[kind] for kind, is_wanted in wanted.items() if is_wanted)
        return (*kinds, *([BEGINNINGS] if needs.beginnings else []))

    def _of_store(self, index: int) -> Arrays:
        """The values of a store's pairs by kind, [pairs, 2] in the store's order; NaN of those that are not needed."""
        pool, groups, directory = self.setup.job.pool, self._groups_in_use(index), self.directory(index)
        store, rows = pool.stores[index], pool.grouping.pairs_of(groups) - pool.offsets[index]
        if not len(rows):
            return {kind: np.full((len(store), 2), np.nan) for kind in self._kinds}
        cache: ScoreCache | None = None
        with all_ranks_agree():
            if is_rank_zero():  # one rank reads and writes: whether to score must be one answer for all of them
                cache = self._open(directory, store)
        known, damaged = self._read(cache, store)
        for problem in damaged:
            say(f"WARNING: {problem}; what it held counts as not scored")
        needed = {kind: self._needed(kind, index, groups) for kind in self._kinds}
        missing = {kind: needed[kind] & np.isnan(known[kind]).any(axis=1) for kind in self._kinds}
        scored = int(np.logical_or.reduce(list(missing.values())).sum())
        job: dict[str, Any] = {}
        if scored:
            there = f"{len(rows) - scored} are in {directory}"
            say(f"reference: {scored} of {len(rows)} {STORES[index]} {pool.pairs.noun} to score, {there}")
            job = self._score(index, missing, groups, cache, known)
            known, _ = self._read(cache, store)  # of two jobs' log-probs all use the same ones
        with all_ranks_agree():
            if cache is not None:
                cache.finish(len(store), {kind: _count(known[kind]) for kind in self._kinds}, job)
        for kind in self._kinds:
            check_reference(known[kind], needed[kind], kind, store.starts[:, 1:], store.describe)
            known[kind][~needed[kind]] = np.nan
        say(
            f"reference: {len(rows)} {STORES[index]} {pool.pairs.noun}, {scored} of them scored now; "
            f"log-probs in {directory}"
        )
        return known

    def _needed(self, kind: str, index: int, groups: IntArray) -> BoolArray:
        """Which of a store's pairs, of those of these groups, are to have a value of a kind."""
        pool = self.setup.job.pool
        if kind == KINDS[PromptKind.OTHER]:
            groups = groups[self.setup.job.fits_after_other[groups]]
        needed = np.zeros(len(pool.stores[index]), bool)
        needed[pool.grouping.pairs_of(groups) - pool.offsets[index]] = True
        return needed

    def _open(self, directory: Path, store: PairStore) -> ScoreCache:
        settings = self.setup.settings
        directories = settings.directories
        about = {
            "sources": [source.path for source in store.sources],
            "model": settings.model.hf_model or directories.pretrained_checkpoint or directories.load or "",
        }
        data = _data_identity(store)
        assert data.keys().isdisjoint(self.identity), "one name hides another"
        return ScoreCache.open(directory, {**data, **self.identity}, about)

    def _read(self, cache: ScoreCache | None, store: PairStore) -> tuple[Arrays, list[str]]:
        """What the rank with the cache finds there, by kind, and what is damaged. Collective."""
        found: Arrays | None = None
        damaged: list[str] = []
        with all_ranks_agree():
            if cache is not None:
                arrays, damaged = cache.read(len(store))
                _check_pairs(arrays, store, cache.directory)
                found = {kind: arrays[kind] for kind in self._kinds}
        return broadcast_arrays(found), broadcast(damaged)

    def _groups_in_use(self, index: int) -> IntArray:
        """Those of ``groups`` that belong to a store."""
        first, stop = self.setup.job.pool.grouping.offsets[index : index + 2]
        return self.groups[(self.groups >= first) & (self.groups < stop)]

    def _score(
        self, index: int, missing: dict[str, BoolArray], groups: IntArray, cache: ScoreCache | None, known: Arrays
    ) -> dict[str, Any]:
        """Score the groups of a store with a pair that misses something, in their order, both passes beside each other.

        Args:
            missing: by kind, of the store's pairs.
        """
        pairs, place = self.setup.job.pool.grouping.pairs_and_places(groups)
        passes: dict[PromptKind, BoolArray] = {}
        for each, mask in missing.items():
            after = scored_after(each)
            passes[after] = passes.get(after, False) | mask
        of_pairs = np.stack([mask[pairs - self.setup.job.pool.offsets[index]] for mask in passes.values()], axis=1)
        is_missing = np.zeros((len(groups), len(passes)), bool)
        np.logical_or.at(is_missing, place, of_pairs)
        row, kind = np.nonzero(is_missing)
        to_score = Groups(groups[row], np.array([*passes])[kind])
        loop = ScoringLoop(self.setup, index, self._kinds, cache, known, self.pause)
        return loop.run(self._make_scorer, to_score, already=is_missing.size - len(to_score))

    def _make_scorer(self) -> GroupScorer:
        if self._scorer is None:
            self._scorer = make_scorer(self.setup, self.model(), self.groups)
        return self._scorer


def _data_identity(store: PairStore) -> dict[str, Any]:
    return {**store.info.settings, "empty_prompt": store.info.empty_prompt}


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _check_pairs(arrays: Arrays, store: PairStore, directory: Path) -> None:
    """The pairs that the log-probs are of are those of the store."""
    known = arrays["row"] > 0
    for name, column in pair_columns(store, slice(None)).items():
        if not np.array_equal(arrays[name][known], column[known]):
            raise UserError(
                f"the reference scores in {directory} are of other pairs than those of {store.directory}, although "
                "both say that they come from the same data. Delete the scores; they are made again."
            )


def _count(values: FloatArray) -> int:
    return int((~np.isnan(values).any(axis=1)).sum())
