"""What a run is, kept inside its checkpoints: the data position's meaning and the reference it is measured against.

Megatron saves its arguments with every checkpoint; ours ride along as one dictionary among them. On resume it is read
before anything is built, so that a checkpoint of other data is refused and the reference stays the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename
from torch.distributed.checkpoint.api import CheckpointException

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, is_rank_zero, say
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.megatron_settings import DirectorySettings
from megatron_bdpo.training.settings import Settings

_ARGUMENT = "bdpo_run_identity"

#: Fields without which "step k" means other pairs.
_POSITION = ("data", "pairs", "pairs_per_step", "seed")


@dataclass(frozen=True)
class RunIdentity:
    """The dictionary in the checkpoint."""

    data: str
    """Fingerprint of the training store."""
    pairs: int
    """Pairs left to train on after this run's selection."""
    pairs_per_step: int
    seed: int
    loss: str
    """Name and options; of one in a file also that file's digest."""
    settled: dict[str, Any] = field(default_factory=dict)
    """Options of the loss that the data decided at the start (see ``options_from_data``): a resumed run keeps them."""
    imbalance_edges: list[float] = field(default_factory=list)
    """Between the quartiles of the imbalance, from the same pairs; kept likewise, as long as the loss is the same."""
    reference: dict[str, Any] = field(default_factory=dict)
    """What the reference is (see ``fingerprint.reference_identity``); empty where the loss reads none."""
    reference_weights: str = ""
    """Directory that holds the reference's weights, if one does."""
    lora: dict[str, Any] = field(default_factory=dict)
    """What adapters the checkpoint holds (see ``lora.identity_part``); empty where it holds the whole model."""
    base_weights: str = ""
    """With adapters: the digest of the weights that they stand beside."""
    frozen_routers: bool = False
    """``--moe-freeze-router``: the optimizer's state has nothing of routers."""
    objective: str = "preference"
    """``--objective``: whether the checkpoint holds a policy, with an output layer, or a reward model, with a head."""
    moving_reference: bool = False
    """``--sync-reference-every``: the checkpoint holds the reference's weights, which are no longer its start's."""
    split: str = ""
    """See ``PairJob.split``. Runs that began before prompts were kept together have none."""
    evaluation_is_due: bool = False
    """The run was stopped in the evaluation after the checkpoint's step: to be done again when it goes on."""


def identity_of(settings: Settings, job: PairJob, lora: dict[str, Any]) -> RunIdentity:
    """The identity of the run that starts now; the reference is not known yet.

    Args:
        lora: see ``RunIdentity.lora``.
    """
    return RunIdentity(
        data=job.pool.stores[0].fingerprint,
        pairs=job.training_pairs,
        pairs_per_step=job.plan.steps.shape[1],
        seed=settings.schedule.seed,
        loss=" ".join(filter(None, (job.loss.spec.name, str(job.loss.options), settings.loss.digest))),
        lora=lora,
        frozen_routers=settings.model.moe_freeze_router,
        moving_reference=settings.reference.sync_reference_every is not None,
        objective=settings.objective.objective,
        split=job.split,
    )


def identity_argument(identity: RunIdentity) -> dict[str, object]:
    """The argument of Megatron's that has every checkpoint from now on carry the identity."""
    return {_ARGUMENT: asdict(identity)}


def checkpoint_directory(root: str | None) -> Path | None:
    """The directory of the newest checkpoint below ``root``, or None. Rank 0 looks; collective."""
    found: str | None = None
    with all_ranks_agree():
        if is_rank_zero() and root:
            found = _newest(root)
    directory = broadcast(found)
    return Path(directory) if directory else None


def _newest(root: str) -> str | None:
    tracker = Path(get_checkpoint_tracker_filename(root))
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if text != "release" and not text.isdigit():
        raise UserError(f"{tracker} does not name a checkpoint: {text[:40]!r}. Put the iteration of a good one there.")
    iteration = 0 if text == "release" else int(text)
    return get_checkpoint_name(root, iteration, release=text == "release", return_base_dir=True)


def resumed_identity(directories: DirectorySettings, current: RunIdentity) -> RunIdentity | None:
    """The identity in the checkpoint that ``--load`` will resume, or None for a fresh start. Collective.

    Raises:
        UserError: the checkpoint is of other data, or was not written by a preference run.
    """
    directory = None if directories.finetune else checkpoint_directory(directories.load)
    if directory is None:
        return None
    stored: dict[str, Any] | None = None
    with all_ranks_agree():
        if is_rank_zero():
            stored = _read(directory)
    known = {f.name for f in fields(RunIdentity)}
    found = RunIdentity(**{name: value for name, value in (broadcast(stored) or {}).items() if name in known})
    with all_ranks_agree():
        _check_position(found, current, directory)
        _refuse_other_split(found, current, directory)
        _refuse_other_routers(found, current, directory)
        _refuse_other_reference(found, current, directory)
        refuse_other_adapters(found.lora, current.lora, f"--load {directory}")
    if found.loss != current.loss:
        say(f"WARNING: the resumed run used the loss {found.loss}, this one uses {current.loss}")
        found = replace(found, imbalance_edges=[])
    return replace(found, loss=current.loss)


