"""What Megatron makes of its arguments: rehearsed before pairs are tokenised for hours, then with the real plan."""

from __future__ import annotations

import contextlib
import io
import traceback
from collections.abc import Iterator

import numpy as np
from megatron.training.arguments import validate_args
from megatron.training.global_vars import get_tokenizer, set_global_variables

from megatron_bdpo.data.step_plan import StepPlan
from megatron_bdpo.errors import UserError
from megatron_bdpo.model.pair_gpt import PairGPTConfig
from megatron_bdpo.training.build_job import plan_settings
from megatron_bdpo.training.distributed import all_ranks_agree
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.hf.start import vocabulary_size
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.model_config import model_config
from megatron_bdpo.training.settings import Settings


def validate(arguments: Arguments, job: PairJob) -> PairGPTConfig:
    """Have Megatron validate its arguments with the job's plan, and set its globals. Collective.

    Sets the argument ``scored_vocab_size``: the entries that log-probs are normalised over.

    Returns:
        The model's configuration.

    Raises:
        UserError: on every rank, with Megatron's reason.
    """
    settings = arguments.settings
    arguments.set(**plan_arguments(settings, job.plan, len(job.eval_packs)))
    is_run = not settings.dry_run.is_wanted
    with all_ranks_agree(), refusals_of_megatron(), contextlib.nullcontext() if is_run else silence():
        validate_args(arguments.megatron)
        if not is_run:  # nothing of it is to be logged
            arguments.set(tensorboard_dir=None, wandb_project="")
        set_global_variables(arguments.megatron)
        arguments.set(scored_vocab_size=vocabulary_size(arguments.settings, get_tokenizer()))
        return model_config(arguments)


def rehearse(arguments: Arguments) -> None:
    """Have Megatron validate a copy, with a plan that is made up. Collective.

    What a plan depends on of what it derives is kept: the number of virtual pipeline stages.

    Raises:
        UserError: on every rank, with Megatron's reason.
    """
    trial = arguments.copy()
    settings = trial.settings
    trial.set(**plan_arguments(settings, _plan_without_pairs(settings), eval_packs=0))
    if not trial.megatron.padded_vocab_size:
        trial.set(padded_vocab_size=settings.architecture.vocab_multiple * settings.layout.tensor)
    with all_ranks_agree(), refusals_of_megatron(), silence():
        validate_args(trial.megatron)
        model_config(trial)
    arguments.set(virtual_pipeline_model_parallel_size=trial.settings.layout.virtual)


def _plan_without_pairs(settings: Settings) -> StepPlan:
    """A plan in the shapes that a real one could have.

    Whether stages are interleaved is not known yet: the number of packs suits both.
    """
    iterations = settings.schedule.train_iters
    if iterations is not None and iterations < 1:
        raise UserError(f"--train-iters must be at least 1, not {iterations}.")
    steps = np.zeros((iterations or 10**6, 0), np.int64)
    lengths = np.broadcast_to(settings.schedule.seq_length, (len(steps), settings.layout.pipeline))
    data_parallel = plan_settings(settings).data_parallel
    return StepPlan(steps, steps.astype(np.int32), lengths, data_parallel, np.zeros(len(steps), np.int64))


def plan_arguments(settings: Settings, plan: StepPlan, eval_packs: int) -> dict[str, object]:
    """Megatron's arguments for the shapes of a plan. To Megatron a sample is a pack, and all are as the longest."""
    schedule, steps = settings.schedule, len(plan.steps)
    evaluates = eval_packs > 0 and schedule.evaluates
    return {
        "max_position_embeddings": schedule.max_position_embeddings or schedule.seq_length,
        "seq_length": plan.longest,
        "micro_batch_size": 1,
        "eval_micro_batch_size": 1,
        "global_batch_size": plan.packs_per_step,
        "train_iters": steps,
        "dataloader_type": "external",
        "eval_iters": 1 if evaluates else 0,
        "eval_global_batch_size": eval_packs if evaluates else plan.packs_per_step,
        **intervals(settings, steps),
    }


def intervals(settings: Settings, last_step: int) -> dict[str, int]:
    """Megatron's arguments that leave the end to it where only the clock decides.

    It saves at the last step if an interval divides it, and after it if none does; it evaluates after it in any case.
    """
    found = {}
    if settings.directories.save and settings.directories.save_interval is None:
        found["save_interval"] = last_step
    if settings.evaluation.eval_every_minutes is not None and "eval_interval" not in settings.given:
        found["eval_interval"] = last_step + 1
    return found


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
