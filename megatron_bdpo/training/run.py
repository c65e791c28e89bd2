"""A preference run: pairs, policy and reference wired into ``megatron.training.pretrain``."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.utils import unwrap_model
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.async_utils import is_empty_async_queue
from torch import Tensor

from megatron_bdpo.data.packs import causal_squares, group_tokens
from megatron_bdpo.model.evaluation import weights_at_rest
from megatron_bdpo.platform import cpu
from megatron_bdpo.platform.seams import trainer_seams
from megatron_bdpo.training import checkpoints, identity
from megatron_bdpo.training.batches import IntArray, PackBatch, Packs, iterate_packs
from megatron_bdpo.training.directories import keep_recipe
from megatron_bdpo.training.distributed import all_ranks_agree, context_rank, say
from megatron_bdpo.training.finite import broken_gradient, gradients_named, reject_broken_weights
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.forward import PreferenceStep
from megatron_bdpo.training.generation.generations import Generations
from megatron_bdpo.training.hf.exporting import save_live
from megatron_bdpo.training.reference.options_from_data import decide_options, imbalance_edges
from megatron_bdpo.training.reference.passes import NoReference, ReferenceTable, ResidentReference
from megatron_bdpo.training.reference.provider import ReferenceProvider
from megatron_bdpo.training.reporting.advice import Advisor, about_data
from megatron_bdpo.training.reporting.console import show
from megatron_bdpo.training.reporting.metrics_file import NAME, MetricsFile
from megatron_bdpo.training.reporting.progress import Progress
from megatron_bdpo.training.reporting.provenance import provenance
from megatron_bdpo.training.reporting.run_record import write_record
from megatron_bdpo.training.reporting.status import State, write_status
from megatron_bdpo.training.reporting.summary import summarize
from megatron_bdpo.training.retention import Deletion, Retention
from megatron_bdpo.training.setup import forget_global_state, set_up
from megatron_bdpo.training.step_zero import StepZeroGate
from megatron_bdpo.training.stopping import StopRequest
from megatron_bdpo.training.timetable import Timetable


class PreferenceRun:
    """Owns what is between Megatron's trainer and our parts; implements ``platform.seams.TrainerHooks``.

    Attributes:
        args: Megatron's arguments, validated.
        job: loss, pairs and plan.
        model: the policy's chunks, once they are loaded.
        scoring: how positions are scored; its vocabulary is the tokenizer's.
        progress: metrics of steps and evaluations, filled on the last pipeline stage.
        stop: whether the run has been asked to stop, and why.
    """

    def __init__(self, arguments: Arguments) -> None:
        """Read pairs, plan steps, validate Megatron's arguments. Collective.

        Raises:
            UserError: on every rank.
        """
        self.arguments = arguments
        self._setup = set_up(arguments)
        self.settings = settings = self._setup.settings
        self.job, self.scoring, self._identity = self._setup.job, self._setup.scoring, self._setup.identity
        keep_recipe(arguments)
        advisor = Advisor(self.job.loss.requirements.reference)
        self.progress = Progress(settings.schedule.log_interval, settings.schedule.train_iters or 0, advisor)
        self._step = PreferenceStep(
            self.job.loss,
            NoReference(),
            replace(self.scoring, entropy=settings.log_probs.log_entropy),
            check_nan=settings.schedule.check_finite,
            describe=self.job.pool.describe,
        )
        self.model: list[Any] = []
        self.stop = StopRequest(settings.checkpoints.stop_file or ())
        self._timetable = Timetable(arguments, is_saving)
        self._generations = Generations(settings, self.job, self.scoring.vocab_size, self.stop)
        arguments.set(
            exit_signal_handler=True, save_retain_interval=None
        )  # we delete checkpoints; now Megatron's loop asks after each step
        self._iteration = 0
        self._step_started = 0.0
        say(summarize(arguments, self.job))
        retention = Retention.of(settings)
        self._deletion = (
            Deletion(retention, Path(settings.directories.save or ""), is_saving)
            if retention and settings.process.rank == 0
            else None
        )
        for advice in about_data(self.job.pool.stores[0].report, self.job.plan):
            say(f"WARNING: {advice}")

    def pretrain(self) -> None:
        """Hand over to Megatron's trainer until the last step is done. Collective."""
        self._setup.add_initial_weights()
        try:
            with trainer_seams(self), self.stop.listening(signal.SIGTERM, self.settings.schedule.exit_signal):
                container = pretrain_cfg_container_from_args(self.arguments.megatron, self._setup.config)
                pretrain(container, self._dataset_provider(), ModelType.encoder_or_decoder, self._step)
            self._delete_outdated(wait=True)
            if self.settings.model.save_hf:
                save_live(
                    self.arguments, self.model, self.progress.evaluations[-1] if self.progress.evaluations else {}
                )
            self._report("finished")
        except SystemExit as leaving:
            if not leaving.code:
                self._delete_outdated(wait=True)
                self._report("stopped", self.stop.reason or "--exit-interval or --exit-duration-in-mins")
                say(self._farewell())
            else:
                say(self._given_up(leaving.code))
            raise
        finally:
            forget_global_state()

    def _delete_outdated(self, *, wait: bool = False) -> None:
        if self._deletion:
            self._deletion.finish() if wait else self._deletion.delete()

    def _report(self, state: State, reason: str = "") -> None:
        write_status(
            state,
            self.settings.directories.save,
            step=self._iteration,
            of=(self.settings.schedule.train_iters or 0),
            reason=reason,
        )

    def _farewell(self) -> str:
        reason = f" ({self.stop.reason})" if self.stop.reason else ""
        place = f"stopped{reason} after step {self._iteration} of {(self.settings.schedule.train_iters or 0)}"
        if not self.settings.directories.save:
            return f"{place}; no step was kept, for want of --save."
        return f"{place}; the same command with --load {self.settings.directories.save} goes on."

    def _given_up(self, code: object) -> str:
        """With --rerun-mode, Megatron ends a run whose numbers it does not trust."""
        step = self._iteration + 1
        return f"error: Megatron has ended the run in step {step} (exit code {code}); its log has the reason."

    def print_table(self) -> None:
        """Print held-out results and answers of before and after, from the last rank. After ``pretrain``."""
        for table in (self.progress.table(), self._generations.table()):
            if table and self.settings.process.rank == self.settings.process.ranks - 1:
                show("", table)

    # Data ------------------------------------------------------------------------------------------------------------

    def _dataset_provider(self) -> Callable[..., Any]:
        """What Megatron calls for its data: here, iterators on every rank, each for its own data-parallel part.

        It calls once for each virtual stage of the rank. All stages take the same packs, so they share what makes them:
        a pack is kept until the last stage has taken it.
        """
        stages = self.settings.layout.chunks

        @functools.cache  # made at the first call: then Megatron has its groups
        def iterators() -> list[tuple[Any, Any]]:
            train = itertools.tee(self._train_batches(), stages)
            held_out = (
                itertools.tee(self._eval_batches(), stages) if self.settings.schedule.eval_iters else [None] * stages
            )
            return list(zip(train, held_out, strict=True))

        def provide(num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, None]:
            return *iterators()[vp_stage or 0], None

        provide.is_distributed = True  # type: ignore[attr-defined]
        return provide

    def _train_batches(self) -> Iterator[PackBatch]:
        plan, rank = self.job.plan, parallel_state.get_data_parallel_rank()

        def packs(index: int) -> tuple[IntArray, int]:
            step, microbatch = divmod(index, plan.microbatches)
            return plan.packs(step, rank)[microbatch], int(plan.lengths[step, microbatch])

        # The position is the step, whatever the layout was when the checkpoint was written.
        first = self.arguments.iteration * plan.microbatches
        order = iter(range(first, len(plan.steps) * plan.microbatches))
        return self._iterate(packs, order, workers=self.settings.schedule.num_workers)

    def _eval_batches(self) -> Iterator[PackBatch]:
        own = self.job.eval_packs[parallel_state.get_data_parallel_rank() :: self.job.plan.data_parallel]
        order = itertools.cycle(range(len(own)))
        # Processes of their own would wait through the training for packs that are made in milliseconds.
        return self._iterate(lambda index: (own[index], self.job.eval_length), order, workers=0)

    def _iterate(self, packs: Packs, order: Iterator[int], workers: int) -> Iterator[PackBatch]:
        make = self.job.pack_maker(context_rank())
        return iterate_packs(packs, order, make, workers=workers, pin=not cpu.is_active())

    # TrainerHooks ----------------------------------------------------------------------------------------------------

    def after_load(self, model: list[Any]) -> None:
        """The policy holds its weights: settle the reference and what checkpoints will say about this run."""
        self.model = model
        self._iteration = self.arguments.iteration
        resumed = self._iteration > 0
        provider = ReferenceProvider(self._setup, self._pairs_in_use(), pause=self.stop.leave_if_asked)
        self._step.reference, self._identity = provider.provide(model, self._identity, resumed=resumed)
        if isinstance(self._step.reference, ReferenceTable):
            self._settle(self._step.reference, resumed=resumed)
        self.arguments.set(**identity.identity_argument(self._identity))
        if self._deletion:
            is_own = resumed and self.settings.directories.goes_on_in_place
            self._deletion.begin(self._iteration if is_own else None, self._identity.reference_weights)
        with all_ranks_agree():
            if self.settings.directories.save and self.settings.process.rank == self.settings.process.ranks - 1:
                self._begin_files(Path(self.settings.directories.save))
        for chunk in unwrap_model(model):  # after the reference has been built from the same configuration
            chunk.config.moe_grad_scale_func = functools.partial(self._auxiliary_loss_scale, chunk.config)
        if self.settings.reference.step_zero_check and not resumed and self.job.loss.requirements.reference:
            self._step.gate = StepZeroGate(self.settings.precision)

    def _begin_files(self, save: Path) -> None:
        """What the rank with the metrics writes beside the checkpoints, for people's own tools."""
        reference, edges = self._step.reference, self._step.imbalance_edges
        write_record(
            save,
            {
                "loss": self.job.loss.spec.name,
                "loss_options": asdict(self.job.loss.options),
                "pairs": {"train": len(self.job.train.ids), "heldout": len(self.job.held_out.ids)},
                "reference_scores": reference.directories if isinstance(reference, ReferenceTable) else {},
                "imbalance_quartiles": None if edges is None else edges.tolist(),
                **provenance(self.arguments, self.job, self._identity),
            },
        )
        self.progress.file = MetricsFile(save / NAME, self._iteration)
        self._generations.begin(save, self._iteration)

    def _pairs_in_use(self) -> IntArray:
        if not self.settings.schedule.eval_iters:
            return self.job.pairs_in_use(None)
        return self.job.pairs_in_use(
            0
            if self.settings.evaluation.eval_at_start
            else self.settings.schedule.eval_interval or (self.settings.schedule.train_iters or 0)
        )

    def _settle(self, reference: ReferenceTable, *, resumed: bool) -> None:
        """What follows from the reference's values: options of the loss, quartiles. A resumed run keeps its start's."""
        kept, kept_edges = (self._identity.settled, self._identity.imbalance_edges) if resumed else ({}, [])
        pairs, of = reference.training_pairs(self.job), len(self.job.train.ids)
        loss, settled = decide_options(self.job.loss, pairs, of, kept)
        edges = imbalance_edges(loss, pairs, of, kept_edges)
        self._step.loss, self.job = loss, replace(self.job, loss=loss)
        self._step.imbalance_edges = torch.tensor(edges, dtype=torch.float64).cuda() if edges else None
        self._identity = replace(self._identity, settled=settled, imbalance_edges=edges)

    def _auxiliary_loss_scale(self, config: Any) -> Tensor:
        """What the router's losses of this step are multiplied by: see ``model.moe``."""
        # An evaluation may follow the last step; it asks too, although nothing is scaled there.
        pairs = self.job.plan.steps[min(self._iteration, len(self.job.plan.steps) - 1)]
        tokens = group_tokens(self.job.pool.lengths[pairs], share_prompts=self.job.share_prompts).sum()
        one = torch.ones(1, device=torch.cuda.current_device())
        return (config.grad_scale_func(one) if config.grad_scale_func else one) * (len(pairs) / tokens)

    def before_training(self, evaluate: Callable[[], Any]) -> None:
        """Megatron's loop is about to start."""
        self._report("running")
        self._timetable.begin()
        self.stop.leave_if_asked()
        if self.settings.evaluation.eval_at_start and self.settings.schedule.eval_iters and self._iteration == 0:
            gate, self._step.gate = self._step.gate, None
            with weights_at_rest(self.model):
                evaluate()
            self._step.gate = gate

    def wrap_schedule(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """Give each step the length of its packs, time it, and let a resident reference score before it."""
        reference = self._step.reference
        inner = reference.wrap(schedule) if isinstance(reference, ResidentReference) else schedule

        def run(*args: Any, seq_length: int, forward_only: bool = False, **kwargs: Any) -> Any:
            if not forward_only:
                self._step_started = time.perf_counter()
            # Megatron's own is that of the longest pack. Without pipeline stages nobody reads it; with them a step's
            # packs have one length, of which every stage knows what it sends and receives.
            seq_length = self.job.eval_length if forward_only else int(self.job.plan.lengths[self._iteration, 0])
            with gradients_named(self._iteration + 1, self._pairs_of_step, self.job.pool.describe):
                return inner(*args, seq_length=seq_length, forward_only=forward_only, **kwargs)

        return run

    def work_of_step(self) -> tuple[float, float]:
        """What the step has in tokens and in squares of sequence lengths, for Megatron's count of operations."""
        pairs = self.job.plan.steps[self._iteration]
        tokens = float(self.job.plan.real_tokens[self._iteration])
        return tokens, float(causal_squares(self.job.pool.lengths[pairs], share_prompts=self.job.share_prompts).sum())

    def after_step(self, losses: dict[str, Tensor], iteration: int, skipped: bool) -> None:
        """Report the step; after the first one, judge it."""
        self._iteration = iteration
        if self._step.gate is not None:
            say(self._step.gate.judge())
            self._step.gate = None
        plan = self.job.plan
        self.progress.step(
            losses,
            iteration,
            skipped=skipped,
            seconds=time.perf_counter() - self._step_started,
            pairs=plan.steps.shape[1],
            tokens=int(plan.real_tokens[iteration - 1]),
        )
        self._delete_outdated()
        self._timetable.after_step(iteration)

    def after_evaluation(self, metrics: dict[str, Tensor]) -> None:
        """Report the held-out pairs, and what the policy answers now."""
        self.progress.evaluation(metrics, self._iteration)
        self._generations.after_evaluation(self.model, self._iteration)
        self._timetable.evaluated()

    def after_update(self, grad_norm: float, iteration: int) -> None:
        """Stop before anything is saved of an update that was not finite."""
        if not math.isfinite(grad_norm):
            raise broken_gradient(
                f"norm {grad_norm}", iteration, self._pairs_of_step(iteration), self.job.pool.describe
            )

    def _pairs_of_step(self, iteration: int) -> IntArray:
        return self.job.plan.steps[iteration - 1]

    def saving(self, directory: Path) -> contextlib.AbstractContextManager[None]:
        """Weights that are not finite are not written, and a disk that is full is told of as one."""
        reject_broken_weights(self.model, directory)
        self._timetable.saving()
        return checkpoints.failures_to_save(directory)

    def finishing(self, directory: Path) -> contextlib.AbstractContextManager[None]:
        """What went wrong in the background is told as in :meth:`saving`."""
        return checkpoints.failures_to_save(directory)

    def after_files(self, directory: Path) -> None:
        """Leave the digests of the checkpoint's files."""
        if self.settings.checkpoints.checkpoint_checksums:
            checkpoints.write_manifest(directory)
        if self._deletion:
            self._deletion.written(directory)

    def signals_received(self) -> list[bool]:
        """Whether to stop after this step."""
        return self.stop.signals_received()


def is_saving() -> bool:
    """Whether a checkpoint of ``--async-save`` is still being written."""
    return not is_empty_async_queue()
