"""What a callback is told, and when."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from megatron_bdpo.display import Block
from megatron_bdpo.losses import LossFunction

if TYPE_CHECKING:  # it brings Megatron along, which a callback need not know
    from megatron_bdpo.training.identity import RunIdentity


@dataclass(frozen=True)
class Start:
    """The run as it begins to train."""

    model: list[Any]
    """The policy's chunks on this rank, with their weights."""
    iteration: int
    """Steps that are done already: of a run that goes on."""
    loss: LossFunction
    """With all its options."""
    identity: RunIdentity
    """What checkpoints say about the run."""
    log_probs: Mapping[str, Path]
    """Directories of the reference's log-probs, by store; none where they are not kept."""
    imbalance_edges: list[float]
    """Between the quartiles of the training pairs' imbalance; none where they are not known."""

    @property
    def resumed(self) -> bool:
        return self.iteration > 0


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    iteration: int
    """Its number, counted from 1."""
    metrics: Mapping[str, Tensor]
    """Means over the step's pairs, with ``learning_rate`` and ``grad_norm``; empty but on the last pipeline stage."""
    skipped: bool
    """fp16's gradients overflowed: there was no update."""
    seconds: float
    pairs: int
    tokens: int
    """Without padding, each prompt once where prompts are shared."""


@dataclass(frozen=True)
class Record:
    """Metrics as numbers: of the steps since the last record, or of an evaluation."""

    kind: Literal["step", "evaluation"]
    iteration: int
    """The last step that is done."""
    metrics: Mapping[str, float]
    """Means over the pairs."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Pairs and tokens per second; none of an evaluation."""

    @property
    def values(self) -> dict[str, float]:
        """All of it by name."""
        return {"iteration": float(self.iteration), **self.metrics, **self.rates}


class Callback:
    """What happens beside a step: every method is a moment, and does nothing unless a subclass says otherwise.

    All ranks call the callbacks in the same order, so that they may communicate. What a callback raises ends the run on
    its rank; ``UserError`` within ``distributed.all_ranks_agree`` ends it on all.
    """

    def after_load(self, start: Start) -> None:
        """The policy has its weights, and the reference is there."""

    def before_training(self) -> None:
        """Steps are about to begin."""

    def after_update(self, grad_norm: float, iteration: int) -> None:
        """The optimizer has made a step; ``grad_norm`` is of all ranks, before clipping. Nothing of it is saved yet."""

    def after_step(self, step: StepResult) -> None:
        """A step is done, skipped ones too. A checkpoint or an evaluation may follow."""

    def after_evaluation(self, metrics: Mapping[str, Tensor], iteration: int) -> None:
        """The held-out pairs have been gone through. ``metrics`` is empty but on the last pipeline stage."""

    def after_record(self, record: Record) -> None:
        """Metrics are numbers: a log interval or an evaluation has ended. Only on ranks of the last pipeline stage."""

    def saving(self, directory: Path) -> contextlib.AbstractContextManager[None] | None:
        """A checkpoint is about to be written. A context manager is entered around the writing of its files."""

    def checkpoint_state(self) -> dict[str, Any]:
        """What checkpoints hold of it, beside Megatron's state: sharded tensors, under names that are its own."""
        return {}

    def after_files(self, directory: Path) -> None:
        """The files of a checkpoint are written; Megatron's tracker does not name it yet."""

    def finished(self) -> None:
        """The last step is done, and its checkpoint written."""

    def stopped(self, iteration: int, reason: str) -> None:
        """The run ends early, after its checkpoint or before its first step.

        Args:
            iteration: steps that are done.
            reason: empty where Megatron's own flags have ended it.
        """

    def table(self) -> Block | None:
        """What to show of the run when it is over, if there is something. Only on the last rank."""
