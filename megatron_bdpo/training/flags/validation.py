"""What Megatron or the file system would refuse, found out before pairs are tokenised for hours."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from megatron.training.arguments import validate_args
from megatron.training.checkpointing import get_checkpoint_tracker_filename
from megatron.training.global_vars import get_tokenizer, set_global_variables

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.pair_gpt import PairGPTConfig
from megatron_bdpo.platform.versions import installed_versions, libraries
from megatron_bdpo.training.checkpoints import settle_checkpoints
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, is_rank_zero, say
from megatron_bdpo.training.flags import recipe
from megatron_bdpo.training.hf.start import vocabulary_size
from megatron_bdpo.training.identity import checkpoint_directory, stored_arguments
from megatron_bdpo.training.job import apply_plan, made_up_plan
from megatron_bdpo.training.model_config import model_config
from megatron_bdpo.training.nodes import on_every_node, shared_by_every_node

#: Of a checkpoint in torch's distributed format.
_METADATA = ".metadata"


def set_up_megatron(args: argparse.Namespace) -> PairGPTConfig:
    """Validate Megatron's arguments and set its globals; returns the model's configuration. Collective.

    Sets ``args.scored_vocab_size``: the entries that log-probs are normalised over.

    Raises:
        UserError: on every rank, with Megatron's reason.
    """
    is_run = args.dry_run is None
    with all_ranks_agree(), refusals_of_megatron(), contextlib.nullcontext() if is_run else silence():
        validate_args(args)
        if not is_run:  # nothing of it is to be logged
            args.tensorboard_dir, args.wandb_project = None, ""
        set_global_variables(args)
        args.scored_vocab_size = vocabulary_size(args, get_tokenizer())
        return model_config(args)


def rehearse(args: argparse.Namespace) -> None:
    """Have Megatron validate a copy, with a plan that is made up. Collective.

    What the plan depends on of what it derives is kept: the number of virtual pipeline stages.

    Raises:
        UserError: on every rank, with Megatron's reason.
    """
    trial = copy.deepcopy(args)
    apply_plan(trial, made_up_plan(args), eval_packs=0)
    trial.padded_vocab_size = trial.padded_vocab_size or trial.make_vocab_size_divisible_by * (
        trial.tensor_model_parallel_size
    )
    with all_ranks_agree(), refusals_of_megatron(), silence():
        validate_args(trial)
        model_config(trial)
    args.virtual_pipeline_model_parallel_size = trial.virtual_pipeline_model_parallel_size


def silence() -> contextlib.AbstractContextManager[object]:
    """Without what Megatron prints: its arguments alone are 700 lines."""
    return contextlib.redirect_stdout(io.StringIO())


@contextlib.contextmanager
def refusals_of_megatron() -> Iterator[None]:
    """What Megatron raises inside the block as a UserError with its reason."""
    try:
        yield
    except UserError:
        raise
    except (AssertionError, ValueError, TypeError) as error:
        # Many of its assertions have no message: then the line itself has to do.
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise UserError(f"Megatron refused the arguments: {reason}") from error


def check_directories(args: argparse.Namespace) -> None:
    """Refuse a starting checkpoint that is not there or damaged, and a --save that cannot be written. Collective.

    Raises:
        UserError: on every rank, naming the flag.
    """
    for flag, root in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        tracker = get_checkpoint_tracker_filename(root) if root else ""
        if broadcast(Path(tracker).is_file()):
            on_every_node(flag, tracker, tracker)
    settle_checkpoints(args)
    start = [args.load, args.pretrained_checkpoint]
    if args.pretrained_checkpoint and not any(map(checkpoint_directory, start)):
        raise UserError(f"--pretrained-checkpoint {args.pretrained_checkpoint}: there is no checkpoint in it.")
    for root in (args.pretrained_checkpoint, args.load if args.finetune else None):
        directory = checkpoint_directory(root)
        with all_ranks_agree():
            # Megatron would read the same, but end in a traceback where it cannot.
            if directory and is_rank_zero() and args.dry_run is None and (directory / _METADATA).is_file():
                stored_arguments(directory)
    with all_ranks_agree():
        if args.save and is_rank_zero():
            try:
                Path(args.save).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=args.save):
                    pass
            except OSError as error:
                raise UserError(f"--save {args.save} cannot be written: {error}") from error
    if args.save:
        shared_by_every_node("--save", Path(args.save))


def keep_recipe(args: argparse.Namespace) -> None:
    """Leave what this start was told in --save, as a recipe. Collective.

    Raises:
        UserError: on every rank, when it cannot be written.
    """
    with all_ranks_agree():
        if args.save and is_rank_zero():
            facts = {"ranks": args.world_size, "started in": Path.cwd(), **installed_versions(), **libraries()}
            try:
                say(f"recipe: {recipe.keep(Path(args.save), args.recipe, facts)}")
            except OSError as error:
                raise UserError(f"--save {args.save} cannot be written: {error}") from error
