"""The gate is there for the first step of a run, and no longer; what it says is in test_step_zero.py."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch

from tests.harness.moments import start, step


def gates(first: int) -> list[bool]:
    """Whether there is a gate: once the run has loaded, and after each of two steps. It is judged once."""
    from megatron_bdpo.model.precision import Precision
    from megatron_bdpo.training.callbacks import step_zero_check

    forward = SimpleNamespace(gate=None)
    check = step_zero_check.StepZeroCheck(forward, Precision(torch.float32))
    with mock.patch.object(step_zero_check, "say") as said, mock.patch.object(step_zero_check, "StepZeroGate") as gate:
        check.after_load(start(first))
        found = [forward.gate is not None]
        for iteration in (first + 1, first + 2):
            check.after_step(step(iteration))
            found.append(forward.gate is not None)
    assert said.call_args_list == [mock.call(gate().judge())] * found[0]
    return found


def test_once(ranks):
    assert ranks(1)(gates, 0) == [[True, False, False]]


def test_a_run_that_goes_on_has_another_policy(ranks):
    assert ranks(1)(gates, 3) == [[False, False, False]]
