"""Jobs on the real model, run in place on the ranks of a pool, and what they tell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from tests.harness.jobs import Shards, copy_shards, run_job
from tests.harness.recording import gradients_in_place


@dataclass
class RealStep:
    """What one rank tells of a job."""

    metrics: list[dict[str, float]]
    """Of its steps, on the last pipeline stage, as are ``evaluation`` and ``gate``."""
    evaluation: dict[str, float]
    """After the last step; empty without held-out pairs."""
    gate: Any
    """``step_zero.Deviation`` of the first step; None in a job that goes on."""
    gradients: Shards
    """Of the last step; empty where they were not asked for."""


def real_job(flags: list[str], *, gradients: bool = False, **overrides: Any) -> RealStep:
    """Run a job on this rank, without clipping gradients.

    Args:
        gradients: whether to keep those of the last step.
    """
    with _gate_told() as seen:
        run_type = _gradients_kept() if gradients else None
        run, _ = run_job(flags, {"clip_grad": 0.0} | overrides, run_type=run_type)
    progress = run.progress
    return RealStep(
        progress.steps,
        progress.evaluations[-1] if progress.evaluations else {},
        seen[0] if seen else None,
        run.gradients if gradients else [],
    )


def _gradients_kept() -> type[Any]:
    """A PreferenceRun that copies the last step's gradients, and nothing else: the model is large."""
    from megatron_bdpo.training.run import PreferenceRun

    class GradientsKept(PreferenceRun):
        gradients: Any = ()

        def wrap_schedule(self, schedule: Any) -> Any:
            inner = super().wrap_schedule(schedule)

            def run(*args: Any, forward_only: bool = False, **kwargs: Any) -> Any:
                result = inner(*args, forward_only=forward_only, **kwargs)
                if not forward_only:
                    with gradients_in_place(self.model):
                        self.gradients = copy_shards(self.model)
                return result

            return run

    return GradientsKept


@contextlib.contextmanager
def _gate_told() -> Iterator[list[Any]]:
    """What the gate of the first step finds inside the block."""
    from megatron_bdpo.training.step_zero import StepZeroGate

    seen: list[Any] = []
    deviation = StepZeroGate.deviation

    def tell(gate: Any) -> Any:
        seen.append(deviation(gate))
        return seen[-1]

    with mock.patch.object(StepZeroGate, "deviation", tell):
        yield seen
