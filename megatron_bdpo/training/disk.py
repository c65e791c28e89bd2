"""What a job needs on its disks: told by a dry run, and compared with what is free before a run begins."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bdpo.errors import UserError
from megatron_bdpo.planning.memory import GB
from megatron_bdpo.planning.storage import Saves, checkpoint_bytes, parameters
from megatron_bdpo.training.checkpoints import is_complete, iteration_of, named_iteration
from megatron_bdpo.training.distributed import all_ranks_agree, is_rank_zero
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.hf.exporting import export_places
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.job_memory import job_shape, model_shape
from megatron_bdpo.training.settings import Settings
from megatron_bdpo.training.token_stores import cache_directory

#: Of a pair's scores, see ``reference.cache``.
_BYTES_OF_SCORES = 50


@dataclass(frozen=True)
class Need:
    """Something that a job writes."""

    what: str
    place: Path
    bytes: int
    """That are still to come."""


def refuse_small_disks(arguments: Arguments, job: PairJob) -> None:
    """Collective.

    Raises:
        UserError: on every rank; a file system has not the room for what the job is going to write on it.
    """
    with all_ranks_agree():
        if is_rank_zero() and (missing := too_small(wanted := needs(arguments, job))):
            fewer = ", keep fewer (--keep-checkpoints)" if any("checkpoints" in each.what for each in wanted) else ""
            raise UserError(f"{'; '.join(missing)}. Make room{fewer}, or name another place.")


def needs(arguments: Arguments, job: PairJob) -> list[Need]:
    """What the job is going to write, from validated arguments; nothing where its model is not estimated."""
    settings = arguments.settings
    try:
        model, shape = model_shape(arguments), job_shape(settings, job)
    except UserError:
        return []
    found = []
    save = settings.directories.save
    if save:
        size = checkpoint_bytes(model, shape, optimizer=not arguments.megatron.no_save_optim)
        if settings.reference.sync_reference_every:
            size += parameters(model, shape) * shape.weight_bytes
        found.append(_checkpoints(settings, Path(save), size, len(job.plan.steps)))
    for name, place in export_places(settings).items():
        if not place.exists() and not (settings.lora.is_wanted and name == "save_hf"):
            found.append(Need(f"{name.replace('_', '-')}", place, parameters(model, shape) * shape.weight_bytes))
    if not job.resident:
        cache = settings.reference.reference_cache
        place = Path(cache) if cache else cache_directory(settings)
        pairs = job.training_pairs + len(job.pool.grouping.pairs_of(job.held_out.ids))
        found.append(Need("reference scores", place, _BYTES_OF_SCORES * pairs))
    return found


def too_small(wanted: Sequence[Need]) -> list[str]:
    """A line for each file system that has not the room."""
    found = []
    for needs_there in _by_device(wanted).values():
        total, free = sum(each.bytes for each in needs_there), _free(needs_there[0].place)
        if total > free:
            parts = ", ".join(f"{each.what} {_amount(each.bytes)}" for each in needs_there)
            found.append(f"{needs_there[0].place}: the disk has {_amount(free)} left, and the run needs {parts}")
    return found


def describe(wanted: Sequence[Need], job: PairJob) -> list[str]:
    """For a dry run."""
    stores = sum(file.stat().st_size for store in job.pool.stores for file in store.directory.iterdir())
    lines = [f"disk: tokens {_amount(stores)}, there already"]
    for needs_there in _by_device(wanted).values():
        total, free = sum(each.bytes for each in needs_there), _free(needs_there[0].place)
        parts = ", ".join(f"{each.what} {_amount(each.bytes)}" for each in needs_there)
        enough = "" if total <= free else ": TOO LITTLE, a start would be refused"
        lines.append(f"disk of {needs_there[0].place}: {parts}; {_amount(free)} free here{enough}")
    return lines


def _checkpoints(settings: Settings, save: Path, size: int, steps: int) -> Need:
    directories, checkpoints = settings.directories, settings.checkpoints
    by_clock = checkpoints.save_every_minutes is not None
    every = directories.save_retain_interval
    newest = checkpoints.keep_checkpoints or (1 if every else None)
    interval = None if by_clock else directories.save_interval
    done = (named_iteration(save) or 0) if directories.goes_on_in_place else 0
    most = Saves(steps=steps, interval=interval, newest=newest, every=every).most_at_once(done)
    there = _own(save) if directories.goes_on_in_place else 0
    if most is None:
        return Need("checkpoints (all of which stay) at least one of", save, size)
    what = f"checkpoints ({most} of {_amount(size)}{f', {there} there' if there else ''})"
    # One is written before any other goes.
    to_come = max(most - there, 1) if most else 0
    return Need(what, save, to_come * size)


def _own(save: Path) -> int:
    return sum(iteration_of(path) is not None and is_complete(path) for path in save.iterdir())


def _by_device(wanted: Sequence[Need]) -> dict[int, list[Need]]:
    found: dict[int, list[Need]] = {}
    for each in wanted:
        found.setdefault(_existing(each.place).stat().st_dev, []).append(each)
    return found


def _existing(place: Path) -> Path:
    place = place.absolute()
    return next(each for each in (place, *place.parents) if each.exists())


def _free(place: Path) -> int:
    """That this user may fill; a quota is not asked for."""
    return shutil.disk_usage(_existing(place)).free


def _amount(size: int) -> str:
    unit, name = next(((unit, name) for unit, name in _UNITS if size >= unit / 10), (1e3, "kB"))
    return f"{size / unit:,.1f} {name}"


_UNITS = ((GB, "GB"), (1e6, "MB"))
