"""Ends the run before anything is saved of an update that was not finite. See ``training.finite``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_bdpo.data.step_plan import IntArray
from megatron_bdpo.training.callbacks.callback import Callback, Start
from megatron_bdpo.training.finite import Describe, broken_gradient, reject_broken_weights


class FiniteCheck(Callback):
    """Looks at the gradients' norm after each update, and at the weights before each checkpoint."""

    def __init__(self, groups: Callable[[int], IntArray], describe: Describe, suspect: str) -> None:
        """
        Args:
            groups: ids of a step's groups.
            describe: a group's name for messages.
            suspect: see ``suspects.likely_cause``.
        """
        self._groups, self._describe, self._suspect = groups, describe, suspect
        self._model: list[Any] = []

    def after_load(self, start: Start) -> None:
        self._model = start.model

    def after_update(self, grad_norm: float, iteration: int) -> None:
        """
        Raises:
            NotFiniteError, DivergedError: with the step's pairs.
        """
        if not math.isfinite(grad_norm):
            groups = self._groups(iteration)
            raise broken_gradient(f"norm {grad_norm}", iteration, groups, self._describe, self._suspect)

    def saving(self, directory: Path) -> None:
        """Collective.

        Raises:
            NotFiniteError: on every rank, with the tensors' names.
        """
        reject_broken_weights(self._model, directory)
