"""Floating-point operations of a training step, counted from the lengths of its pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common.models import Shape

IntArray = np.ndarray[Any, Any]

#: Products of matrices for each one of the forward pass: itself, the gradient of its input, that of its weight.
TRAINING = 3


@dataclass(frozen=True)
class Work:
    """Operations, forward and backward. A multiplication and an addition are two."""

    linear: float  # the layers' matrices
    attention: float  # scores and their sums of values, only where a query may look
    output: float  # the output layer, at scored positions

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.output


def work(shape: Shape, lengths: IntArray, *, share_prompts: bool) -> Work:
    """Of pairs, without padding. ``lengths`` [..., 3] are prompt, chosen and rejected tokens."""
    prompt, answers = lengths[..., 0].astype(np.float64), lengths[..., 1:].astype(np.float64)
    if share_prompts:
        seen = (_causal(prompt) + _causal(answers).sum(-1) + (answers.sum(-1) * prompt)).sum()
    else:
        seen = _causal(prompt[..., None] + answers).sum()
    return Work(
        linear=2.0 * TRAINING * shape.layers * shape.layer_weights * tokens(lengths, share_prompts=share_prompts),
        attention=4.0 * TRAINING * shape.layers * shape.hidden * float(seen),
        output=2.0 * TRAINING * shape.hidden * shape.vocab * float(answers.sum()),
    )


def tokens(lengths: IntArray, *, share_prompts: bool) -> int:
    """Positions that the pairs take."""
    return int(lengths.sum() + (0 if share_prompts else lengths[..., 0].sum()))


def _causal(length: Any) -> Any:
    """Pairs of a query and a key that it sees."""
    return length * (length + 1) / 2
