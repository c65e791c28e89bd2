"""Judges the first step: the policy has to be its reference still. See ``training.step_zero``."""

from __future__ import annotations

from megatron_bdpo.model.precision import Precision
from megatron_bdpo.training.callbacks.callback import Callback, Start, StepResult
from megatron_bdpo.training.distributed import say
from megatron_bdpo.training.forward import PreferenceStep
from megatron_bdpo.training.step_zero import StepZeroGate


class StepZeroCheck(Callback):
    """Puts the gate into the step of a run that begins, and takes it out again."""

    def __init__(self, step: PreferenceStep, precision: Precision) -> None:
        self._step, self._precision = step, precision

    def after_load(self, start: Start) -> None:
        """Only of a run that does not go on: later the policy is another."""
        if not start.resumed:
            self._step.gate = StepZeroGate(self._precision)

    def after_step(self, step: StepResult) -> None:
        """Judge, once. Collective.

        Raises:
            UserError: on every rank, if the policy is not its reference.
        """
        if self._step.gate is not None:
            say(self._step.gate.judge())
            self._step.gate = None
