"""Scoring as a job of its own: the reference alone, forward only, in any layout, without an optimizer's memory."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.reference import build_reference, load_weights
from megatron_bdpo.platform.seams import initialize_megatron
from megatron_bdpo.training import identity
from megatron_bdpo.training.distributed import all_ranks_agree, say
from megatron_bdpo.training.job import each_once
from megatron_bdpo.training.preparation import forget_global_state
from megatron_bdpo.training.reference.provider import ReferenceProvider
from megatron_bdpo.training.reference.settling import settle
from megatron_bdpo.training.reporting.status import write_status
from megatron_bdpo.training.setup import RunSetup, set_up
from megatron_bdpo.training.stopping import StopRequest, StopRequested


def score_pairs(args: argparse.Namespace) -> list[Path]:
    """Score all pairs of a training's data, those first that its steps would use, as far as its loss reads them.

    Collective.

    Args:
        args: parsed, not validated yet. What only training needs may be missing.

    Returns:
        The directory of each token store's scores.

    Raises:
        UserError: on every rank; there is nothing to score, among other reasons.
        StopRequested: on every rank, with all that is scored on disk, when a signal or a --stop-file has asked for it.
    """
    if args.dry_run is not None:
        raise UserError("--dry-run checks a training. Leave it out to score.")
    stop = StopRequest(args.stop_file or ())
    try:
        with stop.listening(signal.SIGTERM, args.exit_signal):
            directories = _score(args, stop)
    except StopRequested:
        # The status beside --save is the training's: a launcher asks for this one in a place of its own.
        write_status("stopped", None, reason=stop.reason)
        say(f"stopped ({stop.reason}); the same command goes on.")
        raise
    write_status("finished", None)
    return directories


def _score(args: argparse.Namespace, stop: StopRequest) -> list[Path]:
    _leave_training_out(args)
    setup = set_up(args)
    try:
        requirements = setup.job.loss.requirements
        with all_ranks_agree():
            if not (requirements.reference or requirements.comprehension):
                raise UserError(
                    f"--preference-loss {args.preference_loss} reads no reference: there is nothing to score."
                )
            if setup.job.resident:
                raise UserError("--reference resident keeps no scores. Leave it out to score.")
        initialize_megatron()
        job = setup.job
        pairs = each_once(job.pairs_in_use(None), job.train.ids, job.held_out.ids)
        provider = ReferenceProvider(args, job, setup.config, setup.scoring, pairs, pause=stop.leave_if_asked)
        model: list[Any] = []
        run = setup.identity
        if not setup.resumed:
            model = _starting_model(setup)
            run = provider.identify(run, model)
        scores = provider.scores(model, run, resumed=setup.resumed)
        settle(job.loss, scores.table().training_pairs(job), len(job.train.ids), {})
        return [scores.directory(index) for index in range(len(job.pool.stores))]
    finally:
        forget_global_state()


def _leave_training_out(args: argparse.Namespace) -> None:
    """Steps and optimizer are of no concern, yet a plan without them is not one; metrics there are none to log."""
    if args.train_iters is None and args.pair_epochs is None:
        args.train_iters = 1
    if args.pairs_per_step is None:
        args.pairs_per_step = args.world_size
    if args.lr is None:
        args.lr = 0.0
    args.tensorboard_dir = args.wandb_project = None


def _starting_model(setup: RunSetup) -> list[Any]:
    """The weights that the training would start from."""
    setup.add_initial_weights()
    model = build_reference(setup.config, with_weights=True)
    for root in (setup.args.load, setup.args.pretrained_checkpoint):
        directory = identity.checkpoint_directory(root)
        if directory is not None:
            with all_ranks_agree():
                load_weights(model, directory)
            say(f"weights: {directory}")
            break
    return model
