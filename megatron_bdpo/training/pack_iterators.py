"""What Megatron calls for its data: endless iterators over the packs of steps and evaluations."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core import parallel_state

from megatron_bdpo.data.context import ContextRank
from megatron_bdpo.platform import cpu
from megatron_bdpo.training.batches import IntArray, PackBatch, Packs, iterate_packs
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.job import PairJob


def context_rank() -> ContextRank:
    """This rank's place among those that share its packs. After Megatron has set up its groups."""
    return ContextRank(parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank())


def dataset_provider(arguments: Arguments, job: PairJob) -> Callable[..., Any]:
    """Megatron's ``train_valid_test_dataset_provider``: iterators on every rank, each for its own data-parallel part.

    It is called once for each virtual stage of the rank. All stages take the same packs, so they share what makes them:
    a pack is kept until the last stage has taken it.
    """
    schedule, stages = arguments.settings.schedule, arguments.settings.layout.chunks

    @functools.cache  # made at the first call: then Megatron has its groups, and has read its checkpoint
    def iterators() -> list[tuple[Any, Any]]:
        train = itertools.tee(_train_batches(job, arguments.iteration, schedule.num_workers), stages)
        held_out = itertools.tee(_eval_batches(job), stages) if schedule.eval_iters else [None] * stages
        return list(zip(train, held_out, strict=True))

    def provide(num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, None]:
        return *iterators()[vp_stage or 0], None

    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide


def _train_batches(job: PairJob, first_step: int, workers: int) -> Iterator[PackBatch]:
    plan, rank = job.plan, parallel_state.get_data_parallel_rank()

    def packs(index: int) -> tuple[IntArray, int]:
        step, microbatch = divmod(index, plan.microbatches)
        return plan.packs(step, rank)[microbatch], int(plan.lengths[step, microbatch])

    # The position is the step, whatever the layout was when the checkpoint was written.
    order = iter(range(first_step * plan.microbatches, len(plan.steps) * plan.microbatches))
    return _iterate(job, packs, order, workers)


def _eval_batches(job: PairJob) -> Iterator[PackBatch]:
    own = job.eval_packs[parallel_state.get_data_parallel_rank() :: job.plan.data_parallel]
    order = itertools.cycle(range(len(own)))
    # Processes of their own would wait through the training run for packs that are made in milliseconds.
    return _iterate(job, lambda index: (own[index], job.eval_length), order, workers=0)


def _iterate(job: PairJob, packs: Packs, order: Iterator[int], workers: int) -> Iterator[PackBatch]:
    return iterate_packs(packs, order, job.pack_maker(context_rank()), workers=workers, pin=not cpu.is_active())
