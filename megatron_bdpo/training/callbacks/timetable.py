"""When a checkpoint and an evaluation are due: by Megatron's intervals in steps, by the clock, or by both.

Megatron counts steps only. Before it asks whether a step is one to evaluate or to save after, the interval in its
arguments is made to divide that step where the clock says so. The clock is rank 0's, and all ranks hear its answer at
the same moment, so that they agree whatever their own clocks say. Neither a checkpoint nor an evaluation changes what
is trained: a run that is stopped and goes on keeps its numbers, although its checkpoints are of other steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_bdpo.training.callbacks.callback import Callback, StepResult
from megatron_bdpo.training.distributed import is_rank_zero, sum_over_ranks


@dataclass
class Interval:
    """Between two checkpoints, or two evaluations."""

    argument: str
    """Megatron's, which counts steps."""
    steps: int | None
    """What the user, or Megatron's default, has it at."""
    minutes: float | None
    """By the clock, where there is one."""
    since: float = field(default=0.0, init=False)
    """When it began, in seconds."""

    def is_over(self, now: float) -> bool:
        return self.minutes is not None and now - self.since >= 60 * self.minutes


class Timetable(Callback):
    """Sets both intervals among Megatron's arguments before every step's end.

    With ``--save-every`` and without ``--save-interval`` only the clock and the end of the training run are left;
    so with ``--eval-every``.
    """

    def __init__(
        self,
        save: Interval,
        evaluation: Interval,
        last_step: int,
        *,
        set_arguments: Callable[..., None],
        is_writing: Callable[[], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            last_step: of the run, which saves and evaluates by itself.
            set_arguments: changes Megatron's arguments, by name.
            is_writing: whether an earlier checkpoint is still being written; until it is, none is due by the clock.
            now: seconds, on rank 0.
        """
        self._save, self._evaluation, self._last_step = save, evaluation, last_step
        self._set_arguments, self._is_writing, self._now = set_arguments, is_writing, now
        self.before_training()

    def before_training(self) -> None:
        """Both intervals begin."""
        self._save.since = self._evaluation.since = self._now()

    def saving(self, directory: Path) -> None:
        """The next one is due an interval from now, for whatever reason this one is written."""
        self._save.since = self._now()

    def after_evaluation(self, metrics: Mapping[str, Tensor], iteration: int) -> None:
        """The next one is due an interval from now."""
        self._evaluation.since = self._now()

    def after_step(self, step: StepResult) -> None:
        """Decide what follows this step. Collective, where there is a clock to ask."""
        if self._save.minutes is None and self._evaluation.minutes is None:
            return
        due = torch.zeros(2)
        if is_rank_zero() and step.iteration < self._last_step:
            now = self._now()
            due[0] = self._save.is_over(now) and not self._is_writing()
            due[1] = self._evaluation.is_over(now)
        for interval, is_due in zip((self._save, self._evaluation), sum_over_ranks(due).tolist(), strict=True):
            if interval.minutes is not None:
                self._set_arguments(**{interval.argument: step.iteration if is_due else interval.steps})
