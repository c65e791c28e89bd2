"""What a checkpoint takes on the disk, by arithmetic: every parameter once, whatever the layout.

| precision   | optimizer's states, Adam                   | bytes a trained parameter                  |
|-------------|--------------------------------------------|--------------------------------------------|
| bf16, fp16  | fp32 weight, two moments                   | 2 + 12                                     |
| fp32        | two moments; distributed: the weight again | 4 + 8; distributed 4 + 12                  |

Weights that are frozen beside adapters are not in it. What is beside tensors is not counted: a thousand bytes or two
for each, and the index.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bdpo.planning.adapters import adapter_parameters
from megatron_bdpo.planning.layout import Layout
from megatron_bdpo.planning.memory import JobShape
from megatron_bdpo.planning.model import ModelShape, Split, stage_parameters

_WHOLE = Split(layout=Layout(1, 1, 1, 1))


def checkpoint_bytes(model: ModelShape, job: JobShape, *, optimizer: bool = True) -> int:
    """One checkpoint.

    Args:
        optimizer: its states are saved (not ``--no-save-optim``).
    """
    trained = adapter_parameters(model, _WHOLE, job.adapters, 0).total if job.adapters else parameters(model, job)
    if not optimizer:
        states = 0
    elif job.precision == "fp32" and not job.distributed_optimizer:
        states = 8
    else:
        states = 12
    return trained * (job.weight_bytes + states)


def parameters(model: ModelShape, job: JobShape) -> int:
    """Of the whole model, with the rows that a layout adds to its vocabulary."""
    added = model.padded_vocab(job.split.layout.tensor) - model.padded_vocab(1)
    return stage_parameters(model, _WHOLE, 0).total + added * model.hidden * (1 if model.tied else 2)


@dataclass(frozen=True, kw_only=True)
class Saves:
    """When checkpoints are written, and which stay."""

    steps: int
    interval: int | None
    """None: by the clock, so that nobody knows how many."""
    newest: int | None = None
    """How many of them stay; None: all."""
    every: int | None = None
    """Steps whose multiples stay too."""

    def most_at_once(self, done: int = 0) -> int | None:
        """Checkpoints at the fullest moment: those that stay, and the one that is being written; None: not known.

        Args:
            done: steps of a run that goes on. With all of them done, none is written.
        """
        if done >= self.steps:
            return 0
        written = None if self.interval is None else -(-self.steps // self.interval)
        if self.newest is None:
            return written
        # Of the newest ones some are multiples as well: what is said is at most one too many for each.
        kept = self.newest + 1 + (max(0, self.steps // self.every - self.newest) if self.every else 0)
        return kept if written is None else min(kept, written)
