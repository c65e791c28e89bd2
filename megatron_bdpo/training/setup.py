"""The road from flags to a job that is ready to begin: training, scoring and dry run all take it, top to bottom."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron.training.training import destroy_global_state

from megatron_bdpo.errors import UserError
from megatron_bdpo.logprobs import LogitShape, TokenScoring
from megatron_bdpo.model.initialization import initialize_by_name
from megatron_bdpo.model.lora.attach import adapters_hook
from megatron_bdpo.model.lora.lora_config import LoraConfig
from megatron_bdpo.model.pair_gpt import PairGPTConfig
from megatron_bdpo.platform.compilation import fuse_rotary_embedding
from megatron_bdpo.training import identity
from megatron_bdpo.training.build_job import build_job
from megatron_bdpo.training.continuation import check_continuation, go_on_in_used_directory
from megatron_bdpo.training.directories import check_directories
from megatron_bdpo.training.disk import refuse_small_disks
from megatron_bdpo.training.distributed import all_ranks_agree, say
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.flags.determinism import forget_determinism
from megatron_bdpo.training.flags.fused_layers import fusion_arguments
from megatron_bdpo.training.flags.layout_check import check_layout
from megatron_bdpo.training.flags.objective_check import check_objective
from megatron_bdpo.training.flags.precision_check import check_precision
from megatron_bdpo.training.flags.refusals import refuse_what_cannot_be_honoured
from megatron_bdpo.training.flags.validation import rehearse, validate
from megatron_bdpo.training.hf.adapter_files import adapters_loader, check_targets, expected_base
from megatron_bdpo.training.hf.exporting import check_save_hf
from megatron_bdpo.training.hf.pushing import check_push
from megatron_bdpo.training.hf.start import start_from_hugging_face, weights_loader
from megatron_bdpo.training.identity import RunIdentity
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.lora import identity_part, lora_config, say_sizes, with_base
from megatron_bdpo.training.nodes import same_flags
from megatron_bdpo.training.reference.weights import checkpoint_loader
from megatron_bdpo.training.reporting.status import keep_status_in
from megatron_bdpo.training.settings import Settings
from megatron_bdpo.training.stopping import StopRequest


@dataclass
class RunSetup:
    """A job before its model exists."""

    arguments: Arguments
    """Validated by Megatron, with the shapes of the plan."""
    settings: Settings
    """What they say."""
    job: PairJob
    """Loss, pairs and plan."""
    config: PairGPTConfig
    """Of policy and reference."""
    scoring: TokenScoring
    """How positions are scored; its vocabulary is the tokenizer's."""
    identity: RunIdentity
    """Of this run, or of the one that it resumes."""
    resumed: bool
    """There is a checkpoint of this run to go on from."""
    lora: LoraConfig | None = None
    """The adapters that are trained, where it is not the whole model."""

    def add_initial_weights(self) -> None:
        """Where there is no checkpoint to load, have the model filled as it is built. Collective.

        With adapters there is none of the model: they are loaded alone.
        """
        directories = self.settings.directories
        kept = [identity.checkpoint_directory(directories.pretrained_checkpoint)]
        if not self.lora:
            kept.append(identity.checkpoint_directory(directories.load))
        if any(kept):
            if self.lora and kept[0]:
                self.config.pre_wrap_hooks.append(checkpoint_loader(kept[0]))
        elif self.settings.model.hf_model:
            self.config.transformer.perform_initialization = False
            stop = StopRequest.of(self.settings)
            head_seed = self.settings.schedule.seed if self.settings.objective.is_reward else None
            loader = weights_loader(self.settings.model.hf_model, stop, head_seed=head_seed)
            self.config.pre_wrap_hooks.append(loader)
        else:
            seed = self.settings.schedule.seed
            self.config.pre_wrap_hooks.append(functools.partial(initialize_by_name, seed=seed))

    def add_adapters(self) -> None:
        """Have the model frozen and given its adapters as it is built, after its weights."""
        if not self.lora:
            return
        self.config.pre_wrap_hooks += [
            self.look_at_base,
            adapters_hook(self.lora, self.settings.schedule.seed),
            say_sizes,
        ]
        if self.settings.lora.lora_start and not self.resumed:
            self.config.pre_wrap_hooks.append(adapters_loader(self.settings, self.lora))
        # Megatron would look there for adapters where --load has none yet.
        base = self.settings.directories.pretrained_checkpoint
        self.arguments.set(pretrained_checkpoint=None, base_checkpoint=base)

    def look_at_base(self, model: list[Any]) -> list[Any]:
        """A pre-wrap hook: compare the weights that adapters are to stand beside. Collective.

        It comes before Megatron loads anything beside them.

        Raises:
            UserError: on every rank; they are not those of the checkpoint or of --lora-start.
        """
        self.identity = with_base(self.identity, model, self.scoring.vocab_size)
        return model


