"""A tiny job that tells everything about its steps: log-probs, gradients, and the weights before and after."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.harness.jobs import Shards, assemble, copy_shards, last_stage, run_job, seeded

#: Pair id -> log-probs of the tokens of its chosen and its rejected response.
TokenLogProbs = dict[int, tuple[np.ndarray, np.ndarray]]

#: Pair id -> log-probs of chosen and rejected, [n, 2]: the policy's and, where known, reference and unconditional ones
#: and what else the loss reads.
SequenceLogProbs = dict[int, np.ndarray]

Mistake = Callable[[contextlib.ExitStack], None]
"""Breaks the code for as long as the stack is not unwound."""


@dataclass
class Step[Tensors]:
    """One optimizer step. ``Tensors`` are a rank's ``Shards``, or whole tensors by name."""

    weights: Tensors
    """Those that the step's log-probs and gradients belong to, from before its update."""
    gradients: Tensors
    """Of the mean loss over the step's pairs, reduced over all ranks, before they are clipped."""
    tokens: TokenLogProbs
    """Of the last pipeline stage; with context parallelism of this rank's positions."""
    sequences: list[SequenceLogProbs]
    """What each rank of the last pipeline stage has."""
    metrics: dict[str, float]
    """On the last pipeline stage."""


@dataclass
class Recording[Tensors]:
    """A finished job."""

    steps: list[Step[Tensors]]
    weights: Tensors
    """After the last step."""


WholeTensors = dict[str, np.ndarray]


def merge(ranks: list[Recording[Shards]]) -> Recording[WholeTensors]:
    """The job as a whole, from what its ranks have seen of it."""
    steps = [
        Step(
            assemble(seen.weights for seen in step),
            assemble(seen.gradients for seen in step),
            last_stage(step).tokens,
            [own for seen in step for own in seen.sequences if own],
            last_stage(step).metrics,
        )
        for step in zip(*(rank.steps for rank in ranks), strict=True)
    ]
    return Recording(steps, assemble(rank.weights for rank in ranks))


def train_and_record(
    flags: list[str], *, mistake: Mistake | None = None, redraw: bool = True, **overrides: Any
) -> Recording[Shards]:
    """Run the tiny job on this rank as ``jobs.train`` does, perhaps with a mistake in the code.

    Gradients are not clipped unless a flag says so.

    Args:
        redraw: draw initial norms and biases at random.
    """
    with contextlib.ExitStack() as undo:
        if mistake is not None:
            mistake(undo)
        run, _ = run_job(flags, {"clip_grad": 0.0} | overrides, run_type=_recorded_run(redraw))
    metrics = run.progress.steps or [{}] * len(run.seen)
    steps = [
        Step(seen.weights, seen.gradients, seen.tokens, [seen.sequences], values)
        for seen, values in zip(run.seen, metrics, strict=True)
    ]
    return Recording(steps, run.weights)


@dataclass
class _Seen:
    """What a rank sees of a step while it runs."""

    weights: Shards
    gradients: Shards = field(default_factory=list)
    tokens: TokenLogProbs = field(default_factory=dict)
    sequences: SequenceLogProbs = field(default_factory=dict)


def _recorded_run(redraw: bool) -> type[Any]:
    from megatron.core.utils import unwrap_model

    from megatron_bdpo.training.run import PreferenceRun

    class RecordedRun(PreferenceRun):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.seen: list[_Seen] = []

        def pretrain(self) -> None:
            with _token_log_probs_told(self._record_tokens), _pairs_told(self._record_pairs):
                super().pretrain()

        def _record_tokens(self, tokens: torch.Tensor, batch: Any) -> None:
            own = batch.over_answers(batch.scored.answer_tokens)
            answers = [part.numpy() for part in tokens.split(own.tolist())]
            pairs = [(answers[chosen], answers[rejected]) for chosen, rejected in batch.pairs.answers.tolist()]
            self.now.tokens |= dict(zip(batch.pairs.ids.tolist(), pairs, strict=True))

        def _record_pairs(self, batch: Any, policy: torch.Tensor, *others: torch.Tensor | None) -> None:
            known = [policy[batch.pairs.answers], *(other for other in others if other is not None)]
            by_pair = torch.stack(known, dim=1).detach().numpy()
            self.now.sequences |= dict(zip(batch.pairs.ids.tolist(), by_pair, strict=True))

        def after_load(self, model: list[Any]) -> None:
            self.model = model
            if redraw:
                redraw_vectors(unwrap_model(model))
            self.now = _Seen(copy_shards(model))
            super().after_load(model)

        def wrap_schedule(self, schedule: Any) -> Any:
            inner = super().wrap_schedule(schedule)

            def run(*args: Any, forward_only: bool = False, **kwargs: Any) -> Any:
                result = inner(*args, forward_only=forward_only, **kwargs)
                if not forward_only:
                    with gradients_in_place(self.model):
                        self.now.gradients = copy_shards(self.model, trained=True)
                return result

            return run

        def after_step(self, losses: Any, iteration: int, skipped: bool) -> None:
            super().after_step(losses, iteration, skipped)
            self.weights = copy_shards(_gathered(self.model))
            self.seen.append(self.now)
            self.now = _Seen(self.weights)

    return RecordedRun


