"""Packs are as long as a step needs: what Megatron is told of it, and that the numbers do not change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.harness.jobs import last_stage, run_job

FLAGS = ["--pairs-per-step", "2", "--train-iters", "5", "--eval-share", "0.1", "--eval-interval", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]


@dataclass
class Seen:
    """On one rank."""

    lengths: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0))
    """[steps, microbatches] as planned."""
    tokens: list[int] = field(default_factory=list)
    """As planned, of each step."""
    eval_length: int = 0
    trained: list[int] = field(default_factory=list)
    """The lengths that the schedule was called with."""
    evaluated: list[int] = field(default_factory=list)
    counted: list[float] = field(default_factory=list)
    """The tokens that Megatron's count of operations was called with."""
    steps: list[dict[str, float]] = field(default_factory=list)


def train_and_watch(flags: list[str]) -> Seen:
    import megatron.training.training as trainer

    from megatron_bdpo.training.run import PreferenceRun

    seen, count = Seen(), trainer.num_floating_point_operations

    class Watching(PreferenceRun):
        def wrap_schedule(self, schedule: Any) -> Any:
            def watched(*args: Any, seq_length: int, forward_only: bool, **kwargs: Any) -> Any:
                (seen.evaluated if forward_only else seen.trained).append(seq_length)
                return schedule(*args, seq_length=seq_length, forward_only=forward_only, **kwargs)

            return super().wrap_schedule(watched)

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.counted.append(kwargs["total_real_tokens_in_batch"])
        return count(*args, **kwargs)

    with mock.patch.object(trainer, "num_floating_point_operations", counted):
        run, _ = run_job([*FLAGS, *flags], {}, run_type=Watching)
    plan = run.job.plan
    seen.lengths, seen.tokens, seen.eval_length = plan.lengths, plan.real_tokens.tolist(), run.job.eval_length
    seen.steps = run.progress.steps
    return seen


@pytest.mark.parametrize("reference", ["precomputed", "resident"])
def test_pipeline_stages_exchange_messages_of_the_steps_length(ranks, reference):
    flags = ["--reference", reference]
    (expected,) = ranks(1)(train_and_watch, flags)
    stages = ranks(2)(train_and_watch, flags + PP2)
    for seen in stages:
        assert len(set(seen.trained)) > 1, "steps of one length would prove nothing"
        assert seen.trained == seen.lengths.max(axis=1).tolist()
        assert set(seen.evaluated) == {seen.eval_length}
    for step, expected_step in zip(last_stage(stages).steps, expected.steps, strict=True):
        assert step["loss"] == pytest.approx(expected_step["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(expected_step["grad_norm"], rel=1e-5)


def test_megatron_counts_tokens_and_not_padding(ranks):
    """Its throughput, and the operations that checkpoints tell of."""
    (seen,) = ranks(1)(train_and_watch, [])
    assert [*dict.fromkeys(seen.counted)] == seen.tokens  # asked twice a step, for the checkpoint and for the log
    assert sum(seen.tokens) < seen.lengths.sum()
