"""A preference run: the step, and the moments of Megatron's trainer handed on to the callbacks beside it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from megatron.core.enums import ModelType
from megatron.core.utils import unwrap_model
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from torch import Tensor

from megatron_bdpo.data.step_plan import IntArray
from megatron_bdpo.display import Block
from megatron_bdpo.logprobs import TokenScoring
from megatron_bdpo.losses.base import Takes
from megatron_bdpo.model.evaluation import weights_at_rest
from megatron_bdpo.model.pair_gpt import PairGPTConfig
from megatron_bdpo.platform.seams import trainer_seams
from megatron_bdpo.training import identity
from megatron_bdpo.training.answer_step import AnswerStep
from megatron_bdpo.training.callbacks.callback import Callback, Start, StepResult
from megatron_bdpo.training.callbacks.progress import LogInterval, Progress
from megatron_bdpo.training.callbacks.standard import standard_callbacks
from megatron_bdpo.training.directories import keep_recipe
from megatron_bdpo.training.distributed import say
from megatron_bdpo.training.evaluation_portions import EvaluationPortions
from megatron_bdpo.training.finite import gradients_named
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.forward import PreferenceStep, ReferenceValues, ScoringStep
from megatron_bdpo.training.group_step import GroupStep
from megatron_bdpo.training.hf.exporting import export_places
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.pack_iterators import dataset_provider
from megatron_bdpo.training.phases import WARM_UP_STEPS, beat, clock, phase
from megatron_bdpo.training.reference.options_from_data import decide_options, imbalance_edges
from megatron_bdpo.training.reference.passes import NoReference, ReferenceTable, ResidentReference
from megatron_bdpo.training.reference.provider import ReferenceProvider
from megatron_bdpo.training.reference.scoring_loop import make_scorer
from megatron_bdpo.training.reporting.advice import about_data, about_labels
from megatron_bdpo.training.reporting.summary import summarize
from megatron_bdpo.training.reward_step import RewardStep
from megatron_bdpo.training.saves import RunSaves
from megatron_bdpo.training.settings import Settings
from megatron_bdpo.training.setup import RunSetup, forget_global_state, set_up
from megatron_bdpo.training.step_shift import StepShift, passes_of, values_of
from megatron_bdpo.training.step_targets import SortedStep
from megatron_bdpo.training.stopping import StopRequest, StopRequested, listening
from megatron_bdpo.training.suspects import likely_cause

Schedule = Callable[..., Any]
"""Megatron's, of one step or evaluation."""

_STEPS: dict[Takes, type[PreferenceStep]] = {"pairs": PreferenceStep, "groups": GroupStep, "answers": AnswerStep}


