"""The callbacks of every run, in their order: the one place that knows which settings each of them needs."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from megatron.training.async_utils import is_empty_async_queue

from megatron_bdpo.data.labels import labelled_sides
from megatron_bdpo.training.callbacks.callback import Callback
from megatron_bdpo.training.callbacks.checksums import Checksums
from megatron_bdpo.training.callbacks.console_lines import ConsoleLines
from megatron_bdpo.training.callbacks.divergence import Divergence
from megatron_bdpo.training.callbacks.entry_points import callbacks_of_packages
from megatron_bdpo.training.callbacks.export_at_end import ExportAtEnd
from megatron_bdpo.training.callbacks.finite_check import FiniteCheck
from megatron_bdpo.training.callbacks.generated_answers import Answers
from megatron_bdpo.training.callbacks.heldout_pairs import HeldOutPairs
from megatron_bdpo.training.callbacks.metrics_jsonl import MetricsJsonl
from megatron_bdpo.training.callbacks.moving_reference import MovingReference
from megatron_bdpo.training.callbacks.progress import Progress
from megatron_bdpo.training.callbacks.record import RunRecord
from megatron_bdpo.training.callbacks.retention import Deletion, Retention
from megatron_bdpo.training.callbacks.scalars import Scalars
from megatron_bdpo.training.callbacks.status_file import StatusFile
from megatron_bdpo.training.callbacks.step_zero_check import StepZeroCheck
from megatron_bdpo.training.callbacks.timetable import Interval, Timetable
from megatron_bdpo.training.forward import PreferenceStep
from megatron_bdpo.training.generation.decoding import PackShape
from megatron_bdpo.training.hf.exporting import export_places, save_live
from megatron_bdpo.training.hf.pushing import push_export
from megatron_bdpo.training.reporting.advice import Advisor
from megatron_bdpo.training.reporting.loggers.logger import LoggedRun, Logger
from megatron_bdpo.training.reporting.loggers.opening import open_loggers
from megatron_bdpo.training.reporting.provenance import provenance
from megatron_bdpo.training.settings import Settings
from megatron_bdpo.training.setup import RunSetup
from megatron_bdpo.training.stopping import StopRequest


def standard_callbacks(setup: RunSetup, step: PreferenceStep, progress: Progress, stop: StopRequest) -> list[Callback]:
    """All of a run, in the order in which they are told of a moment. Collective.

    Args:
        step: the run's forward step.
        progress: first of those that report.

    Raises:
        UserError: on every rank; what another package offers cannot be used.
    """
    settings, job, save = setup.settings, setup.job, setup.settings.directories.save
    reads_reference = job.loss.requirements.reference
    shape = PackShape(job.max_pack_length, settings.length_unit, job.fixed_length)
    found: list[Callback] = []
    if settings.reference.step_zero_check and reads_reference and _starts_as_its_reference(settings):
        found.append(StepZeroCheck(step, settings.precision))
    if every := settings.reference.sync_reference_every:
        mix = settings.reference.sync_reference_mix
        found.append(MovingReference(step, every, 1.0 if mix is None else mix))
    suspect = step.suspect
    found += [FiniteCheck(job.groups_of_step, job.pool.describe_group, suspect), Divergence(suspect)]
    held_out = job.pool.grouping.pairs_of(job.held_out.ids)
    if save:
        pairs = {"train": job.training_pairs, "heldout": len(held_out)}
        found.append(RunRecord(Path(save), pairs, functools.partial(provenance, setup.arguments, job)))
    found += [progress, Scalars(functools.partial(_loggers, setup))]
    if save:
        found.append(MetricsJsonl(Path(save)))
        tokens = np.where(labelled_sides(job.pool.pairs.label[held_out]), job.pool.pairs.scored[held_out], 0)
        found.append(HeldOutPairs(step, held_out, tokens, Path(save)))
    found += [
        ConsoleLines(progress.interval, Advisor(reads_reference), wide=settings.output.log_wide),
        Answers(job.prompts, shape, setup.scoring.vocab_size, save, stop),
        Checksums(wanted=settings.checkpoints.checkpoint_checksums),
        *_deletion(setup),
        _timetable(setup),
        *callbacks_of_packages(settings, job),
    ]
    if export_places(settings):
        export = functools.partial(save_live, setup.arguments, setup.lora, pause=stop.leave_if_asked)
        found.append(ExportAtEnd(export, functools.partial(push_export, settings)))
    # Last: a run that is said to be finished has all that it leaves.
    return [*found, StatusFile(save, len(job.plan.steps))]


def _starts_as_its_reference(settings: Settings) -> bool:
    """Whether the policy is its reference before the first step."""
    directories = settings.directories
    has_adapters = settings.lora.lora_start or (settings.lora.is_wanted and directories.finetune and directories.load)
    return not (settings.reference.reference_model or has_adapters)


def _loggers(setup: RunSetup, resumed: bool) -> list[Logger]:
    save = setup.settings.directories.save
    directory = Path(save) if save else None
    run = LoggedRun(directory.resolve().name if directory else "", setup.arguments.recipe, directory, resumed)
    return open_loggers(setup.settings.output, run)


def _deletion(setup: RunSetup) -> list[Callback]:
    """None where all checkpoints stay."""
    directories, newest = setup.settings.directories, setup.settings.checkpoints.keep_checkpoints
    every = directories.save_retain_interval
    if not directories.save or (every is None and newest is None):
        return []
    retention, root = Retention(newest or 1, every), Path(directories.save)
    return [Deletion(retention, root, is_writing, goes_on_in_place=directories.goes_on_in_place)]


def _timetable(setup: RunSetup) -> Timetable:
    settings = setup.settings
    directories, schedule = settings.directories, settings.schedule
    save_minutes = settings.checkpoints.save_every_minutes if directories.save else None
    eval_minutes = settings.evaluation.eval_every_minutes if schedule.eval_iters else None
    return Timetable(
        Interval("save_interval", directories.save_interval, save_minutes),
        Interval("eval_interval", schedule.eval_interval, eval_minutes),
        len(setup.job.plan.steps),
        set_arguments=setup.arguments.set,
        is_writing=is_writing,
    )


def is_writing() -> bool:
    """Whether a checkpoint of ``--async-save`` is still being written."""
    return not is_empty_async_queue()