def _refuse_other_routers(found: RunIdentity, current: RunIdentity, directory: Path) -> None:
    if found.frozen_routers != current.frozen_routers:
        there, way = ("froze", "Add --moe-freeze-router") if found.frozen_routers else ("trained", "Leave it out")
        raise UserError(
            f"--load {directory}: --moe-freeze-router: that run {there} its routers, and the optimizer's state is of "
            f"that. {way}, or start a new run from its weights with --finetune."
        )


def _refuse_other_split(found: RunIdentity, current: RunIdentity, directory: Path) -> None:
    if found.split != current.split:
        # Without a digest --seed drew it: there, or of data whose prompts repeat, before these were kept together.
        there = "other prompts" if found.split else "what its --seed drew, in earlier versions rows, not whole prompts"
        raise UserError(
            f"--load {directory}: --eval-share: that run held out {there}. Rows that it has trained on would be held "
            "out here. Give its --eval-share and --eval-seed, or start a new run from its weights with --finetune."
        )


def _refuse_other_reference(found: RunIdentity, current: RunIdentity, directory: Path) -> None:
    if found.moving_reference != current.moving_reference:
        there, way = ("moved", "Add it") if found.moving_reference else ("did not move", "Leave it out")
        raise UserError(
            f"--load {directory}: --sync-reference-every: that run {there} its reference. {way}, or start a new run "
            "from its weights with --finetune."
        )


def refuse_other_objective(settings: Settings) -> None:
    """Refuse to load a policy as a reward model, or the other way round. Collective.

    Raises:
        UserError: on every rank, with the way out.
    """
    directories, own = settings.directories, settings.objective.objective
    roots = {"--load": directories.load, "--pretrained-checkpoint": directories.pretrained_checkpoint}
    found = [(flag, directory) for flag, root in roots.items() if (directory := checkpoint_directory(root))]
    with all_ranks_agree():
        for flag, directory in found if is_rank_zero() else ():
            there = _objective_in(directory)
            if there != own:
                way = (
                    f"Start the reward model from a Hugging Face model (--hf-model); {_EXPORT} makes one of this."
                    if settings.objective.is_reward
                    else "Add --objective reward to go on with it."
                )
                raise UserError(f"{flag} {directory} is of --objective {there}, this run of --objective {own}. {way}")


_EXPORT = "megatron-bdpo convert export"


def _objective_in(directory: Path) -> str:
    try:
        stored = identity_in(stored_arguments(directory))
    except UserError:  # told where it is loaded
        stored = {}
    return str(stored.get("objective", "preference"))


def refuse_other_adapters(there: Mapping[str, Any], here: Mapping[str, Any], place: str) -> None:
    """Refuse a checkpoint whose adapters a run does not have, or the other way round.

    Args:
        there, here: ``RunIdentity.lora`` of the checkpoint and of the run.
        place: the flag and the checkpoint's directory.

    Raises:
        UserError: with the way out.
    """
    if there and not here:
        way = f"Add --lora-rank {there['rank']} to go on with them; " if place.startswith("--load") else ""
        raise UserError(
            f"{place} holds adapters and no model. {way}megatron-bdpo convert merge puts them into the model that they "
            "stand beside."
        )
    if here and not there:
        raise UserError(
            f"{place} holds a whole model and no adapters. Name it with --pretrained-checkpoint to train adapters "
            "beside it."
        )
    differing = [
        f"{name}: {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]
    ]
    if differing:
        raise UserError(f"{place} holds other adapters: {'; '.join(differing)}.")


def stored_arguments(directory: Path) -> dict[str, Any]:
    """The arguments that a checkpoint was written with, by name.

    Raises:
        UserError: the directory holds no checkpoint.
    """
    return vars(stored_state(directory)["args"])


def stored_state(directory: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: ``args``, ``opt_param_scheduler``, ``iteration``.

    Raises:
        UserError: the directory holds no checkpoint.
    """
    try:
        state: dict[str, Any] = load_common_state_dict(str(directory))
        vars(state["args"])
        return state
    except (Exception, CheckpointException) as error:  # many kinds, and one that is no Exception
        raise UserError(f"the checkpoint {directory} cannot be read: {type(error).__name__}: {error}") from error


def identity_in(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The identity among a run's arguments; empty where no preference run wrote them."""
    return arguments.get(_ARGUMENT) or {}


def _read(directory: Path) -> dict[str, Any]:
    stored = identity_in(stored_arguments(directory))
    if not stored:
        raise UserError(
            f"the checkpoint {directory} was not written by a preference run, so there is nothing to resume. To start "
            "from its weights, name its directory with --pretrained-checkpoint instead of --load (or add --finetune)."
        )
    return dict(stored)


def _check_position(found: RunIdentity, current: RunIdentity, directory: Path) -> None:
    differing = [name for name in _POSITION if getattr(found, name) != getattr(current, name)]
    if differing:
        listed = "\n".join(
            f"  {name}: {getattr(found, name)} there, {getattr(current, name)} here" for name in differing
        )
        raise UserError(
            f"the checkpoint {directory} belongs to a run over other steps:\n{listed}\n"
            "Resume with that run's data flags, or start a new run from its weights with --finetune."
        )
