"""Keeps ``status.json``: see ``reporting.status``."""

from __future__ import annotations

from megatron_bdpo.training.callbacks.callback import Callback, Start, StepResult
from megatron_bdpo.training.phases import clock
from megatron_bdpo.training.reporting.status import State, write_status


class StatusFile(Callback):
    """Says whether the run is running, finished or stopped."""

    def __init__(self, save: str | None, last_step: int) -> None:
        """
        Args:
            save: the directory of ``--save``, if there is one.
            last_step: how many steps there are.
        """
        self._save, self._last_step = save, last_step
        self._iteration = 0

    def after_load(self, start: Start) -> None:
        self._iteration = start.iteration
        clock().step, clock().of = start.iteration, self._last_step

    def before_training(self) -> None:
        self._write("running")

    def after_step(self, step: StepResult) -> None:
        self._iteration = clock().step = step.iteration

    def finished(self) -> None:
        self._write("finished")

    def stopped(self, iteration: int, reason: str) -> None:
        self._iteration = iteration  # it may not have been told of one: while the reference is scored
        self._write("stopped", reason or "--exit-interval or --exit-duration-in-mins")

    def _write(self, state: State, reason: str = "") -> None:
        write_status(state, self._save, step=self._iteration, of=self._last_step, reason=reason)