class PreferenceRun:
    """One training run; implements ``platform.hooks.TrainerHooks``."""

    arguments: Arguments
    """Megatron's and ours."""
    setup: RunSetup
    """What there was before the model."""
    settings: Settings
    """What the user has said."""
    job: PairJob
    """Loss, pairs and plan."""
    config: PairGPTConfig
    """Of the model."""
    model: list[Any]
    """The policy's chunks, once they are loaded."""
    identity: identity.RunIdentity
    """What the checkpoints say of the run, once the reference is known."""
    iteration: int
    """Steps that are done."""
    scoring: TokenScoring
    """How positions are scored; its vocabulary is the tokenizer's."""
    step: PreferenceStep
    """Megatron's ``forward_step``."""
    callbacks: list[Callback]
    """In the order in which they are told of a moment."""
    progress: Progress
    """Of these, the metrics of steps and evaluations, on the last pipeline stage."""
    evaluation: EvaluationPortions
    """How evaluations run."""
    stop: StopRequest
    """Whether the run has been asked to stop, and why."""

    def __init__(self, arguments: Arguments, callbacks: Sequence[Callback] = ()) -> None:
        """Read pairs, plan steps, validate Megatron's arguments. Collective.

        Args:
            callbacks: more of them, told before the others.

        Raises:
            UserError: on every rank.
        """
        self.arguments = arguments
        self.setup = setup = set_up(arguments, keeps_status=True)
        self.settings, self.job, self.config, self.scoring = setup.settings, setup.job, setup.config, setup.scoring
        schedule, job = self.settings.schedule, self.job
        step = RewardStep if self.settings.objective.is_reward else _STEPS[job.loss.spec.takes]
        self.step = step(
            job.loss,
            NoReference(),
            replace(
                self.scoring,
                entropy=self.settings.log_probs.log_entropy,
                collision_entropy=job.loss.requirements.collision_entropy,
            ),
            check_nan=schedule.check_finite,
            describe=job.pool.describe,
            suspect=likely_cause(self.settings, job.loss.options),
        )
        self.model = []
        self.stop = StopRequest.of(self.settings)
        self.evaluation = EvaluationPortions(
            self.stop, self.settings.layout.pipeline, functools.partial(self._keep_identity, evaluation_is_due=True)
        )
        self.signals_received = self.stop.signals_received
        self.progress = Progress(LogInterval(schedule.log_interval, len(job.plan.steps)))
        self.callbacks = [*callbacks, *standard_callbacks(setup, self.step, self.progress, self.stop)]
        self.progress.listeners = self.callbacks
        self.iteration = 0
        self._step_started = 0.0
        self._steps_here = 0
        self._looking_at_steps: Callable[[Schedule], Schedule] = _as_it_is
        say("", summarize(arguments, job))
        for advice in (
            *about_data(job.pool.stores[0].report, job.plan),
            *about_labels(job.loss, *job.labelled_answers),
        ):
            say(f"WARNING: {advice}")
        # Megatron's loop asks after each step whether to stop; and it is not Megatron that deletes checkpoints.
        arguments.set(exit_signal_handler=True, save_retain_interval=None)

    def pretrain(self) -> None:
        """Hand over to Megatron's trainer until the last step is done. Collective."""
        with in_megatron(self):
            container = pretrain_cfg_container_from_args(self.arguments.megatron, self.config)
            pretrain(container, dataset_provider(self.arguments, self.job), ModelType.encoder_or_decoder, self.step)

    def after_load(self, model: list[Any]) -> None:
        """The policy holds its weights: get the reference, and what follows from its values."""
        self.model, self.iteration = model, self.arguments.iteration
        resumed = self.iteration > 0
        provider = ReferenceProvider(self.setup, _groups_in_use(self), pause=self.stop.leave_if_asked)
        with phase("scoring"):
            reference, known = provider.provide(model, self.setup.identity, resumed=resumed)
        self.step.reference = reference
        if isinstance(reference, ReferenceTable):
            known = _decide_by_data(self, reference, known, resumed=resumed)
        self._looking_at_steps = _looking_at_steps(self, reference)
        self.identity = known
        self._keep_identity()
        log_probs = reference.directories if isinstance(reference, ReferenceTable) else {}
        keep_recipe(self.arguments)  # here: a start that fails before leaves nothing behind
        if resumed:
            say(_place(self))
        start = Start(model, self.iteration, self.step.loss, known, log_probs, known.imbalance_edges)
        for each in self.callbacks:
            each.after_load(start)
        for chunk in unwrap_model(model):  # after the reference has been built from the same configuration
            chunk.config.moe_grad_scale_func = functools.partial(_auxiliary_loss_scale, self, chunk.config)

    def _keep_identity(self, **changes: Any) -> None:
        """In every checkpoint from now on."""
        self.arguments.set(**identity.identity_argument(replace(self.identity, **changes)))

    def before_training(self, evaluate: Callable[[int], Any]) -> None:
        """Megatron's loop is about to start."""
        clock().enter("step")  # for good: from here on there is something to lose
        clock().is_warm = False
        for each in self.callbacks:
            each.before_training()
        self.stop.leave_if_asked()
        if _is_evaluated_first(self):
            gate, self.step.gate = self.step.gate, None
            with weights_at_rest(self.model):
                evaluate(self.iteration)
            self.step.gate = gate
            self.stop.leave_if_asked()

    def wrap_schedule(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """Give each step the length of its packs, time it, and let a resident reference score before it."""
        reference = self.step.reference
        inner = self._looking_at_steps(schedule)
        if isinstance(reference, ResidentReference):
            inner = reference.wrap(inner)

        def run(*args: Any, seq_length: int, forward_only: bool = False, **kwargs: Any) -> Any:
            if not forward_only:
                beat()
                self._step_started = time.perf_counter()
            # Megatron's own is that of the longest pack. Without pipeline stages nobody reads it; with them a step's
            # packs have one length, of which every stage knows what it sends and receives.
            seq_length = self.job.eval_length if forward_only else int(self.job.plan.lengths[self.iteration, 0])
            done, self.step.evaluates = self.iteration, forward_only
            self.step.place = f"evaluation after step {done}" if forward_only else f"step {done + 1}"
            groups, describe = self.job.groups_of_step, self.job.pool.describe_group
            with gradients_named(done + 1, groups, describe, self.step.suspect):
                if forward_only:
                    microbatches = kwargs.pop("num_microbatches")
                    evaluate = functools.partial(inner, *args, seq_length=seq_length, forward_only=True, **kwargs)
                    return self.evaluation.run(evaluate, microbatches)
                return inner(*args, seq_length=seq_length, forward_only=False, **kwargs)

        return run

    def work_of_step(self) -> tuple[float, float]:
        """What the step has in tokens and in squares of sequence lengths, for Megatron's count of operations."""
        lengths = self.job.pool.group_lengths(self.job.plan.steps[self.iteration])
        tokens = float(self.job.plan.real_tokens[self.iteration])
        return tokens, float(lengths.squares(share_prompts=self.job.share_prompts).sum())

    def after_update(self, grad_norm: float, iteration: int) -> None:
        """See ``Callback``."""
        for each in self.callbacks:
            each.after_update(grad_norm, iteration)

    def after_step(self, losses: dict[str, Tensor], iteration: int, skipped: bool) -> None:
        """See ``Callback``."""
        beat()
        self._steps_here += 1
        clock().is_warm = self._steps_here >= WARM_UP_STEPS
        self.iteration, plan = iteration, self.job.plan
        seconds = time.perf_counter() - self._step_started
        tokens = int(plan.real_tokens[iteration - 1])
        pairs = len(self.job.pool.grouping.pairs_of(self.job.groups_of_step(iteration)))
        result = StepResult(iteration, losses, skipped, seconds, pairs, tokens)
        for each in self.callbacks:
            each.after_step(result)

    def after_evaluation(self, metrics: dict[str, Tensor]) -> None:
        """See ``Callback``."""
        for each in self.callbacks:
            each.after_evaluation(metrics, self.iteration)

    def in_phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """See ``phases``."""
        return phase(name)  # type: ignore[arg-type]  # the trainer's seams name three of them


@contextlib.contextmanager
def in_megatron(run: PreferenceRun) -> Iterator[None]:
    """Inside the block, Megatron's ``pretrain`` trains this run. Collective.

    Raises:
        SystemExit: Megatron's loop ends early, after its checkpoint.
    """
    saves = RunSaves(run.callbacks, wants_digests=run.settings.checkpoints.checkpoint_checksums)
    run.setup.add_initial_weights()
    run.setup.add_adapters()
    try:
        with listening(run.settings.schedule.exit_signal):
            with trainer_seams(run, saves):
                yield
            run.evaluation.leave_if_left()
            for each in run.callbacks:
                each.finished()
        say(_what_next(run.settings))
    except SystemExit as leaving:
        if not leaving.code:
            for each in run.callbacks:
                each.stopped(run.iteration, _reason(run, leaving))
        say(_early_end(run, leaving))
        raise
    finally:
        forget_global_state()


def tables(run: PreferenceRun) -> list[Block]:
    """What the callbacks have to show of a run that is over. On the last rank."""
    return [block for each in run.callbacks if (table := each.table()) for block in ("", table)]


def _as_it_is(schedule: Schedule) -> Schedule:
    return schedule


def _looking_at_steps(run: PreferenceRun, reference: ReferenceValues) -> Callable[[Schedule], Schedule]:
    """What gives the losses that look at whole steps what they need, before each step."""
    loss, job = run.step.loss, run.job
    if loss.spec.step_targets:
        run.step.targets = targets = SortedStep(job, loss, reference, ScoringStep(run.scoring))
        return functools.partial(targets.wrap, model=run.model, done=lambda: run.iteration)
    if loss.spec.step_shift:
        assert isinstance(run.step, AnswerStep)
        groups = np.concatenate([job.train.ids, job.held_out.ids])
        policy = passes_of(replace(make_scorer(run.setup, run.model, groups), with_adapters=True))
        if isinstance(reference, ReferenceTable):
            shift = StepShift(job, loss, policy, values_of(reference, job))
        else:
            assert isinstance(reference, ResidentReference)
            shift = StepShift(job, loss, policy, passes_of(make_scorer(run.setup, reference.model, groups)))
        return functools.partial(
            shift.wrap, step=run.step, done=lambda: run.iteration, pause=run.evaluation.leave_if_asked
        )
    return _as_it_is


def _reason(run: PreferenceRun, leaving: SystemExit) -> str:
    """Of a stop that was asked for; empty where Megatron's own flags have ended the run."""
    return leaving.reason if isinstance(leaving, StopRequested) else run.stop.reason


def _place(run: PreferenceRun) -> str:
    last_step = len(run.job.plan.steps)
    if run.iteration >= last_step:
        return f"already finished at step {run.iteration} of {last_step}: nothing to train."
    return f"resumed at step {run.iteration} of {last_step}"


def _is_evaluated_first(run: PreferenceRun) -> bool:
    if run.iteration:  # after the last step Megatron evaluates by itself
        return run.identity.evaluation_is_due and run.iteration < len(run.job.plan.steps)
    return run.settings.evaluation.eval_at_start and bool(run.settings.schedule.eval_iters)


def _what_next(settings: Settings) -> str:
    save, model = settings.directories.save, settings.model.hf_model
    if not save:
        return "finished; no checkpoint was kept, for want of --save."
    steps = [f"`megatron-bdpo report {save}`"]
    if not export_places(settings):
        of = f"--hf-model {model}" if model else "--family NAME"
        steps.append(f"`megatron-bdpo convert export --checkpoint {save} {of} --output DIR`")
    return f"finished; next: {', '.join(steps)}"


def _early_end(run: PreferenceRun, leaving: SystemExit) -> str:
    last_step, save, code = len(run.job.plan.steps), run.settings.directories.save, leaving.code
    if code:  # with --rerun-mode, Megatron ends a run whose numbers it does not trust
        step = run.iteration + 1
        return f"error: Megatron has ended the run in step {step} (exit code {code}); its log has the reason."
    told = _reason(run, leaving)
    reason = f" ({told})" if told else ""
    place = f"stopped{reason} after step {run.iteration} of {last_step}"
    if not save:
        return f"{place}; no step was kept, for want of --save."
    return f"{place}; the same command with --load {save} goes on."


def _groups_in_use(run: PreferenceRun) -> IntArray:
    """Ids of the groups whose reference values the run needs, in the order of their use."""
    schedule = run.settings.schedule
    if not schedule.eval_iters:
        return run.job.groups_in_use(None)
    first = 0 if run.settings.evaluation.eval_at_start else schedule.eval_interval or len(run.job.plan.steps)
    return run.job.groups_in_use(first)


def _decide_by_data(
    run: PreferenceRun, reference: ReferenceTable, known: identity.RunIdentity, *, resumed: bool
) -> identity.RunIdentity:
    """What follows from the reference's values: options of the loss, quartiles. A resumed run keeps its start's."""
    kept, kept_edges = (known.settled, known.imbalance_edges) if resumed else ({}, [])
    pairs, of = reference.training_values(run.job), run.job.compared
    loss, settled = decide_options(run.job.loss, pairs, of, kept)
    edges = imbalance_edges(loss, pairs, of, kept_edges)
    run.step.loss, run.job = loss, replace(run.job, loss=loss)
    run.step.imbalance_edges = torch.tensor(edges, dtype=torch.float64).cuda() if edges else None
    return replace(known, settled=settled, imbalance_edges=edges)


def _auxiliary_loss_scale(run: PreferenceRun, config: Any) -> Tensor:
    """What the router's losses of this step are multiplied by: see ``model.moe``."""
    # An evaluation may follow the last step; it asks too, although nothing is scaled there.
    step = min(run.iteration + 1, len(run.job.plan.steps))
    lengths = run.job.pool.group_lengths(run.job.groups_of_step(step))
    tokens = lengths.positions(share_prompts=run.job.share_prompts).sum()
    one = torch.ones(1, device=torch.cuda.current_device())
    return (config.grad_scale_func(one) if config.grad_scale_func else one) * (run.job.counted_in_step(step) / tokens)
