"""A tiny job that tells everything about its steps: token log-probs, gradients, and the weights before and after."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.harness.jobs import Shards, assemble, copy_shards, last_stage, run_job, seeded

#: Pair id -> token log-probs of its chosen and its rejected response.
TokenLogProbs = dict[int, tuple[np.ndarray, np.ndarray]]


@dataclass
class Step[Tensors]:
    """One optimizer step. ``Tensors`` are a rank's ``Shards``, or whole tensors by name."""

    weights: Tensors
    """Those that the step's log-probs and gradients belong to, from before its update."""
    gradients: Tensors
    """Of the mean loss over the step's pairs, reduced over all ranks."""
    tokens: TokenLogProbs
    """On the last pipeline stage."""
    metrics: dict[str, float]
    """On the last pipeline stage."""


def merge(ranks: list[list[Step[Shards]]]) -> list[Step[dict[str, np.ndarray]]]:
    """The steps of a job, from what its ranks have seen of them."""
    return [
        Step(
            assemble([seen.weights for seen in step]),
            assemble([seen.gradients for seen in step]),
            last_stage(step).tokens,
            last_stage(step).metrics,
        )
        for step in zip(*ranks, strict=True)
    ]


def train_and_record(flags: list[str], **overrides: Any) -> list[Step[Shards]]:
    """Run the tiny job as ``jobs.train`` does, in fp32 and without the distributed optimizer.

    Gradients are not clipped: that would change them before they are recorded.
    """
    run, _ = run_job(_recorded_run(), flags, {"clip_grad": 0.0} | overrides)
    metrics = run.progress.steps or [{}] * len(run.recorded)
    return [Step(*recorded, metrics=values) for recorded, values in zip(run.recorded, metrics, strict=True)]


def _recorded_run() -> type[Any]:
    from megatron.core.utils import unwrap_model

    from megatron_bdpo.model import pair_gpt
    from megatron_bdpo.training import forward
    from megatron_bdpo.training.run import PreferenceRun

    class RecordedRun(PreferenceRun):
        def pretrain(self) -> None:
            self.recorded: list[tuple[Shards, Shards, TokenLogProbs]] = []
            self.tokens: TokenLogProbs = {}
            score_pack = forward.score_pack

            def score_and_record(model: Any, batch: Any, vocab_size: int) -> Any:
                def record(tokens: torch.Tensor, scored: Any) -> torch.Tensor:
                    if tokens.requires_grad:  # not in a reference's pass
                        self.record_tokens(tokens, batch)
                    return sequence_log_probs(tokens, scored)

                sequence_log_probs = pair_gpt.sequence_log_probs
                with mock.patch.object(pair_gpt, "sequence_log_probs", record):
                    return score_pack(model, batch, vocab_size)

            with mock.patch.object(forward, "score_pack", score_and_record):
                super().pretrain()

        def record_tokens(self, tokens: torch.Tensor, batch: Any) -> None:
            answers = [part.numpy() for part in tokens.detach().split(batch.sequence_tokens.tolist())]
            pairs = zip(answers[0::2], answers[1::2], strict=True)
            self.tokens |= dict(zip(batch.pair_ids.tolist(), pairs, strict=True))

        def after_load(self, model: list[Any]) -> None:
            self.model = model
            redraw_vectors(unwrap_model(model))
            self.weights = copy_shards(model)
            super().after_load(model)

        def after_step(self, losses: Any, iteration: int, skipped: bool) -> None:
            super().after_step(losses, iteration, skipped)
            with gradients_in_place(self.model):
                gradients = copy_shards(self.model)
            self.recorded.append((self.weights, gradients, self.tokens))
            self.weights, self.tokens = copy_shards(self.model), {}

    return RecordedRun


def redraw_vectors(model: list[Any]) -> None:
    """Norm weights start at one and biases at zero: a model that swaps or forgets them would not be found out."""
    from megatron_bdpo.model.shards import weight_shards

    for shard in weight_shards(model):
        if shard.data.dim() == 1:
            shape = shard.global_shape[shard.prepend_axis_num :]
            layer = shard.global_offset[: shard.prepend_axis_num]
            noise = torch.randn(shape, generator=seeded(zlib.crc32(f"{shard.key} {layer}".encode())))
            shard.data.detach().add_(0.3 * noise[shard.global_slice()[shard.prepend_axis_num :]])


@contextlib.contextmanager
def gradients_in_place(model: list[Any]) -> Iterator[None]:
    """The model's weights are their gradients inside the block, so that what reads whole weights reads those.

    Megatron leaves ``main_grad`` as the optimizer has seen it until the next step begins.
    """
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad
    try:
        yield
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
