"""From parsed flags to a job and a model's configuration: what comes before the first weight, and all of a dry run."""

from __future__ import annotations

import argparse
import contextlib

from megatron.training.training import destroy_global_state

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.pair_gpt import PairGPTConfig
from megatron_bdpo.platform.compilation import fuse_rotary_embedding
from megatron_bdpo.training.distributed import all_ranks_agree
from megatron_bdpo.training.flags.arguments import log_to_wandb_too
from megatron_bdpo.training.flags.determinism import forget_determinism
from megatron_bdpo.training.flags.fused_layers import settle_fusions
from megatron_bdpo.training.flags.layout_check import check_layout
from megatron_bdpo.training.flags.precision_check import check_precision
from megatron_bdpo.training.flags.refusals import refuse_what_cannot_be_honoured
from megatron_bdpo.training.flags.validation import check_directories, rehearse, set_up_megatron
from megatron_bdpo.training.hf.exporting import check_save_hf
from megatron_bdpo.training.hf.start import apply_hf_model
from megatron_bdpo.training.job import PairJob, apply_plan, build_job
from megatron_bdpo.training.nodes import same_flags


def prepare(args: argparse.Namespace) -> tuple[PairJob, PairGPTConfig]:
    """Check the flags, read pairs, plan steps, validate and set up Megatron's arguments. Collective.

    Raises:
        UserError: on every rank, for anything that the user can put right.
    """
    same_flags(args)
    apply_hf_model(args)
    check_save_hf(args)
    with all_ranks_agree():
        refuse_what_cannot_be_honoured(args)
        check_layout(args)
        check_precision(args)
        settle_fusions(args)
    log_to_wandb_too(args)
    rehearse(args)
    check_directories(args)
    job = build_job(args)
    for flag, value in (("--eval-every-minutes", args.eval_every_minutes), ("--eval-prompts", args.eval_prompts)):
        if value is not None and not (job.eval_packs and args.eval_iters != 0):
            raise UserError(f"{flag}: there are no held-out pairs. Add --eval-share or --eval-pair-data.")
    apply_plan(args, job.plan, len(job.eval_packs))
    check_save_hf(args, last_step=args.train_iters)
    fuse_rotary_embedding(args.fuse_local_layers)
    args.exit_signal_handler = False  # Megatron is to set no handler of its own: we answer for it, see ``stopping``
    try:
        return job, set_up_megatron(args)
    except UserError:
        forget_global_state()
        raise


def forget_global_state() -> None:
    """Leave the process as it was, so that another run can follow in it."""
    forget_determinism()
    with contextlib.suppress(Exception):  # after a failure at start, some of it was never made
        destroy_global_state()
