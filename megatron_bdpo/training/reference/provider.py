"""Getting a run its reference: log-probs from disk or made now, or a resident copy; on resume, always the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.core.utils import unwrap_model
from megatron.training.checkpointing import get_checkpoint_name

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.digest import weights_digest
from megatron_bdpo.model.hf.checkpoint import CONFIG, read_json
from megatron_bdpo.model.hf.config import read_config
from megatron_bdpo.model.hf.directory import is_model_directory, model_directory
from megatron_bdpo.model.initialization import initialize_by_name
from megatron_bdpo.training.batches import IntArray
from megatron_bdpo.training.checkpoints import integrity_problems
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, say
from megatron_bdpo.training.forward import ReferenceValues
from megatron_bdpo.training.hf.start import weights_loader
from megatron_bdpo.training.identity import RunIdentity, checkpoint_directory
from megatron_bdpo.training.phases import phase
from megatron_bdpo.training.reference.cache import differences
from megatron_bdpo.training.reference.fingerprint import is_of_this_version, of_every_version, reference_identity
from megatron_bdpo.training.reference.passes import NoReference, ReferenceTable, ResidentReference
from megatron_bdpo.training.reference.precomputed import PrecomputedReference
from megatron_bdpo.training.reference.weights import (
    WEIGHTS_DIR,
    build_reference,
    copy_policy,
    load_moved,
    load_weights,
    save_weights,
)
from megatron_bdpo.training.setup import RunSetup
from megatron_bdpo.training.stopping import StopRequest


@dataclass
class ReferenceProvider:
    """Makes the reference of one run. Every method is collective."""

    setup: RunSetup
    groups: IntArray
    """Ids of the groups whose values are needed, in the order of their use."""
    pause: Callable[[], None]
    """Called again and again while scoring, on all ranks; may raise to leave."""
    _named: list[Any] = field(default_factory=list, init=False)
    """The model of --reference-model, once it is loaded."""

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
        if not self.setup.job.loss.requirements.reference and not self.setup.job.loss.requirements.comprehension:
            return NoReference(), identity
        with phase("weights"):
            identity = self._known(policy, identity, resumed=resumed)
        if self.setup.settings.reference.is_in_columns:
            say("reference: the log-probs that the rows bring")
            return ReferenceTable(self.setup.job.pool.pairs.reference(), None), identity
        if self.setup.job.resident:
            with phase("weights"):
                return self._resident(policy, identity, resumed=resumed)
        return self.log_probs(policy, identity, resumed=resumed).table(), identity

    def _known(self, policy: list[Any], identity: RunIdentity, *, resumed: bool) -> RunIdentity:
        if not resumed:
            return self.identify(identity, policy)
        if not identity.reference:
            raise UserError(
                "the resumed run had no reference (its loss reads none), but this loss needs one. Start a new run from "
                "its weights with --finetune."
            )
        return self.recall(identity)

    def identify(self, identity: RunIdentity, policy: list[Any]) -> RunIdentity:
        """The identity of a run that starts now, completed by what its reference is: the policy, or the named model."""
        if named := self.setup.settings.reference.reference_model:
            source = self._source(named)
            self._named = build_reference(self.setup.config)
            self._load(self._named, source)
            say(f"reference: the weights of {source}")
            return replace(identity, reference=self._identify(self._named), reference_weights=source)
        own = self._identify(policy, identity.base_weights)
        return replace(identity, reference=own, reference_weights=_pretrained(self.setup))

    def recall(self, identity: RunIdentity) -> RunIdentity:
        """The identity of a resumed run. A reference that is named once more, from another place, has to be the same.

        Raises:
            UserError: it is another one.
        """
        named = self.setup.settings.reference.reference_model
        if named and (source := self._source(named)) != identity.reference_weights:
            identity = replace(identity, reference_weights=source)
            self._named = self._load_original(identity)
        return identity

    def _source(self, named: str) -> str:
        """The directory that --reference-model names."""
        checkpoint = checkpoint_directory(named)
        if checkpoint is not None:
            return str(checkpoint.resolve())
        policy = self.setup.settings.model.hf_model
        with all_ranks_agree():
            directory = model_directory(named)
            if policy:
                own, other = (read_config(read_json(Path(each) / CONFIG)) for each in (policy, directory))
                if found := differences(own.arguments, other.arguments):
                    listed = "\n".join(f"  {line}" for line in found)
                    raise UserError(
                        f"--reference-model {named} is of another architecture than the policy:\n{listed}\n"
                        "Name a model of the same one."
                    )
        return str(directory.resolve())

    def log_probs(self, policy: list[Any], identity: RunIdentity, *, resumed: bool) -> PrecomputedReference:
        """The log-probs of the run's pairs. What can still score as the reference: the policy before its first step,
        the model that was named, or the weights that were kept."""

        def model() -> list[Any]:
            with phase("weights"):
                return self._named or (self._original(policy, identity) if resumed else policy)

        return PrecomputedReference(self.setup, identity.reference, self.groups, model, self.pause)

    def _identify(self, model: list[Any], digest: str = "") -> dict[str, Any]:
        weights = digest or weights_digest(unwrap_model(model), self.setup.scoring.vocab_size)
        return reference_identity(self.setup.config, weights, self.setup.scoring)

    # Resident ------------------------------------------------------------------------------------------------------

    def _resident(
        self, policy: list[Any], identity: RunIdentity, *, resumed: bool
    ) -> tuple[ResidentReference, RunIdentity]:
        if resumed and identity.moving_reference:
            return _moved(self.setup), identity
        if self._named:
            reference = self._named
        elif self.setup.lora:
            say("reference: resident, the policy without its adapters")
            reference = self._original(policy, identity) if resumed else policy
            return ResidentReference(reference, self.setup.job.loss.requirements, self.setup.scoring), identity
        elif resumed:
            reference = self._load_original(identity)
        else:
            reference = build_reference(self.setup.config)
            copy_policy(policy, reference)
            save = self.setup.settings.directories.save
            if not identity.reference_weights and save and not identity.moving_reference:
                directory = (Path(save) / WEIGHTS_DIR).resolve()
                if not broadcast(directory.exists()):
                    save_weights(reference, directory)
                identity = replace(identity, reference_weights=str(directory))
        say("reference: resident, a frozen copy beside the policy")
        return ResidentReference(reference, self.setup.job.loss.requirements, self.setup.scoring), identity

    def _original(self, policy: list[Any], identity: RunIdentity) -> list[Any]:
        """The reference of a run that goes on: with adapters still the policy, without them."""
        if not self.setup.lora or identity.reference.get("weights") != identity.base_weights:  # of --reference-model
            return self._load_original(identity)
        # Wherever they were read: the weights that the adapters stand beside have been compared.
        found = self._identify(policy, identity.base_weights)
        _check_original("the model without its adapters", identity.reference, found)
        return policy

    def _load_original(self, identity: RunIdentity) -> list[Any]:
        source = identity.reference_weights or f"--seed {identity.seed}"
        if not identity.reference_weights:
            reference = build_reference(self.setup.config, with_weights=True)
            initialize_by_name(unwrap_model(reference), identity.seed)
        elif problems := integrity_problems(Path(source)):
            listed = "\n".join(f"  {line}" for line in problems)
            raise UserError(f"the weights of the original reference are damaged:\n{listed}\nRestore them.")
        else:
            reference = build_reference(self.setup.config)
            self._load(reference, source)
        _check_original(source, identity.reference, self._identify(reference))
        return reference

    def _load(self, reference: list[Any], source: str) -> None:
        if is_model_directory(Path(source)):
            weights_loader(source, StopRequest.of(self.setup.settings))(unwrap_model(reference))
        else:
            with all_ranks_agree():
                load_weights(reference, Path(source))


def _moved(setup: RunSetup) -> ResidentReference:
    """The reference as the checkpoint holds it that the policy has just been loaded from."""
    root, iteration = str(setup.settings.directories.load), setup.arguments.iteration
    reference = build_reference(setup.config)
    with all_ranks_agree():
        load_moved(reference, Path(get_checkpoint_name(root, iteration, return_base_dir=True)))
    say(f"reference: resident, as it had moved to by step {iteration}")
    return ResidentReference(reference, setup.job.loss.requirements, setup.scoring)


def _pretrained(setup: RunSetup) -> str:
    """The checkpoint the policy has just been loaded from, as far as it can serve as the reference later."""
    directories = setup.settings.directories
    roots = (None if setup.lora else directories.load, directories.pretrained_checkpoint)
    for root in roots:
        directory = checkpoint_directory(root)
        if directory is not None:
            return str(directory.resolve())
    return setup.settings.model.hf_model or ""


def _check_original(source: str, kept: dict[str, Any], found: dict[str, Any]) -> None:
    if not is_of_this_version(kept):
        kept, found = of_every_version(kept), of_every_version(found)
        say("reference: an earlier version began this run: the model's settings are not compared, its weights are")
    if found != kept:
        differing = "\n".join(f"  {line}" for line in differences(kept, found))
        raise UserError(
            f"{source} and this run's settings do not make the reference of the resumed "
            f"checkpoint:\n{differing}\nRestore the weights, or resume with that run's settings."
        )
