"""The callbacks of every run, in their order, and those that other packages bring."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from megatron.training.async_utils import is_empty_async_queue

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.callbacks.answers import Answers
from megatron_bdpo.training.callbacks.base import Callback
from megatron_bdpo.training.callbacks.checksums import Checksums
from megatron_bdpo.training.callbacks.export_at_end import ExportAtEnd
from megatron_bdpo.training.callbacks.finite_check import FiniteCheck
from megatron_bdpo.training.callbacks.progress import Progress
from megatron_bdpo.training.callbacks.record import RunRecord
from megatron_bdpo.training.callbacks.retention import Deletion, Retention
from megatron_bdpo.training.callbacks.status_file import StatusFile
from megatron_bdpo.training.callbacks.step_zero_check import StepZeroCheck
from megatron_bdpo.training.callbacks.timetable import Timetable
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.forward import PreferenceStep
from megatron_bdpo.training.setup import RunSetup
from megatron_bdpo.training.stopping import StopRequest

#: Each of this group is called with the job's ``Settings`` and ``PairJob``, and returns a ``Callback``.
ENTRY_POINT_GROUP = "megatron_bdpo.callbacks"


def standard_callbacks(setup: RunSetup, step: PreferenceStep, progress: Progress, stop: StopRequest) -> list[Callback]:
    """All of a run, in the order in which they are told of a moment.

    Args:
        step: the run's forward step.
        progress: first of those that report.
    """
    arguments, settings, job = setup.arguments, setup.settings, setup.job
    found: list[Callback] = []
    if settings.reference.step_zero_check and job.loss.requirements.reference:
        found.append(StepZeroCheck(step, settings.precision))
    found += [
        FiniteCheck(job.pairs_of_step, job.pool.describe),
        RunRecord(arguments, job),
        progress,
        Answers(settings, job, setup.scoring.vocab_size, stop),
        Checksums(wanted=settings.checkpoints.checkpoint_checksums),
        *_deletion(arguments),
        Timetable(arguments, is_writing),
        *of_other_packages(setup),
    ]
    if settings.model.save_hf:
        found.append(ExportAtEnd(arguments, progress.evaluations))
    # Last: a run that is said to be finished has all that it leaves.
    return [*found, StatusFile(settings.directories.save, len(job.plan.steps))]


def _deletion(arguments: Arguments) -> Iterator[Callback]:
    settings = arguments.settings
    directories, retention = settings.directories, Retention.of(settings)
    if retention and directories.save and settings.process.rank == 0:
        in_place = directories.goes_on_in_place
        yield Deletion(retention, Path(directories.save), is_writing, goes_on_in_place=in_place)


def of_other_packages(setup: RunSetup) -> Iterator[Callback]:
    """Those of the entry points.

    Raises:
        UserError: one cannot be made; the message names its distribution.
    """
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            callback = point.load()(setup.settings, setup.job)
            if not isinstance(callback, Callback):
                raise TypeError(f"it returns a {type(callback).__name__}, which is no Callback")
        except Exception as error:  # third-party code may raise anything
            provider = f"distribution '{point.dist.name}'" if point.dist else "an unnamed distribution"
            raise UserError(
                f"{provider} offers the callback '{point.name}' ({point.value}), but it cannot be used: "
                f"{type(error).__name__}: {error}. Repair or uninstall it."
            ) from error
        yield callback


def is_writing() -> bool:
    """Whether a checkpoint of ``--async-save`` is still being written."""
    return not is_empty_async_queue()