def set_up(arguments: Arguments, *, trains: bool = True, keeps_status: bool = False) -> RunSetup:
    """Check everything, read the pairs, plan the steps, and find out what is resumed. Collective.

    Args:
        trains: checkpoints are going to be written, and steps made: what only these need is checked.
        arguments: parsed. Afterwards Megatron has validated them, and its globals are set: :func:`forget_global_state`
            is for when the job is over.
        keeps_status: as soon as it can be written, ``status.json`` in --save is this job's.

    Raises:
        UserError: on every rank, for anything that the user can put right.
    """
    same_flags(arguments.recipe | {"loss-file": arguments.settings.loss.digest})  # of its content, too
    with all_ranks_agree():
        check_objective(arguments.settings, trains=trains)
    goes_on = go_on_in_used_directory(arguments) if trains else ""
    start_from_hugging_face(arguments)
    check_save_hf(arguments.settings)
    with all_ranks_agree():
        refuse_what_cannot_be_honoured(arguments.megatron)
        check_layout(arguments.settings)
        check_precision(arguments.settings)
        lora = lora_config(arguments.settings)
        if lora:
            check_targets(arguments.settings, lora)
        arguments.set(**fusion_arguments(arguments.settings))
    arguments.log_to_wandb_too()
    rehearse(arguments)
    if lora:  # which is what it is called with adapters
        arguments.set(reference=arguments.settings.reference.reference.replace("base", "precomputed"))
    adapters = identity_part(lora)
    if goes_on:
        say(goes_on)
    check_directories(arguments.settings, adapters)
    identity.refuse_other_objective(arguments.settings)
    if keeps_status:
        keep_status_in(arguments.settings.directories.save)
    job = build_job(arguments)
    _check_evaluation(arguments.settings, job)
    check_save_hf(arguments.settings, last_step=len(job.plan.steps))
    if trains:
        check_push(arguments.settings)
    fuse_rotary_embedding(bool(arguments.settings.model.fuse_local_layers))
    with _forgotten_on_error():
        config = validate(arguments, job)
        settings = arguments.settings
        current = identity.identity_of(settings, job, adapters)
        check_continuation(arguments, trains=trains)
        found = identity.resumed_identity(settings.directories, current)
        if found is None and lora:
            current = replace(current, base_weights=expected_base(settings))
        if trains and not settings.dry_run.is_wanted:  # which may be on another machine
            refuse_small_disks(arguments, job)
    scoring = token_scoring(arguments)
    return RunSetup(arguments, settings, job, config, scoring, found or current, found is not None, lora)


def _check_evaluation(settings: Settings, job: PairJob) -> None:
    evaluation = settings.evaluation
    wanted = {"--eval-every": evaluation.eval_every_minutes, "--eval-prompts": evaluation.eval_prompts}
    for flag, value in wanted.items():
        if value is None:
            continue
        if not settings.schedule.evaluates:
            raise UserError(f"{flag} is for evaluations, and --eval-iters 0 switches them off. Leave one of them out.")
        if not job.eval_packs:
            raise UserError(f"{flag}: there are no held-out pairs. Add --eval-share or --eval-pair-data.")


def token_scoring(arguments: Arguments) -> TokenScoring:
    """How log-probs are computed, by validated arguments."""
    log_probs, layers = arguments.settings.log_probs, arguments.settings.layers
    return TokenScoring(
        arguments.scored_vocab_size,
        kernel=log_probs.log_probs,
        chunk_size=log_probs.log_prob_chunk_size,
        kept_bytes=log_probs.kept_bytes,
        shape=LogitShape(1.0 if layers.logit_scale is None else layers.logit_scale, layers.logit_softcap),
    )


@contextlib.contextmanager
def _forgotten_on_error() -> Iterator[None]:
    try:
        yield
    except UserError:
        forget_global_state()
        raise


def forget_global_state() -> None:
    """Leave the process as it was, so that another run can follow in it."""
    forget_determinism()
    with contextlib.suppress(Exception):  # after a failure at start, some of it was never made
        destroy_global_state()
