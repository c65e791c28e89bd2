"""Getting a run its reference: from the cache, by scoring, or as a resident copy; on resume, always the original."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.utils import unwrap_model

from megatron_bdpo.errors import UserError
from megatron_bdpo.logprobs import TokenScoring
from megatron_bdpo.model.digest import weights_digest
from megatron_bdpo.model.hf.hub import is_model_directory
from megatron_bdpo.model.pair_gpt import PairGPTConfig
from megatron_bdpo.model.reference import WEIGHTS_DIR, build_reference, copy_policy, load_weights, save_weights
from megatron_bdpo.training import reference_cache
from megatron_bdpo.training.batches import PackMaker
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, context_rank, is_rank_zero, say
from megatron_bdpo.training.forward import ReferenceValues
from megatron_bdpo.training.hf_model import weights_loader
from megatron_bdpo.training.identity import RunIdentity, checkpoint_directory, reference_identity
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.scoring import FloatArray, NoReference, ReferenceTable, ResidentReference, score_pairs


@dataclass
class ReferenceProvider:
    """Makes the reference of one run. Every method is collective."""

    args: argparse.Namespace
    job: PairJob
    config: PairGPTConfig
    scoring: TokenScoring

    def provide(
        self, policy: list[Any], identity: RunIdentity, *, resumed: bool
    ) -> tuple[ReferenceValues, RunIdentity]:
        """The reference values for training, and the run's identity completed by what they are.

        Args:
            policy: the model chunks as loaded.
            identity: of this run; on resume with the reference that the checkpoint names.
            resumed: the policy has been trained already, so it is not the reference.

        Raises:
            UserError: on resume, when the original reference is nowhere to be had.
        """
        if not self.job.loss.requirements.reference and not self.job.loss.requirements.comprehension:
            return NoReference(), identity
        if not resumed:
            identity = replace(identity, reference=self._identify(policy), reference_weights=self._pretrained())
        elif not identity.reference:
            raise UserError(
                "the resumed run had no reference (its loss reads none), but this loss needs one. Start a new run from "
                "its weights with --finetune."
            )
        if self.job.resident:
            return self._resident(policy, identity, resumed=resumed)
        return self._precomputed(policy, identity, resumed=resumed), identity

    def _identify(self, model: list[Any]) -> str:
        vocab_size = self.scoring.vocab_size
        return reference_identity(self.args, weights_digest(unwrap_model(model), vocab_size), vocab_size)

    def _pretrained(self) -> str:
        """The checkpoint the policy has just been loaded from, as far as it can serve as the reference later."""
        for root in (self.args.load, self.args.pretrained_checkpoint):
            directory = checkpoint_directory(root)
            if directory is not None:
                return str(directory.resolve())
        return self.args.hf_model or ""

    # Resident ------------------------------------------------------------------------------------------------------

    def _resident(
        self, policy: list[Any], identity: RunIdentity, *, resumed: bool
    ) -> tuple[ResidentReference, RunIdentity]:
        if resumed:
            reference = self._load_original(identity)
        else:
            reference = build_reference(self.config)
            copy_policy(policy, reference)
            if not identity.reference_weights and self.args.save:
                directory = (Path(self.args.save) / WEIGHTS_DIR).resolve()
                if not broadcast(directory.exists()):
                    save_weights(reference, directory)
                identity = replace(identity, reference_weights=str(directory))
        say("reference: resident, a frozen copy beside the policy")
        return ResidentReference(reference, self.job.loss.requirements, self.scoring), identity

    def _load_original(self, identity: RunIdentity) -> list[Any]:
        if not identity.reference_weights:
            raise UserError(
                "the original reference is not to be had: its values are gone, and its weights were never written. "
                "Start a new run from the checkpoint's weights with --finetune."
            )
        reference = build_reference(self.config)
        if is_model_directory(Path(identity.reference_weights)):
            weights_loader(identity.reference_weights)(unwrap_model(reference))
        else:
            with all_ranks_agree():
                load_weights(reference, Path(identity.reference_weights))
        found = self._identify(reference)
        if found != identity.reference:
            raise UserError(
                f"the weights in {identity.reference_weights} are not this run's reference:\n  {found} there,\n"
                f"  {identity.reference} in the resumed checkpoint.\nRestore them, or resume with that run's settings."
            )
        return reference

    # Precomputed ---------------------------------------------------------------------------------------------------

    def _precomputed(self, policy: list[Any], identity: RunIdentity, *, resumed: bool) -> ReferenceTable:
        scorer: list[Any] | None = None if resumed else policy

        def model() -> list[Any]:
            """Whoever can still score as the reference: the policy before its first step, or the kept weights."""
            nonlocal scorer
            if scorer is None:
                scorer = self._load_original(identity)
            return scorer

        kinds = ["conditional", "unconditional"] if self.job.loss.requirements.comprehension else ["conditional"]
        parts = [self._store_values(index, kinds, model, identity) for index in range(len(self.job.pool.stores))]
        table = {kind: np.concatenate([part[kind] for part in parts]) for kind in kinds}
        for values in table.values():
            values[self.job.pool.swapped] = values[self.job.pool.swapped][:, ::-1]
        return ReferenceTable(table["conditional"], table.get("unconditional"))

    def _store_values(
        self, index: int, kinds: list[str], model: Callable[[], list[Any]], identity: RunIdentity
    ) -> dict[str, FloatArray]:
        """Values of one store's pairs, in the store's order, NaN for pairs that this run leaves out.

        From the store's cache file; what that does not have is scored and added to it.
        """
        store, path = self.job.pool.stores[index], self._cache_path(index, identity)
        manifest = {"data": store.fingerprint, "reference": identity.reference}
        with all_ranks_agree():
            # Whether to score must be one answer for all ranks, so the file is looked for once.
            values = (reference_cache.read(path, manifest) or {}) if broadcast(path.exists()) else {}
        scored = 0
        for kind in kinds:
            known = values.setdefault(kind, np.full((len(store), 2), np.nan))
            missing = self._needed(index)
            missing = missing[np.isnan(known[missing - self.job.pool.offsets[index]]).any(axis=1)]
            if len(missing):
                known[missing - self.job.pool.offsets[index]] = self._score(missing, model(), kind == "unconditional")
                scored = max(scored, len(missing))
        if scored and is_rank_zero():
            reference_cache.write(path, manifest, values)
        say(f"reference: {len(self._needed(index))} pairs, {scored} of them scored now; values in {path}")
        return values

    def _needed(self, index: int) -> Any:
        """Ids of the pairs of one store that are trained on or held out."""
        used = np.concatenate([self.job.train.ids, self.job.held_out.ids])
        first, stop = self.job.pool.offsets[index : index + 2]
        return np.sort(used[(used >= first) & (used < stop)])

    def _cache_path(self, index: int, identity: RunIdentity) -> Path:
        name = ("train", "heldout")[index]
        if self.args.reference_cache:
            return Path(self.args.reference_cache) / f"{name}.safetensors"
        weights = identity.reference.split(",")[0].removeprefix("weights ")
        architecture = identity.reference.rsplit(" ", 1)[-1]
        return (
            self.job.cache_dir
            / f"reference-{weights}-{architecture}"
            / (f"{self.job.pool.stores[index].fingerprint[:16]}.safetensors")
        )

    def _score(self, ids: Any, model: list[Any], unconditional: bool) -> FloatArray:
        """[n, 2] log-probs, in the order of the store: swapped pairs are swapped back."""
        pool = self.job.pool
        make = PackMaker(pool, self.job.plan.pack_length, self.job.share_prompts, context=context_rank())
        sizes = self._packed_sizes(ids, unconditional)
        scores = score_pairs(model, ids, sizes, make, self.scoring, unconditional=unconditional)
        swapped = pool.swapped[ids]
        scores[swapped] = scores[swapped][:, ::-1]
        return scores

    def _packed_sizes(self, ids: Any, unconditional: bool) -> Any:
        sizes = self.job.sizes[ids]
        if not unconditional:
            return sizes
        responses = self.job.pool.lengths[ids][:, 1:].sum(axis=1)
        empty = max(len(store.empty_prompt) for store in self.job.pool.stores)
        return np.minimum(sizes, responses + empty * (1 if self.job.share_prompts else 2))