@contextlib.contextmanager
def _token_log_probs_told(tell: Callable[[torch.Tensor, Any], None]) -> Iterator[None]:
    """Inside the block, ``tell(token log-probs, batch)`` is called in every training pass of the last stage."""
    from megatron_bdpo.model import pair_gpt
    from megatron_bdpo.training import forward

    score_pack, answer_log_probs = forward.score_pack, pair_gpt.answer_log_probs

    def score(model: Any, batch: Any, *args: Any) -> Any:
        def add(tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
            if tokens.requires_grad:  # not in a reference's pass
                tell(tokens.detach(), batch)
            return answer_log_probs(tokens, *rest)

        with mock.patch.object(pair_gpt, "answer_log_probs", add):
            return score_pack(model, batch, *args)

    with mock.patch.object(forward, "score_pack", score):
        yield


@contextlib.contextmanager
def _pairs_told(tell: Callable[..., None]) -> Iterator[None]:
    """Inside the block, ``tell`` gets in every training pass what ``pairs_of`` gets, or what is in its place for losses
    of groups and of answers."""
    from megatron_bdpo.training import answer_step, forward, group_step

    with contextlib.ExitStack() as undo:
        for module, name in ((forward, "pairs_of"), (group_step, "groups_of"), (answer_step, "answers_of")):
            undo.enter_context(mock.patch.object(module, name, _told(getattr(module, name), tell)))
        yield


def _told(function: Callable[..., Any], tell: Callable[..., None]) -> Callable[..., Any]:
    def told(batch: Any, policy: torch.Tensor, *others: torch.Tensor | None) -> Any:
        if policy.requires_grad:  # not in an evaluation
            tell(batch, policy, *others)
        return function(batch, policy, *others)

    return told


def redraw_vectors(model: list[Any]) -> None:
    """Norm weights start at one and biases at zero: a model that swaps or forgets them would not be found out."""
    from megatron_bdpo.model.shards import own_slices, weight_shards

    for shard in weight_shards(model):
        if shard.data.dim() == 1:
            shape = shard.global_shape[shard.prepend_axis_num :]
            layer = shard.global_offset[: shard.prepend_axis_num]
            noise = torch.randn(shape, generator=seeded(zlib.crc32(f"{shard.key} {layer}".encode())))
            shard.data.detach().add_(0.3 * noise[own_slices(shard)])


def _gathered(model: list[Any]) -> list[Any]:
    """The model with all its weights: with --overlap-param-gather those of a step come with the next forward pass."""
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return model


@contextlib.contextmanager
def gradients_in_place(model: list[Any]) -> Iterator[None]:
    """The model's weights are their gradients inside the block, so that what reads whole weights reads those.

    Collective. Between backward and optimizer, ``main_grad`` is what the optimizer will see.
    """
    for chunk in model:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            _complete(buffer)
    parameters = [parameter for chunk in model for parameter in chunk.parameters() if parameter.requires_grad]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.to(parameter.dtype)
    try:
        yield
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight


def _complete(buffer: Any) -> None:
    """With the distributed optimizer each rank has reduced its own part of the gradients: gather the others'."""
    if not buffer.ddp_config.use_distributed_optimizer:
        return
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        own = bucket.grad_data.view(-1).chunk(group.size())[group.rank()].clone()
        torch.distributed.all_gather_into_tensor(bucket.grad_data.view(-1), own, group=group)
