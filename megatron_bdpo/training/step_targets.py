"""Losses whose pairs hang on one another: what each pair needs of its whole step, before the step's gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_bdpo.losses import LossFunction, PairLogProbs
from megatron_bdpo.training.batches import IntArray, PackBatch
from megatron_bdpo.training.forward import ReferenceValues, ScoringStep, forward_only, looking_ahead
from megatron_bdpo.training.job import PairJob


class SortedStep:
    """A pass of the policy over the step's microbatches just before it: ``LossSpec.step_targets`` is asked about it.

    Attributes:
        job: with the plan of the steps.
        loss: its ``step_targets`` is asked.
        reference: has scored the step's microbatches already.
        step: a forward step that collects [P, 2] of each pack's pairs.
    """

    def __init__(self, job: PairJob, loss: LossFunction, reference: ReferenceValues, step: ScoringStep) -> None:
        self.job, self.loss, self.reference, self.step = job, loss, reference, step
        self._targets: dict[bytes, tuple[Tensor, Tensor]] = {}

    def lookup(self, batch: PackBatch) -> tuple[Tensor, Tensor]:
        """See ``forward.StepTargets``."""
        return self._targets[batch.pairs.key]

    def wrap(self, schedule: Callable[..., Any], model: list[Any], done: Callable[[], int]) -> Callable[..., Any]:
        """A schedule that makes this pass first. Where it only evaluates, it runs as before.

        Args:
            model: the policy's chunks.
            done: says how many steps are done.
        """

        def look(batches: list[list[PackBatch]]) -> list[Iterator[PackBatch]]:
            self._look(batches, model, done())
            return [iter(chunk) for chunk in batches]

        training = looking_ahead(schedule, look)

        def run(*args: Any, forward_only: bool = False, **kwargs: Any) -> Any:
            return (schedule if forward_only else training)(*args, forward_only=forward_only, **kwargs)

        return run

    def _look(self, batches: list[list[PackBatch]], model: list[Any], step: int) -> None:
        iterators = [iter(chunk) for chunk in batches]
        scores = forward_only(model, self.step, iterators, len(batches[0]), batches[0][0].length)
        if not scores:  # not the last stage, which alone has a loss
            return
        own = [
            _columns(batch, score, self.reference.lookup(batch).conditional)
            for batch, score in zip(batches[-1], scores, strict=True)
        ]
        start, everyone = self._gathered(torch.cat(own), step)
        tokens, policy, *reference = everyone.unflatten(1, (-1, 2)).unbind(1)
        pairs = PairLogProbs.of_pairs(tokens, policy, *reference)
        assert self.loss.spec.step_targets is not None
        targets = self.loss.spec.step_targets(pairs, self.loss.options)
        counts = [len(each) for each in own]
        chosen, rejected = (each[start : start + sum(counts)].split(counts) for each in targets)
        keys = [batch.pairs.key for batch in batches[-1]]
        self._targets = dict(zip(keys, zip(chosen, rejected, strict=True), strict=True))

    def _gathered(self, own: Tensor, step: int) -> tuple[int, Tensor]:
        """[p, columns] -> where this rank's rows begin in those of all data-parallel ranks, and these."""
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        counts = [self._pairs_of(step, each) for each in range(ranks)]
        start = sum(counts[:rank])
        everyone = own.new_zeros((sum(counts), own.shape[1]))
        everyone[start : start + len(own)] = own
        torch.distributed.all_reduce(everyone, group=parallel_state.get_data_parallel_group())
        return start, everyone

    def _pairs_of(self, step: int, rank: int) -> int:
        """The number of pairs in a rank's packs."""
        groups: IntArray = np.concatenate(self.job.plan.packs(step, rank))
        return len(self.job.pool.grouping.pairs_of(groups))


def _columns(batch: PackBatch, policy: Tensor, reference: Tensor | None) -> Tensor:
    """[P, 4 or 6] float64: tokens, policy's and reference's log-probs of chosen and rejected."""
    tokens = batch.answer_tokens[batch.pairs.answers].double().pin_memory().cuda(non_blocking=True)
    return torch.cat([tokens, policy, *([] if reference is None else [reference])], dim=1)
