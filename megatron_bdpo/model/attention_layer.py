"""What a layer's attention computes, in the words that backends read."""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """Softmax attention of one layer."""

    head_size: int
    """Of queries and keys."""
    scale: float
    """Of the scores."""
    window: int | None = None
    """How many keys back a query sees; None: all."""
    value_size: int | None = None
    """Of values, where it is not that of keys (multi-latent attention)."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) (Gemma 2)."""
    sinks: bool = False
    """Every head has a logit that takes part in the softmax and has no value (gpt-oss)."""

    @property
    def output_size(self) -> int:
        """Of a head."""
        return self.head_size if self.value_size is None else self.value_size
