"""Moves a resident reference towards the policy, every so many steps; its weights are in the run's checkpoints.

TR-DPO (arXiv 2404.09656), equations 4 and 5: ``pi_ref <- alpha pi_theta + (1 - alpha) pi_ref``, hard with alpha = 1.
"""

from __future__ import annotations

from typing import Any

from megatron_bdpo.model.evaluation import weights_gathered
from megatron_bdpo.training.callbacks.callback import Callback, Start, StepResult
from megatron_bdpo.training.distributed import say
from megatron_bdpo.training.forward import PreferenceStep
from megatron_bdpo.training.reference.passes import ResidentReference
from megatron_bdpo.training.reference.weights import move_towards, reference_state


class MovingReference(Callback):
    """Policy and reference have the same layout: nothing is communicated but what the policy has not gathered yet."""

    def __init__(self, step: PreferenceStep, every: int, mix: float) -> None:
        self._step, self._every, self._mix = step, every, mix
        self._policy: list[Any] = []
        self._reference: list[Any] = []

    def after_load(self, start: Start) -> None:
        """The reference has been provided just before."""
        assert isinstance(self._step.reference, ResidentReference)
        self._policy, self._reference = start.model, self._step.reference.model

    def after_step(self, step: StepResult) -> None:
        """Before the step's checkpoint and evaluation. Steps are counted from the run's first, skipped ones too."""
        if step.iteration % self._every == 0:
            with weights_gathered(self._policy):
                move_towards(self._policy, self._reference, self._mix)
            say(f"reference: moved towards the policy ({self._mix:g}) after step {step.iteration}")

    def checkpoint_state(self) -> dict[str, Any]:
        """The reference as it is now."""
        return reference_state(self._reference)
