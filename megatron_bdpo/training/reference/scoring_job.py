"""Scoring as a job of its own: reference or reward model alone, forward only, in any layout, without an optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.platform.seams import initialize_megatron
from megatron_bdpo.training import identity
from megatron_bdpo.training.distributed import all_ranks_agree, say
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.job import each_once
from megatron_bdpo.training.phases import phase
from megatron_bdpo.training.reference.options_from_data import decide_options
from megatron_bdpo.training.reference.provider import ReferenceProvider
from megatron_bdpo.training.reference.weights import build_reference, load_weights
from megatron_bdpo.training.reporting.status import write_status
from megatron_bdpo.training.reward_file import check_reward_model, write_rewards
from megatron_bdpo.training.settings import Settings
from megatron_bdpo.training.setup import RunSetup, forget_global_state, set_up
from megatron_bdpo.training.stopping import StopRequest, StopRequested, listening


def score_pairs(arguments: Arguments) -> list[Path]:
    """Score all pairs of a training's data, those first that its steps would use, as far as its loss reads them; with
    --objective reward write their rewards.

    Collective.

    Args:
        arguments: parsed, not validated yet. What only training needs may be missing.

    Returns:
        The directory of each token store's log-probs; of rewards their file.

    Raises:
        UserError: on every rank; there is nothing to score, among other reasons.
        StopRequested: on every rank, with all that is scored on disk, when a signal or a --stop-file has asked for it.
    """
    settings = arguments.settings
    if settings.dry_run.is_wanted:
        raise UserError("--dry-run checks a training run. Leave it out to score.")
    stop = StopRequest.of(settings)
    try:
        with listening(settings.schedule.exit_signal):
            directories = _score(arguments, stop)
    except StopRequested as stopped:
        # The status beside --save is the training run's: a launcher asks for this one in a place of its own.
        write_status("stopped", None, reason=stopped.reason)
        say(f"stopped ({stopped.reason}); the same command goes on.")
        raise
    write_status("finished", None)
    return directories


def _score(arguments: Arguments, stop: StopRequest) -> list[Path]:
    arguments.set(**_without_training(arguments.settings))
    setup = set_up(arguments, trains=False)
    try:
        if setup.settings.objective.is_reward:
            check_reward_model(setup.settings)
            initialize_megatron()
            with phase("weights"):
                reward_model = _starting_model(setup)
            with phase("scoring"):
                return [write_rewards(setup, reward_model, stop.leave_if_asked)]
        requirements = setup.job.loss.requirements
        with all_ranks_agree():
            if not (requirements.reference or requirements.comprehension):
                raise UserError(
                    f"--preference-loss {setup.settings.loss.name} reads no reference: there is nothing to score."
                )
            if (kind := setup.settings.reference.reference) != "precomputed":
                raise UserError(f"--reference {kind} scores nothing ahead of a training run. Leave it out to score.")
        initialize_megatron()
        job = setup.job
        groups = each_once(job.groups_in_use(None), job.train.ids, job.held_out.ids)
        provider = ReferenceProvider(setup, groups, pause=stop.leave_if_asked)
        model: list[Any] = []
        with phase("weights"):
            if not setup.resumed or setup.lora:
                model = _starting_model(setup)
            run = setup.identity
            run = provider.recall(run) if setup.resumed else provider.identify(run, model)
        with phase("scoring"):
            log_probs = provider.log_probs(model, run, resumed=setup.resumed)
            decide_options(job.loss, log_probs.table().training_values(job), job.compared, {})
        return [log_probs.directory(index) for index in range(len(job.pool.stores))]
    finally:
        forget_global_state()


def _without_training(settings: Settings) -> dict[str, object]:
    """Steps and optimizer are of no concern, yet a plan without them is not one; metrics there are none to log.

    Held-out pairs are scored with the others, whether a training run evaluates them or not.
    """
    steps, schedule, layout = settings.steps, settings.schedule, settings.layout
    fewest = layout.data * (layout.pipeline if layout.chunks > 1 else 1)
    return {
        "train_iters": 1 if schedule.train_iters is None and steps.pair_epochs is None else schedule.train_iters,
        "pairs_per_step": fewest if steps.pairs_per_step is None else steps.pairs_per_step,
        "lr": schedule.lr or 0.0,
        "eval_iters": None,
        "tensorboard_dir": None,
        "wandb_project": None,
    }


def _starting_model(setup: RunSetup) -> list[Any]:
    """The weights that the training run would start from."""
    setup.add_initial_weights()
    if setup.lora:
        setup.config.pre_wrap_hooks.append(setup.look_at_base)
    model = build_reference(setup.config, with_weights=True)
    directories = setup.settings.directories
    # Adapters take no part; the weights that they stand beside are there.
    for root in () if setup.lora else (directories.load, directories.pretrained_checkpoint):
        directory = identity.checkpoint_directory(root)
        if directory is not None:
            with all_ranks_agree():
                load_weights(model, directory)
            say(f"weights: {directory}")
            break
    return model
