"""What a run can do at the moments for which Megatron's trainer has no call-backs: see ``seams``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

#: Metrics whose names begin with this reach the hooks, but not Megatron's own log line, TensorBoard and W&B.
HOOKS_ONLY = "_"


class EvaluationLeft(Exception):
    """Raised on all ranks, between two microbatches, to end an evaluation without a result."""


class SaveHooks(Protocol):
    """What is to be done around the writing of a checkpoint. All ranks call every hook."""

    wants_digests: bool
    """Whether files are to be hashed while they are written."""

    def more_state(self) -> dict[str, Any]:
        """What a checkpoint is to hold beside Megatron's state."""

    def saving(self, directory: Path) -> contextlib.AbstractContextManager[None]:
        """Around the writing of a checkpoint's files, or with ``--async-save`` the start of it."""

    def finishing(self, directory: Path) -> contextlib.AbstractContextManager[None]:
        """With ``--async-save``, around the end of a checkpoint whose files were written in the background."""

    def after_files(self, directory: Path) -> None:
        """All files of a checkpoint are written; the tracker does not name it yet."""


class TrainerHooks(Protocol):
    """What a run wants to do at the seams. All ranks call every hook, in the same order."""

    def wrap_schedule(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """Given Megatron's forward-backward function, return the one to use."""

    def in_phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Around the building of the model (``weights``), an ``evaluation``, and a ``save``."""

    def after_load(self, model: list[Any]) -> None:
        """The model's chunks hold their initial or loaded weights."""

    def before_training(self, evaluate: Callable[[int], Any]) -> None:
        """Training is about to begin. ``evaluate`` runs one evaluation, of the weights after so many steps."""

    def work_of_step(self) -> tuple[float, float]:
        """After a step's backward pass: its tokens, and the sum of squares of its sequences' lengths, of all ranks."""

    def after_update(self, grad_norm: float, iteration: int) -> None:
        """The optimizer has made step ``iteration``; ``grad_norm`` is of all ranks, before clipping."""

    def after_step(self, losses: dict[str, torch.Tensor], iteration: int, skipped: bool) -> None:
        """One optimizer step is done. ``losses`` is empty but on the last pipeline stage.

        There it holds the step's metrics, and Megatron's ``learning_rate`` and ``grad_norm`` (before clipping).
        """

    def after_evaluation(self, metrics: dict[str, torch.Tensor]) -> None:
        """One pass over the held-out pairs is done. ``metrics`` is empty but on the last pipeline stage."""

    def signals_received(self) -> list[bool]:
        """After each step, with ``args.exit_signal_handler``: any True ends the run after a checkpoint."""
