"""The loss of a run: one of the registry, with its options, called with the log-probs of a batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_bdpo.losses import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.training.batches import PackBatch


@dataclass(frozen=True)
class PairLossFunction:
    """A loss of the registry with its options: sequence log-probs of a batch -> losses of its pairs."""

    spec: LossSpec[Any]
    options: Any

    def describe(self) -> str:
        """Name and options in a line."""
        options = (f"{field.name} {getattr(self.options, field.name)}" for field in dataclasses.fields(self.options))
        return ", ".join([self.spec.name, *options])

    @property
    def requirements(self) -> Requirements:
        return self.spec.requirements(self.options)

    def __call__(
        self, batch: PackBatch, policy: Tensor, reference: Tensor | None, unconditional: Tensor | None
    ) -> tuple[PairLogProbs, PairLosses]:
        """Evaluate. ``policy``, ``reference``, ``unconditional`` are [S], chosen and rejected alternating."""
        return self.of_sequences(batch.sequence_tokens, batch.unsafe, policy, reference, unconditional)

    def of_sequences(
        self, tokens: Tensor, unsafe: Tensor, policy: Tensor, reference: Tensor | None, unconditional: Tensor | None
    ) -> tuple[PairLogProbs, PairLosses]:
        """The same of any pairs: ``tokens`` is [S], ``unsafe`` [P, 2]."""
        pairs = PairLogProbs.of_sequences(tokens, policy, reference, unconditional, unsafe)
        return pairs, self.spec.function(pairs, self.options)
