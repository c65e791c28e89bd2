"""Jobs on the real model, run in place on the ranks of a pool, and what they tell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from tests.harness.jobs import Shards, run_job
from tests.harness.recording import recorded_run


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
    """Of the first step; empty where they were not asked for."""


def real_job(flags: list[str], *, gradients: bool = False, **overrides: Any) -> RealStep:
    """Run a job on this rank, without clipping gradients.

    Args:
        gradients: whether to keep those of the first step.
    """
    from megatron_bdpo.training.run import PreferenceRun

    run_type = recorded_run(redraw=False) if gradients else PreferenceRun
    with _gate_told() as seen:
        run, _ = run_job(run_type, flags, {"clip_grad": 0.0} | overrides)
    progress = run.progress
    return RealStep(
        progress.steps,
        progress.evaluations[-1] if progress.evaluations else {},
        seen[0] if seen else None,
        run.seen[0].gradients if gradients else [],
    )


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
